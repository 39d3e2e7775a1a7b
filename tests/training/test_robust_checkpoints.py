"""Checkpoints: which are written and kept, and what a run does about one that is damaged."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from tokenformer.cli import main
from tokenformer.errors import UserError
from tokenformer.folders import whole_checkpoints
from tokenformer.training import Recipe, callbacks, train
from tokenformer.training.callbacks import MoreCheckpoints
from tokenformer.training.checkpoints import find_fault, newest_whole
from tokenformer.training.trainer import LanguageTrainer

MakeRecipe = Callable[..., Recipe]
WriteRecipe = Callable[..., str]


class Killed(BaseException):
    """Stands for a kill -9: nothing of the library may catch it."""


class Runs(NamedTuple):
    """One that was killed at its tenth step, behind the checkpoints of steps 4 and 8, and one that was not."""

    killed: Path
    whole: Path


@pytest.fixture(scope="module")
def runs(recipe_in: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    train(recipe_in(folder / "whole"), progress=False)
    step = LanguageTrainer.training_step

    def dying(self: LanguageTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 9:
            raise Killed
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageTrainer, "training_step", dying)
        with pytest.raises(Killed):
            train(recipe_in(folder / "killed"), progress=False)
    assert names(folder / "killed") == ["checkpoint-4", "checkpoint-8"]
    return Runs(folder / "killed", folder / "whole")


@pytest.fixture
def killed(runs: Runs, tmp_path: Path) -> Path:
    """A copy of the killed run, for a test to damage; a run's folder can be moved."""
    return Path(shutil.copytree(runs.killed, tmp_path / "run"))


def names(run: Path) -> list[str]:
    return [path.name for path in whole_checkpoints(run)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_end(run: Path, whole: Path) -> None:
    """Parameters, moments, schedule and random numbers, bit for bit."""
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        here, there = (folder / "checkpoints" / "checkpoint-12" / name for folder in (run, whole))
        assert here.read_bytes() == there.read_bytes(), name


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_the_manifest_names_every_file_with_its_size_and_hash(runs: Runs) -> None:
    checkpoint = runs.whole / "checkpoints" / "checkpoint-12"
    found = contents(checkpoint)
    listed = json.loads(found.pop("manifest.json"))["files"]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(found)
    assert listed == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in found.items()
    }
    assert find_fault(checkpoint) is None


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated": ("model.safetensors", truncate, "model.safetensors has "),
    "empty": ("optimizer.pt", lambda path: path.write_bytes(b""), "optimizer.pt has 0 bytes instead of "),
    "a flipped bit": ("optimizer.pt", flip, "optimizer.pt does not hold what was written"),
    "a file gone": ("rng_state.pth", Path.unlink, "rng_state.pth is missing"),
    "a truncated manifest": ("manifest.json", truncate, "manifest.json is damaged"),
    "a manifest of something else": ("manifest.json", lambda path: path.write_text("[]"), "manifest.json is damaged"),
    "a manifest of bytes": ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "manifest.json is"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    how: str, killed: Path, runs: Runs, recipe_in: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    name, damage, said = DAMAGE[how]
    checkpoint = killed / "checkpoints" / "checkpoint-8"
    damage(checkpoint / name)
    found = contents(checkpoint)
    train(recipe_in(killed), progress=False)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert line.startswith(f"{checkpoint} is damaged ({said}")
    assert line.endswith("set aside as checkpoint-8.damaged, going on from checkpoint-4")
    assert contents(killed / "checkpoints" / "checkpoint-8.damaged") == found
    assert_same_end(killed, runs.whole)


def test_a_second_damaged_checkpoint_of_a_step_is_set_aside_beside_the_first(killed: Path) -> None:
    checkpoint = killed / "checkpoints" / "checkpoint-8"
    shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-8.damaged"))
    flip(checkpoint / "model.safetensors")
    newest = newest_whole(killed)
    assert newest == killed / "checkpoints" / "checkpoint-4"
    assert {path.name for path in newest.parent.iterdir()} == {
        "checkpoint-4",
        "checkpoint-8.damaged",
        "checkpoint-8.damaged2",
    }


