"""A run that is killed at thirty random moments ends with the bits of one that nothing disturbed."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import ForkedRuns
from safetensors.torch import load_file

from tokenformer.folders import step_of, whole_checkpoints
from tokenformer.training import Recipe
from tokenformer.training.callbacks import read_metrics

KILLS = 30
STEPS = 75
SAVE_EVERY = 3
# Kills of one kind that there must be: while a checkpoint is written, and while there is training between two.
OF_A_KIND = 3
MOST_KILLS = 90


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="forks processes")
def test_thirty_kills_at_random_moments_change_no_bit(
    make_recipe: Callable[..., Recipe], write_recipe: Callable[..., str], tmp_path: Path
) -> None:
    fields = {"tokens": STEPS * 4 * 32, "save_every": SAVE_EVERY, "eval_every": 20, "log_every": 1}

    def recipe(name: str) -> tuple[Path, str]:
        made = make_recipe(name, **{f"training__{field}": value for field, value in fields.items()})
        return Path(made.out), write_recipe(made, f"{name}.yaml")

    draw = random.Random(0)
    log = tmp_path / "log.txt"
    with ForkedRuns(log) as runs:
        undisturbed, file = recipe("undisturbed")
        started = time.monotonic()
        runs.start(file)
        wait_for(undisturbed, 1, before=None)
        starting = time.monotonic() - started
        assert runs.wait() == 0, log.read_text()
        step = (time.monotonic() - started - starting) / STEPS

        killed = saving = between = ended = 0
        run, file = recipe("run-0")
        while killed < KILLS or (min(saving, between) < OF_A_KIND and killed < MOST_KILLS):
            before = inode(run)
            resumed = max(map(step_of, whole_checkpoints(run)), default=0)
            pid = runs.start(file)
            if draw.random() < 0.1:  # while the run starts
                time.sleep(draw.uniform(0, starting))
            else:
                wait_for(run, resumed + draw.randint(1, 4), before)
                time.sleep(draw.uniform(0, SAVE_EVERY * step))
            os.kill(pid, signal.SIGKILL)
            status = runs.wait()
            if status == 0:  # it had ended before
                assert_same(run, undisturbed)
                ended += 1
                run, file = recipe(f"run-{ended}")
                continue
            assert status == -signal.SIGKILL, log.read_text()
            killed += 1
            partial = any((run / "checkpoints" / ".partial").glob("*"))
            saving += partial
            between += inode(run) != before and not partial
        runs.start(file)
        assert runs.wait() == 0, log.read_text()
    assert_same(run, undisturbed)
    assert min(saving, between) >= OF_A_KIND, (killed, saving, between)


def inode(run: Path) -> int | None:
    """Of the metrics, which a run writes anew when it begins to train; None before the first time."""
    file = run / "metrics.jsonl"
    return file.stat().st_ino if file.exists() else None


def wait_for(run: Path, step: int, before: int | None) -> None:
    """Until a run has logged a step, or is over, or two minutes have passed; `before` is the `inode` from before it."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (run / "summary.json").exists():
        if inode(run) != before and any(line["step"] >= step for line in read_metrics(run / "metrics.jsonl")):
            return
        time.sleep(0.004)


def assert_same(run: Path, undisturbed: Path) -> None:
    """Parameters, state of the optimizer, schedule, random numbers and metrics, all of them equal."""
    here, there = (load_file(folder / "model.safetensors") for folder in (run, undisturbed))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in there)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        one, other = (
            torch.load(folder / "checkpoints" / f"checkpoint-{STEPS}" / name, weights_only=False)
            for folder in (run, undisturbed)
        )
        assert_equal(one, other)
    assert without_seconds(run) == without_seconds(undisturbed)


def assert_equal(one: Any, other: Any) -> None:
    """Trees of tensors, arrays and numbers."""
    if isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in other:
            assert_equal(one[key], other[key])
    elif isinstance(other, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)) if hasattr(other, "shape") else one == other


def without_seconds(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(run / "metrics.jsonl")]
