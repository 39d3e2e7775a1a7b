"""A disk that fills up while a checkpoint is written: the one before stays whole, and the run goes on from it."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, TrainerState

from tokenformer.cli import main
from tokenformer.folders import whole_checkpoints
from tokenformer.training import Recipe, checkpoints, train
from tokenformer.training.callbacks import Metrics
from tokenformer.training.checkpoints import find_fault
from tokenformer.training.trainer import LanguageTrainer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits what a process may write")

# What is being written when the disk is full, and how many bytes of it still fit.
POINTS: dict[str, tuple[Any, str, int]] = {
    "model": (PreTrainedModel, "save_pretrained", 50_000),
    "model, nothing fits": (PreTrainedModel, "save_pretrained", 0),
    "optimizer": (LanguageTrainer, "_save_optimizer_and_scheduler", 100_000),
    "random numbers": (LanguageTrainer, "_save_rng_state", 1_000),
    "state": (TrainerState, "save_to_json", 100),
    "manifest": (checkpoints, "write_manifest", 200),
    "metrics": (Metrics, "on_log", 300),
}


@contextmanager
def restored_limit() -> Iterator[None]:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def full_from(point: str, patch: pytest.MonkeyPatch) -> None:
    """From step 8 on, once the named function is called, no file may grow beyond so many bytes."""
    import resource

    owner, name, size = POINTS[point]
    original = getattr(owner, name)

    def filling(*args: Any, **kwargs: Any) -> Any:
        at_eight = "checkpoint-8" in f"{args}{kwargs}" or any(getattr(a, "global_step", 0) == 8 for a in args)
        if at_eight:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return original(*args, **kwargs)

    patch.setattr(owner, name, filling)


@pytest.fixture(scope="module")
def whole(recipe_in: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stopped."""
    run = tmp_path_factory.mktemp("disk") / "whole"
    train(recipe_in(run), progress=False)
    return run


@pytest.mark.parametrize("point", POINTS)
def test_a_full_disk_leaves_the_last_good_checkpoint(
    point: str,
    make_recipe: Callable[..., Recipe],
    write_recipe: Callable[..., str],
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = make_recipe()
    run = Path(recipe.out)
    with monkeypatch.context() as patch, restored_limit():
        full_from(point, patch)
        assert main(["train", write_recipe(recipe)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "error:" in line]
    assert f"cannot write {run}" in line
    assert "what was saved before is whole, so make room and run the same command again" in line
    (last,) = whole_checkpoints(run)
    assert last.name == "checkpoint-4"
    assert json.loads((last / "manifest.json").read_text())["files"].keys() >= {"model.safetensors", "optimizer.pt"}
    assert find_fault(last) is None
    assert main(["train", write_recipe(recipe)]) == 0
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        here, there = (folder / "checkpoints" / "checkpoint-12" / name for folder in (run, whole))
        assert here.read_bytes() == there.read_bytes()
