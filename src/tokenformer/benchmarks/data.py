"""Packed rows of tokens beside training on them: the loader must not be what a run waits for.

Random rows are written as `tokenformer data prepare` writes them and read back memory-mapped by the loader of the
Trainer, shuffled, batch after batch. Beside it stand NumPy reading random rows from a flat file, which is as little as
a loader can do, and the training step that needs the batch. Every row of an epoch is compared with what was written
before anything is timed.

Shapes: B rows of a batch, T tokens of a row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import load_from_disk
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from tokenformer.benchmarks.conditions import check_options
from tokenformer.benchmarks.models import default_config, describe, new_models_record, random_ids, small_config
from tokenformer.benchmarks.report import Timings, as_seconds
from tokenformer.benchmarks.targets import Target, ratios
from tokenformer.benchmarks.timing import Timing, interleave
from tokenformer.benchmarks.training import TrainingStep, new_optimizer, new_trainer
from tokenformer.data.storage import shard_bytes, shard_name, write_dataset_files
from tokenformer.errors import UserError
from tokenformer.hardware import autocast_dtype, pick_device, pick_precision, set_threads
from tokenformer.models import TokenFormerConfig, TokenFormerForCausalLM

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TARGETS = (
    Target("loader", "step", tuple(DTYPES.values()), at_most=0.02),
    Target("loader", "numpy", tuple(DTYPES.values())),
)
# Batches of one call, so that a call takes long enough to be timed.
BATCHES = 16


@dataclass(frozen=True)
class Need:
    """A training step that has to be fed.

    Attributes:
        config: of the model.
        batch: B.
        length: T.
    """

    config: TokenFormerConfig
    batch: int
    length: int


def default_needs() -> dict[str, Need]:
    """The 150M model with two rows of 512, and the small model of the quickstart, whose step is over much sooner."""
    base = {"name": "base", "qkv": 128, "output": 128, "ffn": 512}
    small = TokenFormerConfig(
        vocab_size=2048, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, segments=[base]
    )
    return {"150M": Need(default_config(), 2, 512), "quickstart": Need(small, 8, 256)}


def small_needs() -> dict[str, Need]:
    """A model that shows in seconds that the benchmark runs."""
    return {"small": Need(small_config(), 2, 128)}


def measure(
    needs: dict[str, Need] | None = None,
    *,
    rows: int = 16384,
    threads: int | None = None,
    repeats: int = 10,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Check, then time the loader of packed rows beside NumPy and beside the step of each model.

    Args:
        needs: training steps by name; `default_needs` if not given, and only then targets are judged.
        rows: of the training split.
        threads: of torch; one per physical core if not given.
        repeats: rounds; in each, 16 batches are read, and a step is taken.
        progress: called with a line on what is being done.

    Returns:
        The record (see benchmarks/README.md): times are of one batch, and of one step.

    Raises:
        UserError: an option out of range, or rows that are wrong; then nothing was timed.
    """
    check_options(("float32",), rows=rows, repeats=repeats)
    judge, needs = needs is None, needs or default_needs()
    if rows < (most := max(need.batch for need in needs.values())):
        raise UserError(f"rows must be at least the {most} of a batch, got {rows}")
    disable_progress_bar()
    threads, device = set_threads(threads), pick_device()
    precision = pick_precision("auto", device)
    dtype = DTYPES[precision]
    options = {"rows": rows, "repeats": repeats, "dtypes": [dtype], "batches": BATCHES}
    options |= {f"{name}_{size}": getattr(need, size) for name, need in needs.items() for size in ("batch", "length")}
    record = new_models_record("data", options, threads)
    record["models"], record["rows_per_second"], record["ratios"] = {}, {}, []
    timings: Timings = {dtype: {}}
    for name, need in needs.items():
        progress(f"{name}: writing rows and checking those of an epoch")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = TokenFormerForCausalLM(need.config).to(device).train()  # type: ignore[arg-type]  # transformers hides torch's signature
        record["models"][name] = describe(model)
        with TemporaryDirectory(prefix="tokenformer-bench-") as folder:
            cases = _cases(model, need, rows, Path(folder), autocast_dtype(precision))
            progress(f"{name}: timing, {repeats} rounds")
            interleave(cases, 1)
            found = interleave(cases, repeats)
        timings[dtype][name] = {
            case: timing if case == "step" else Timing(tuple(seconds / BATCHES for seconds in timing.seconds))
            for case, timing in found.items()
        }
        record["rows_per_second"][name] = {
            case: need.batch / timing.median for case, timing in timings[dtype][name].items()
        }
        record["ratios"] += [
            {**row, "pass": name} for row in ratios({dtype: timings[dtype][name]}, TARGETS, judge=judge)
        ]
    record["seconds"] = as_seconds(timings)
    return record


def random_rows(rows: int, length: int, vocabulary: int) -> np.ndarray:
    """Token ids (rows, length), uint16 where they fit."""
    dtype = np.uint16 if vocabulary <= 2**16 else np.uint32
    return np.random.default_rng(0).integers(vocabulary, size=(rows, length), dtype=dtype)


def write_rows(ids: np.ndarray, folder: Path) -> None:
    """Write rows as `tokenformer data prepare` writes a split, and beside them as a flat file of ids, `ids.bin`."""
    write_dataset_files(folder, 1, ids.dtype.name, ids.shape[1])
    (folder / shard_name(0)).write_bytes(shard_bytes(ids))
    ids.tofile(folder / "ids.bin")


def check_epoch(batches: Iterator[dict[str, torch.Tensor]], ids: np.ndarray, batch: int) -> None:
    """See that an epoch gives every row once, but for those that fill no batch, and its ids as they were written.

    Raises:
        UserError: it does not.
    """
    found = sorted(row.tobytes() for given in batches for row in given["input_ids"].cpu().numpy().astype(ids.dtype))
    written = sorted(row.tobytes() for row in ids)
    whole = len(ids) // batch * batch
    left = iter(written)
    if len(found) != whole or not all(row in left for row in found):  # both in order: `in` moves on
        raise UserError("the loader gives other rows than were written: this is a bug, report it")


def _cases(
    model: PreTrainedModel, need: Need, rows: int, folder: Path, autocast: torch.dtype | None
) -> dict[str, Callable[[], object]]:
    """Reading by the loader and by NumPy, `BATCHES` of them, and a step."""
    ids = random_rows(rows, need.length, need.config.vocab_size)
    write_rows(ids, folder)
    trainer = new_trainer(model, load_from_disk(str(folder)), folder / "run", need.batch)
    loader = trainer.get_train_dataloader()
    check_epoch(iter(loader), ids, need.batch)
    flat = np.memmap(folder / "ids.bin", dtype=ids.dtype, mode="r").reshape(ids.shape)
    from_loader, from_file = _forever(loader), _from_file(flat, need.batch)
    step = TrainingStep(
        model,
        new_optimizer(model),
        random_ids(need.config, need.batch, need.length).to(model.device),
        autocast or torch.float32,
    )

    def read(batches: Iterator[Any]) -> Callable[[], object]:
        return lambda: [next(batches) for _ in range(BATCHES)]

    return {"loader": read(from_loader), "numpy": read(from_file), "step": step}


def _forever(loader: Any) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader


def _from_file(ids: np.ndarray, batch: int) -> Iterator[torch.Tensor]:
    """Batches of random rows, as the 64-bit ids that a model takes."""
    generator = np.random.default_rng(0)
    while True:
        order = generator.permutation(len(ids))
        for start in range(0, len(ids) // batch * batch, batch):
            yield torch.from_numpy(ids[np.sort(order[start : start + batch])].astype(np.int64))
