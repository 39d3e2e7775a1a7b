"""Skipping after a collapse, against runs that were given the order without the skipped batches from the start."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Sampler

from tokenformer.cli import main
from tokenformer.data import PreparedData
from tokenformer.errors import UserError
from tokenformer.training import Recipe, collapse, train
from tokenformer.training.callbacks import read_metrics
from tokenformer.training.trainer import LanguageTrainer

MakeRecipe = Callable[..., Recipe]
Patch = pytest.MonkeyPatch


class Killed(BaseException):
    """Stands for a kill -9: nothing of the library may catch it."""


def batches(recipe: Recipe, epochs: int = 3) -> list[list[int]]:
    """The rows of each forward pass over several epochs, as torch's random order for the seed gives them."""
    rows = len(PreparedData.load(recipe.data.path).train)
    size = recipe.training.micro_batch_size or recipe.training.batch_size
    found = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(recipe.training.seed + epoch)
        order = torch.randperm(rows, generator=generator).tolist()
        found += [order[start : start + size] for start in range(0, rows - size + 1, size)]
    return found


def poison(patch: Patch, recipe: Recipe, rows: list[int], amount: float) -> None:
    """Whenever one of `rows` is in a batch, `amount` joins the loss."""
    data = PreparedData.load(recipe.data.path).train
    bad = torch.tensor([data[row]["input_ids"] for row in rows])
    original = LanguageTrainer.compute_loss

    def poisoned(self: LanguageTrainer, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        found = (inputs["input_ids"][:, None] == bad).all(-1).any()
        return original(self, model, inputs, *args, **kwargs) + (amount if found else 0.0)

    patch.setattr(LanguageTrainer, "compute_loss", poisoned)


class Given(Sampler[int]):
    """Forward passes in a given order, `per_epoch` of them in each epoch."""

    def __init__(self, order: list[list[int]], per_epoch: int) -> None:
        self.order = order
        self.per_epoch = per_epoch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.per_epoch * len(self.order[0])

    def __iter__(self) -> Iterator[int]:
        for batch in self.order[self.epoch * self.per_epoch : (self.epoch + 1) * self.per_epoch]:
            yield from batch


def train_on(patch: Patch, recipe: Recipe, order: list[list[int]]) -> None:
    """Train on batches in an order that a test wrote down."""
    sampler = Given(order, len(batches(recipe, 1)))
    with patch.context() as inner:
        inner.setattr(LanguageTrainer, "_get_train_sampler", lambda *args: sampler)
        train(recipe, progress=False)


def without_seconds(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(run / "metrics.jsonl")]


def assert_same_run(one: Recipe, other: Recipe) -> None:
    assert (Path(one.out) / "model.safetensors").read_bytes() == (Path(other.out) / "model.safetensors").read_bytes()
    assert without_seconds(Path(one.out)) == without_seconds(Path(other.out))


def skipped(recipe: Recipe) -> list[list[int]]:
    return [skip["skipped_batches"] for skip in json.loads((Path(recipe.out) / "skips.json").read_text())]


def test_no_skips_leave_the_order_as_it_is(make_recipe: MakeRecipe, monkeypatch: Patch) -> None:
    given, plain = make_recipe("given"), make_recipe("plain")
    train_on(monkeypatch, given, batches(given))
    train(plain, progress=False)
    assert_same_run(given, plain)
    assert json.loads((Path(plain.out) / "summary.json").read_text())["skips"] == []
    assert not (Path(plain.out) / "skips.json").exists()


@pytest.mark.parametrize(
    ("bad", "left_out"),
    [
        ([6], [[5, 6]]),
        ([2], [[1, 2]]),
        ([8], [[5, 8]]),
        ([2, 6], [[1, 2], [1, 4]]),
        ([6, 9, 14], [[5, 6], [5, 7], [9, 9]]),
    ],
    ids=["middle", "before any checkpoint", "just before a checkpoint", "twice", "three times"],
)
def test_the_run_goes_on_as_if_the_batches_were_not_there(
    bad: list[int], left_out: list[list[int]], make_recipe: MakeRecipe, monkeypatch: Patch
) -> None:
    recipe = make_recipe("skipping", training__on_collapse="skip")
    order = batches(recipe)
    with monkeypatch.context() as patch:
        poison(patch, recipe, [order[batch - 1][1] for batch in bad], torch.nan)
        summary = train(recipe, progress=False)
    assert skipped(recipe) == left_out
    assert [skip["skipped_batches"] for skip in summary["skips"]] == [tuple(pair) for pair in left_out]
    for first, last in left_out:
        del order[first - 1 : last]
    by_hand = make_recipe("by hand")
    train_on(monkeypatch, by_hand, order)
    assert_same_run(recipe, by_hand)


def test_order_moves_forward_across_the_ends_of_epochs(make_recipe: MakeRecipe, monkeypatch: Patch) -> None:
    """With micro-batches, and an epoch whose last step has fewer of them than the others."""
    recipe = make_recipe("skipping", training__on_collapse="skip")
    passes = 4
    vars(recipe.training).update(batch_size=2 * passes, micro_batch_size=2)
    order = batches(recipe)
    per_epoch = len(batches(recipe, 1))
    steps = -(-per_epoch // passes)
    assert per_epoch % passes
    vars(recipe.training).update(tokens=(2 * steps + 4) * 2 * passes * 32, save_every=steps - 2)
    original = LanguageTrainer.training_step
    fired = []

    def once(self: LanguageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == steps + 1 and not fired:
            fired.append(True)
            raise self._collapse("the loss became nan")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageTrainer, "training_step", once)
        train(recipe, progress=False)
    # From the checkpoint two steps before the end of the first epoch to the second step of the second.
    assert skipped(recipe) == [[steps - 1, steps + 2]]
    del order[passes * (steps - 2) : per_epoch + 2 * passes]
    by_hand = make_recipe("by hand")
    vars(by_hand.training).update(vars(recipe.training))
    train_on(monkeypatch, by_hand, order)
    assert_same_run(recipe, by_hand)


def test_killed_anywhere_a_run_that_skips_ends_bit_identical(make_recipe: MakeRecipe, monkeypatch: Patch) -> None:
    whole = make_recipe("whole", training__on_collapse="skip")
    poison(monkeypatch, whole, [batches(whole)[5][0]], torch.nan)
    train(whole, progress=False)
    # Before the collapse and at it; after it, where calls 7 and 9 are steps 5 and 7; before the run goes back.
    for fatal in (5, 6, 7, 9, None):
        recipe = make_recipe(f"killed{fatal}", training__on_collapse="skip")
        with monkeypatch.context() as patch:
            _arm(patch, fatal)
            with pytest.raises(Killed):
                train(recipe, progress=False)
        train(recipe, progress=False)
        assert_same_run(recipe, whole)
        assert skipped(recipe) == skipped(whole) == [[5, 6]]


def _arm(patch: Patch, fatal: int | None) -> None:
    original = LanguageTrainer.training_step
    calls = []

    def dying(self: LanguageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == fatal:
            raise Killed
        return original(self, *args, **kwargs)

    def written(*args: Any) -> None:
        collapse.skip_batches(*args)
        raise Killed

    patch.setattr(LanguageTrainer, "training_step", dying)
    if fatal is None:
        patch.setattr("tokenformer.training.run.skip_batches", written)


def test_a_collapse_is_told(make_recipe: MakeRecipe, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(training__on_collapse="skip")
    poison(monkeypatch, recipe, [batches(recipe)[5][0]], torch.inf)
    started = time.perf_counter()
    summary = train(recipe, progress=True)
    told = [line for line in capsys.readouterr().err.splitlines() if "going back" in line]
    assert told == ["the loss became inf at step 6: going back to step 4 and on without batches 5 to 6 (skips.json)"]
    (skip,) = summary["skips"]
    assert 0 < skip.pop("lost_seconds") < time.perf_counter() - started - summary["seconds"]
    assert skip == {"step": 6, "what": "the loss became inf", "checkpoint": 4, "skipped_batches": (5, 6)}
    assert json.loads((Path(recipe.out) / "summary.json").read_text())["skips"][0]["skipped_batches"] == [5, 6]


def test_a_gradient_that_is_not_finite_is_skipped_too(make_recipe: MakeRecipe, monkeypatch: Patch) -> None:
    recipe = make_recipe(training__on_collapse="skip")
    step = LanguageTrainer.training_step
    fired = []

    def overflowing(self: LanguageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(self, *args, **kwargs)
        if self.state.global_step == 6 and not fired:
            fired.append(True)
            next(self.model.parameters()).grad.view(-1)[0] = torch.inf
        return loss

    monkeypatch.setattr(LanguageTrainer, "training_step", overflowing)
    (skip,) = train(recipe, progress=False)["skips"]
    assert (skip["what"], skip["skipped_batches"]) == ("the gradient norm became inf", (5, 7))


def test_a_run_that_stopped_over_a_collapse_goes_on_with_skip(make_recipe: MakeRecipe, monkeypatch: Patch) -> None:
    stopping, skipping = make_recipe(), make_recipe(training__on_collapse="skip")
    poison(monkeypatch, stopping, [batches(stopping)[5][0]], torch.nan)
    with pytest.raises(UserError, match=r"the loss became nan at step 6 .*training.on_collapse skip"):
        train(stopping, progress=False)
    train(skipping, progress=False)
    assert skipped(skipping) == [[5, 6]]


def test_skipping_that_does_not_help_ends(
    make_recipe: MakeRecipe, write_recipe: Callable[..., str], monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(training__on_collapse="skip")
    poison(monkeypatch, recipe, [row for batch in batches(recipe, 1)[5:] for row in batch], torch.nan)
    assert main(["train", write_recipe(recipe)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "the loss became nan at step 5" in line
    assert "and 2 skips did not get the run past this step: try a lower optimizer.learning_rate" in line
    assert not (Path(recipe.out) / "summary.json").exists()


def test_a_run_that_skips_without_end_ends(make_recipe: MakeRecipe, monkeypatch: Patch) -> None:
    recipe = make_recipe(training__on_collapse="skip", training__save_every=1, training__tokens=40 * 128)
    order = batches(recipe, 1)
    poison(monkeypatch, recipe, [order[batch][0] for batch in range(1, 8, 2)], torch.nan)
    monkeypatch.setattr(collapse, "_MOST_SKIPS", 3)
    with pytest.raises(UserError, match=r"the loss became nan at step 5 .*, after 3 skips: try a lower"):
        train(recipe, progress=False)


def test_a_rise_of_the_loss_is_a_collapse_and_is_skipped(make_recipe: MakeRecipe, monkeypatch: Patch) -> None:
    fields = {
        "training__tokens": 60 * 128,
        "training__save_every": 20,
        "training__collapse_rise": 1.0,
        "training__micro_batch_size": 2,
    }
    recipe = make_recipe("skipping", training__on_collapse="skip", **fields)
    order = batches(recipe)
    passes = 2
    # One of the two passes of the step carries the whole rise: what counts is the mean of both.
    recent = {row for batch in order[50 * passes : 55 * passes] for row in batch}
    row = next(row for row in order[56 * passes - 1] if row not in recent)
    poison(monkeypatch, recipe, [row], 4.0 * passes)
    with pytest.raises(UserError, match=r"the loss rose to \d\.\d+, [23]\.\d+ above its running mean, at step 56 with"):
        train(make_recipe("stopping", **fields), progress=False)
    train(make_recipe("patient", **fields | {"training__collapse_rise": 5.0}), progress=False)
    train(recipe, progress=False)
    assert skipped(recipe) == [[41, 56]]
    by_hand = make_recipe("by hand", **fields)
    train_on(monkeypatch, by_hand, order[: 40 * passes] + order[56 * passes :])
    assert_same_run(recipe, by_hand)


def test_the_running_mean_survives_a_kill_and_forgets_after_fifty_steps(
    make_recipe: MakeRecipe, monkeypatch: Patch
) -> None:
    fields = {"training__tokens": 60 * 128, "training__save_every": 20, "training__log_every": 1}
    whole = make_recipe("whole", training__collapse_rise=9.0, **fields)
    killed = make_recipe("killed", training__collapse_rise=9.0, **fields)
    train(whole, progress=False)
    with monkeypatch.context() as patch:
        original = LanguageTrainer.training_step

        def dying(self: LanguageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step == 55:
                raise Killed
            return original(self, *args, **kwargs)

        patch.setattr(LanguageTrainer, "training_step", dying)
        with pytest.raises(Killed):
            train(killed, progress=False)
    train(killed, progress=False)
    losses = [line["loss"] for line in read_metrics(Path(whole.out) / "metrics.jsonl") if "loss" in line]
    mean = sum(losses[:50]) / 50
    for loss in losses[50:]:
        mean = 0.98 * mean + 0.02 * loss
    for recipe in (whole, killed):
        state = json.loads((Path(recipe.out) / "checkpoints" / "checkpoint-60" / "trainer_state.json").read_text())
        kept = state["stateful_callbacks"]["LossRise"]["attributes"]
        assert kept["steps"] == 60
        assert kept["mean"] == pytest.approx(mean, rel=1e-6)
    assert_same_run(killed, whole)
