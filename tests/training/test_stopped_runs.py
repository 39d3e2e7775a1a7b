"""Runs that are stopped: by a kill at any moment, by Ctrl-C, by a full disk, by a loss that is not finite."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tokenformer.cli import main
from tokenformer.data import prepare
from tokenformer.errors import UserError
from tokenformer.folders import whole_checkpoints
from tokenformer.training import Recipe, train
from tokenformer.training.callbacks import read_metrics
from tokenformer.training.trainer import LanguageTrainer

MakeRecipe = Callable[..., Recipe]
WriteRecipe = Callable[..., str]


class Killed(BaseException):
    """Stands for a kill -9: nothing of the library may catch it."""


def lines_without_seconds(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_run(run: Path, whole: Path) -> None:
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert lines_without_seconds(run) == lines_without_seconds(whole)


@pytest.fixture
def whole(make_recipe: MakeRecipe) -> Path:
    """The run that nothing stopped."""
    recipe = make_recipe("whole")
    train(recipe, progress=False)
    return Path(recipe.out)


@pytest.mark.parametrize(
    "where",
    [
        "before the recipe gets its name",
        "step 1 of 12",
        "step 6 of 12",
        "inside the first checkpoint",
        "inside the second checkpoint",
        "before the checkpoint gets its name",
        "before the last checkpoint gets its name",
        "while an old checkpoint is removed",
        "before the summary",
    ],
)
def test_killed_anywhere_the_run_ends_bit_identical(
    where: str, make_recipe: MakeRecipe, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("killed")
    with monkeypatch.context() as patch:
        _arm(where, patch)
        with pytest.raises(Killed):
            train(recipe, progress=False)
    train(recipe, progress=False)
    assert_same_run(Path(recipe.out), whole)
    assert not (Path(recipe.out) / "checkpoints" / ".partial").exists() or not list(
        (Path(recipe.out) / "checkpoints" / ".partial").iterdir()
    )


def _arm(where: str, patch: pytest.MonkeyPatch) -> None:
    """Make the `n`-th call of a function kill the process (the call before does its work)."""
    targets = {
        "before the recipe gets its name": (os, "replace", 1),
        "step 1 of 12": (LanguageTrainer, "training_step", 1),
        "step 6 of 12": (LanguageTrainer, "training_step", 6),
        "inside the first checkpoint": (LanguageTrainer, "_save_rng_state", 1),
        "inside the second checkpoint": (LanguageTrainer, "_save_rng_state", 2),
        "before the checkpoint gets its name": ("tokenformer.training.trainer", "publish", 1),
        "before the last checkpoint gets its name": ("tokenformer.training.trainer", "publish", 3),
        "while an old checkpoint is removed": (shutil, "rmtree", None),
        "before the summary": ("tokenformer.training.run", "write_atomically", 3),
    }
    owner, name, fatal = targets[where]
    if isinstance(owner, str):
        owner = sys.modules[owner]
    original = getattr(owner, name)
    calls = 0

    def armed(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        doomed = fatal is None and (Path(str(args[0])) / "checkpoint-4").exists()
        if doomed:
            os.remove(Path(str(args[0])) / "checkpoint-4" / "optimizer.pt")
        if doomed or calls == fatal:
            raise Killed
        return original(*args, **kwargs)

    patch.setattr(owner, name, armed)


@pytest.mark.slow
def test_sigkill_and_the_same_command(make_recipe: MakeRecipe, write_recipe: WriteRecipe) -> None:
    recipe = make_recipe("killed", training__tokens=400 * 128, training__save_every=5)
    command = [sys.executable, "-m", "tokenformer", "train", write_recipe(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = Path(recipe.out)
    deadline = time.monotonic() + 120
    while len(whole_checkpoints(run)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (run / "summary.json").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr

    undisturbed = make_recipe("undisturbed", training__tokens=400 * 128, training__save_every=5)
    train(undisturbed, progress=False)
    assert_same_run(run, Path(undisturbed.out))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_saves_and_stops(number: signal.Signals, make_recipe: MakeRecipe, write_recipe: WriteRecipe) -> None:
    recipe = make_recipe("stopped", training__tokens=100_000 * 128, training__save_every=100_000)
    command = [sys.executable, "-m", "tokenformer", "train", write_recipe(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = Path(recipe.out) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "and saved; the same command resumes" in errors.splitlines()[-1]
    checkpoint = whole_checkpoints(Path(recipe.out))[-1]
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert f"stopped at step {state['global_step']} of 100000" in errors.splitlines()[-1]
    last = read_metrics(metrics)[-1]
    assert last["step"] == state["global_step"]
    assert last["loss"] > 0


def test_a_loss_that_is_not_finite_stops_the_run(
    make_recipe: MakeRecipe, write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(
        optimizer__learning_rate=1e30,
        optimizer__schedule="constant",
        optimizer__warmup=0.0,
        optimizer__max_grad_norm=1e30,
    )
    assert main(["train", write_recipe(recipe)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "the loss became" in line
    assert "at step" in line
    assert "learning rate 1e+30" in line
    assert "optimizer.learning_rate" in line


def test_a_gradient_that_is_not_finite_does_not_reach_a_checkpoint(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    step = LanguageTrainer.training_step

    def overflowing(self: LanguageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(self, *args, **kwargs)
        if self.state.global_step == 7:
            next(self.model.parameters()).grad.view(-1)[0] = torch.inf
        return loss

    monkeypatch.setattr(LanguageTrainer, "training_step", overflowing)
    with pytest.raises(UserError, match="the gradient norm became inf at step 8 with learning rate"):
        train(recipe, progress=False)
    assert [path.name for path in whole_checkpoints(Path(recipe.out))] == ["checkpoint-4"]


@pytest.mark.parametrize("failure", ["torch.save", "safetensors", "metrics"])
def test_a_full_disk_loses_nothing(
    failure: str,
    make_recipe: MakeRecipe,
    write_recipe: WriteRecipe,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = make_recipe("full")
    with monkeypatch.context() as patch:
        _fill_the_disk(failure, patch)
        assert main(["train", write_recipe(recipe)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "no space left on the device" in line
    assert recipe.out in line
    assert [path.name for path in whole_checkpoints(Path(recipe.out))] == ["checkpoint-4"]
    assert main(["train", write_recipe(recipe)]) == 0
    assert_same_run(Path(recipe.out), whole)


def _fill_the_disk(failure: str, patch: pytest.MonkeyPatch) -> None:
    """From the second checkpoint on, the disk is full; each library says so in its own way."""
    full = OSError(errno.ENOSPC, "No space left on device")
    if failure == "metrics":
        real_open = Path.open

        def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if self.name == "metrics.jsonl" and mode == "a" and len(read_metrics(self)) == 3:
                raise full
            return real_open(self, mode, *args, **kwargs)

        patch.setattr(Path, "open", opened)
        return
    if failure == "torch.save":
        original, owner, name = torch.save, torch, "save"
        error: Exception = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos, file write failed")
    else:
        from transformers import PreTrainedModel

        original, owner, name = PreTrainedModel.save_pretrained, PreTrainedModel, "save_pretrained"
        error = full

    def armed(*args: object, **kwargs: object) -> object:
        if "checkpoint-8" in f"{args}{kwargs}":
            raise error
        return original(*args, **kwargs)

    patch.setattr(owner, name, armed)


def test_another_run_in_the_folder_is_left_alone(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    train(recipe, progress=False)
    before = {path: path.read_bytes() for path in Path(recipe.out).rglob("*") if path.is_file()}
    other = make_recipe(optimizer__learning_rate=1e-4)
    with pytest.raises(
        UserError, match=r"holds another run \(optimizer.learning_rate is 0.003 there and 0.0001 here\)"
    ):
        train(other, progress=False)
    assert {path: path.read_bytes() for path in Path(recipe.out).rglob("*") if path.is_file()} == before


def test_data_that_changed_under_a_run_is_noticed(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    data = str(tmp_path / "data")
    recipe = make_recipe(data__path=data)
    for number, content in enumerate(("one two three four\n", "five six seven eight\n")):
        text.write_text(content * 800)
        shutil.rmtree(data, ignore_errors=True)
        prepare([str(text)], tokenizer="train:300", out=data, sequence_length=32, progress=False)
        with monkeypatch.context() as patch:
            patch.setattr(LanguageTrainer, "training_step", _die)
            error = Killed if number == 0 else UserError
            with pytest.raises(error, match="prepared anew" if number else None):
                train(recipe, progress=False)


def _die(*args: object) -> None:
    raise Killed


def test_carried_moments_continue_and_new_tokens_train(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """One step after growing with carried moments, against AdamW written out."""
    first = make_recipe("first")
    train(first, progress=False)
    grown = str(tmp_path / "grown")
    assert main(["grow", first.out, grown, "--ffn", "64", "--optimizer", "carried"]) == 0
    rate = 1e-3
    second = make_recipe(
        "second",
        model__path=grown,
        optimizer__state="carried",
        optimizer__schedule="constant",
        optimizer__warmup=0.0,
        optimizer__weight_decay=0.0,
        optimizer__learning_rate=rate,
        optimizer__max_grad_norm=1e9,
        training__tokens=128,
    )
    train(second, progress=False)

    name = "model.layers.0.ffn.segments.base.value"
    start, end = load_file(Path(grown) / "model.safetensors"), load_file(Path(second.out) / "model.safetensors")
    old = torch.load(whole_checkpoints(Path(first.out))[-1] / "optimizer.pt", weights_only=True)
    index = dict(zip(old["param_groups"][0]["param_names"], old["param_groups"][0]["params"], strict=True))[name]
    before = old["state"][index]
    assert before["step"] == 12
    new = torch.load(whole_checkpoints(Path(second.out))[-1] / "optimizer.pt", weights_only=True)
    names = new["param_groups"][0]["param_names"]
    after = new["state"][new["param_groups"][0]["params"][names.index(name)]]
    assert after["step"] == 13
    gradient = (after["exp_avg"] - 0.9 * before["exp_avg"]) / 0.1
    second_moment = 0.95 * before["exp_avg_sq"] + 0.05 * gradient**2
    corrected = (after["exp_avg"] / (1 - 0.9**13)) / ((second_moment / (1 - 0.95**13)).sqrt() + 1e-8)
    torch.testing.assert_close(end[name], start[name] - rate * corrected, rtol=1e-4, atol=1e-6)

    fresh = "model.layers.0.ffn.segments.grown1.value"
    assert new["state"][new["param_groups"][0]["params"][names.index(fresh)]]["step"] == 1
    key = "model.layers.0.ffn.segments.grown1.key"
    assert start[key].count_nonzero() == 0
    assert end[key].count_nonzero() > 0
