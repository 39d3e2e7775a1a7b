"""Saving and loading: a model folder, and a training checkpoint with the moments of the optimizer.

Beside each stand as many bytes written to one file, with and without waiting until they are on the disk, or read from
one. What was loaded is compared bit by bit with what was saved before anything is timed. Reading is from the page
cache: emptying that takes the rights of an administrator. Before each save, what the one before wrote is removed and
the disk is left to finish, without the clock.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from tokenformer.benchmarks.conditions import check_options
from tokenformer.benchmarks.models import default_config, describe, new_models_record
from tokenformer.benchmarks.report import Timings, as_seconds
from tokenformer.benchmarks.targets import Target, ratios
from tokenformer.benchmarks.timing import interleave
from tokenformer.benchmarks.training import new_trainer
from tokenformer.errors import UserError
from tokenformer.folders import saving, whole_checkpoints
from tokenformer.hardware import set_threads
from tokenformer.models import TokenFormerConfig, TokenFormerForCausalLM
from tokenformer.models.loading import load_model
from tokenformer.training.checkpoints import newest_whole
from tokenformer.training.trainer import LanguageTrainer

_BLOCK = 64 * 2**20
SAVE_TARGETS = (Target("library", "write"), Target("library", "write_synced"))
LOAD_TARGETS = (Target("library", "read"),)


def measure(
    config: TokenFormerConfig | None = None,
    *,
    folder: str = ".",
    threads: int | None = None,
    repeats: int = 5,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Check, then time saving and loading of a model in float32 and of its training checkpoint.

    Args:
        config: of the TokenFormer; the 150M model if not given.
        folder: on the disk that is measured; everything is written into a new folder in it, which is removed.
        threads: of torch; one per physical core if not given.
        repeats: rounds.
        progress: called with a line on what is being done.

    Returns:
        The record (see benchmarks/README.md), with `bytes` by kind and `megabytes_per_second` by pass and case.

    Raises:
        UserError: an option out of range, a folder that cannot be written, a full disk, or something that came back
            otherwise than it was saved; then nothing was timed.
    """
    check_options(("float32",), repeats=repeats)
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder '{folder}': create it first")
    disable_progress_bar()
    threads = set_threads(threads)
    record = new_models_record("checkpoint", {"dtypes": ["float32"], "repeats": repeats}, threads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TokenFormerForCausalLM(config or default_config())
    record["models"] = {"tokenformer": describe(model)}
    timings: Timings = {"float32": {}}
    record["bytes"] = {}
    with saving(Path(folder)), TemporaryDirectory(prefix="tokenformer-bench-", dir=folder) as scratch:
        progress("a first step, for the moments")
        trainer = _trained(model, Path(scratch))
        kinds: dict[str, _Kind] = {
            "model": _ModelFolder(model, Path(scratch, "model")),
            "checkpoint": _Checkpoint(trainer),
        }
        for name, kind in kinds.items():
            progress(f"{name}: saving, loading and checking")
            kind.save()
            kind.check()
            size = sum(file.stat().st_size for file in kind.path().rglob("*") if file.is_file())
            record["bytes"][name] = size
            plain = _PlainFile(Path(scratch, "plain"), size)
            progress(f"{name}: timing saves, {repeats} rounds")
            writes = {"library": kind.save, "write": plain.write, "write_synced": plain.write_synced}
            ready = {"library": kind.clear, "write": plain.clear, "write_synced": plain.clear}
            timings["float32"][f"{name} save"] = interleave(
                writes, repeats, before={case: _settled(clear) for case, clear in ready.items()}
            )
            progress(f"{name}: timing loads, {repeats} rounds")
            loads: dict[str, Callable[[], object]] = {"library": kind.load, "read": plain.read}
            interleave(loads, 1)
            timings["float32"][f"{name} load"] = interleave(loads, repeats)
            kind.clear()
            plain.clear()
    record["seconds"] = as_seconds(timings)
    record["megabytes_per_second"] = {
        name: {case: record["bytes"][name.split()[0]] / 1e6 / timing.median for case, timing in cases.items()}
        for name, cases in timings["float32"].items()
    }
    record["ratios"] = [
        {**row, "pass": name}
        for name, cases in timings["float32"].items()
        for row in ratios({"float32": cases}, SAVE_TARGETS if name.endswith("save") else LOAD_TARGETS, judge=False)
    ]
    return record


class _Kind(Protocol):
    """What is saved and loaded."""

    def path(self) -> Path:
        """The folder that holds it."""

    def save(self) -> None:
        """Write it."""

    def load(self) -> object:
        """Read it."""

    def clear(self) -> None:
        """Remove what was written."""

    def check(self) -> None:
        """Raise `UserError` if it comes back otherwise than it was saved."""


class _ModelFolder:
    """A model as `train` leaves it at the end."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.model, self.folder = model, folder

    def path(self) -> Path:
        return self.folder

    def save(self) -> None:
        self.model.save_pretrained(self.folder)

    def load(self) -> PreTrainedModel:
        return load_model(self.folder)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def check(self) -> None:
        require_equal(self.model.state_dict(), self.load().state_dict(), "model")


class _Checkpoint:
    """Model, moments, schedule and random state, as a run writes and hashes them, and resumes from them."""

    def __init__(self, trainer: LanguageTrainer) -> None:
        self.trainer = trainer

    def path(self) -> Path:
        return whole_checkpoints(self.trainer.run)[-1]

    def save(self) -> None:
        self.trainer._save_checkpoint(cast(torch.nn.Module, self.trainer.model), None)

    def load(self) -> None:
        path = str(newest_whole(self.trainer.run))  # reads all of it once, to compare hashes
        self.trainer._load_from_checkpoint(path)
        self.trainer._load_optimizer_and_scheduler(path)
        self.trainer._load_rng_state(path)

    def clear(self) -> None:
        shutil.rmtree(self.trainer.run, ignore_errors=True)
        self.trainer.run.mkdir()

    def check(self) -> None:
        saved = {name: tensor.clone() for name, tensor in _state(self.trainer).items()}
        with torch.no_grad():
            for tensor in _state(self.trainer).values():
                tensor.fill_(7)
        self.load()
        require_equal(saved, _state(self.trainer), "checkpoint")


class _PlainFile:
    """As many bytes in one file, written and read in the simplest way."""

    def __init__(self, file: Path, size: int) -> None:
        self.file, self.size = file, size
        self.block = memoryview(np.random.default_rng(0).bytes(min(_BLOCK, size)))

    def write(self) -> None:
        with open(self.file, "wb", buffering=0) as file:
            for start in range(0, self.size, _BLOCK):
                file.write(self.block[: self.size - start])

    def write_synced(self) -> None:
        self.write()
        with open(self.file, "rb") as file:
            os.fsync(file.fileno())

    def read(self) -> None:
        if not self.file.exists():
            self.write()
        # Memory of its own, as a model's: reading over the same block again would leave the data in the processor.
        content = bytearray(self.size)
        with open(self.file, "rb", buffering=0) as file:
            view, start = memoryview(content), 0
            while start < self.size:
                start += file.readinto(view[start : start + _BLOCK])

    def clear(self) -> None:
        self.file.unlink(missing_ok=True)


def require_equal(saved: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor], what: str) -> None:
    """Compare bit by bit.

    Raises:
        UserError: naming the first tensor that differs.
    """
    if saved.keys() != loaded.keys():
        raise UserError(f"the {what} came back with other tensors than were saved: this is a bug, report it")
    for name, tensor in saved.items():
        if not torch.equal(tensor, loaded[name]):
            raise UserError(f"{name} of the {what} came back otherwise than it was saved: this is a bug, report it")


def _trained(model: PreTrainedModel, scratch: Path) -> LanguageTrainer:
    """A Trainer after one step, on one row of a few tokens."""
    rows = Dataset.from_dict({"input_ids": [list(range(8))]})
    trainer = new_trainer(model.train(), rows, scratch / "run", 1)
    trainer.train()
    return trainer


def _state(trainer: LanguageTrainer) -> dict[str, torch.Tensor]:
    """All parameters and moments by name."""
    assert trainer.model is not None
    assert trainer.optimizer is not None
    state = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    for number, moments in enumerate(trainer.optimizer.state_dict()["state"].values()):
        state |= {f"{kind}.{number}": value for kind, value in moments.items() if torch.is_tensor(value)}
    return state


def _settled(clear: Callable[[], None]) -> Callable[[], None]:
    """Remove, and leave the disk nothing of the case before to write."""

    def run() -> None:
        clear()
        os.sync()

    return run