def test_no_whole_checkpoint_is_an_error_that_changes_nothing(
    killed: Path, recipe_in: MakeRecipe, write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(killed / "checkpoints" / "checkpoint-8" / "optimizer.pt")
    (killed / "checkpoints" / "checkpoint-4" / "model.safetensors").unlink()
    before = contents(killed)
    assert main(["train", write_recipe(recipe_in(killed))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"no checkpoint in {killed / 'checkpoints'} is whole" in line
    assert "(checkpoint-8: optimizer.pt does not hold what was written)" in line
    assert "remove that folder to begin the run anew" in line
    assert contents(killed) == before


def test_after_that_the_run_can_begin_anew(killed: Path, runs: Runs, recipe_in: MakeRecipe) -> None:
    shutil.rmtree(killed / "checkpoints")
    train(recipe_in(killed), progress=False)
    assert_same_end(killed, runs.whole)


def test_checkpoints_of_earlier_versions_are_taken_as_they_are(
    killed: Path, runs: Runs, recipe_in: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    for manifest in killed.rglob("manifest.json"):
        manifest.unlink()
    train(recipe_in(killed), progress=False)
    assert capsys.readouterr().err == ""
    assert_same_end(killed, runs.whole)


def test_a_file_that_may_not_be_read_is_no_damage(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by its mode: a test may run as root, who reads everything."""
    opened = Path.open

    def guarded(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "optimizer.pt":
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", guarded)
    with pytest.raises(UserError, match=r"cannot read .*checkpoint-8/optimizer.pt: Permission denied"):
        newest_whole(killed)
    assert names(killed) == ["checkpoint-4", "checkpoint-8"]


def test_a_disk_that_fails_is_damage(
    killed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Path.open

    def failing(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "optimizer.pt" and self.parent.name == "checkpoint-8":
            raise OSError(5, "Input/output error")
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", failing)
    assert newest_whole(killed) == killed / "checkpoints" / "checkpoint-4"
    assert "(optimizer.pt cannot be read: Input/output error)" in capsys.readouterr().err


def test_milestones_are_written_and_never_dropped(make_recipe: MakeRecipe, runs: Runs) -> None:
    recipe = make_recipe(training__save_every=4, training__keep_checkpoints=1, training__milestone_every=5)
    train(recipe, progress=False)
    assert names(Path(recipe.out)) == ["checkpoint-5", "checkpoint-10", "checkpoint-12"]
    assert_same_end(Path(recipe.out), runs.whole)


def test_a_checkpoint_after_so_many_minutes(make_recipe: MakeRecipe, runs: Runs) -> None:
    recipe = make_recipe(training__save_every=0, training__keep_checkpoints=99, training__save_minutes=1e-9)
    train(recipe, progress=False)
    assert names(Path(recipe.out)) == [f"checkpoint-{step}" for step in range(1, 13)]
    assert_same_end(Path(recipe.out), runs.whole)


def test_the_minutes_count_from_the_checkpoint_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: now))
    callback = MoreCheckpoints(minutes=2, milestone_every=0)
    state, saved = SimpleNamespace(global_step=0), []
    callback.on_train_begin(None, state, None)
    for second in range(0, 600, 50):
        now, state.global_step = float(second), state.global_step + 1
        control = SimpleNamespace(should_save=second == 200)  # as save_every asks for one
        callback.on_step_end(None, state, control)
        if control.should_save:
            saved.append(second)
            callback.on_save(None, state, control)
    assert saved == [150, 200, 350, 500]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows syncs no folders")
def test_a_run_is_complete_once_its_model_is_on_the_disk(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    run = Path(recipe.out)
    synced: set[int] = set()
    before: list[set[int]] = []
    fsync, replace = os.fsync, os.replace

    def recorded_sync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def recorded_replace(source: Path, target: Path) -> None:
        if Path(target).name == "summary.json":
            before.append(set(synced))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    train(recipe, progress=False)
    files = {path.name: path.stat().st_ino for path in run.iterdir() if path.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "summary.json"} <= set(files)
    (on_the_disk,) = before
    assert {*files.values(), run.stat().st_ino} <= on_the_disk


def test_what_concerns_checkpoints_alone_may_change_in_a_run(killed: Path, recipe_in: MakeRecipe) -> None:
    fields = {"save_every": 3, "save_minutes": 7.5, "milestone_every": 6, "keep_checkpoints": 5}
    recipe = recipe_in(killed, **{f"training__{name}": value for name, value in fields.items()})
    assert recipe.difference(killed) is None


@pytest.mark.parametrize(
    ("name", "value"), [("save_minutes", -1.0), ("save_minutes", float("nan")), ("milestone_every", -5)]
)
def test_what_cannot_be(
    name: str, value: float, make_recipe: MakeRecipe, write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(**{f"training__{name}": value})
    assert main(["train", write_recipe(recipe)]) == 2
    assert f"training.{name} must not be negative, got {value}" in capsys.readouterr().err
    assert not Path(recipe.out).exists()
