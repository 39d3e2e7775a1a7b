"""What a recipe can do with a grown model (rates, annealed scale, part of a schedule), against loops by hand."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_

from tokenformer import Pattention, UserError
from tokenformer.data import PreparedData
from tokenformer.folders import whole_checkpoints
from tokenformer.growth import grow_folder
from tokenformer.models.loading import load_model
from tokenformer.training import Recipe, train
from tokenformer.training.callbacks import read_metrics
from tokenformer.training.trainer import LanguageTrainer, carried_state

MakeRecipe = Callable[..., Recipe]


class Killed(BaseException):
    """Stands for a kill -9: nothing of the library may catch it."""


@pytest.fixture
def grown(make_recipe: MakeRecipe, tmp_path: Path) -> str:
    """A model of two segments with the moments of the first; the new keys are random, so that all have gradients."""
    first = make_recipe("first", training__tokens=2 * 128)
    train(first, progress=False)
    folder = str(tmp_path / "grown")
    grow_folder(first.out, folder, qkv=32, output=32, ffn=80, keys="random", optimizer="carried")
    return folder


def cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """Learning rate of step `step`, counted from 0, as a share of the peak."""
    if step < warmup:
        return step / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def is_new(name: str) -> bool:
    return "grown1" in name


def parameters_by_hand(
    recipe: Recipe, *, share: float, anneal: float = 0.0, carried: bool = False
) -> dict[str, torch.Tensor]:
    """Plain AdamW with two learning rates over twelve steps, tau set before each; what the parameters end at."""
    data = PreparedData.load(recipe.data.path)
    model = load_model(str(recipe.model.path)).train()
    named = dict(model.named_parameters())
    new, old = ([p for name, p in named.items() if is_new(name) == which] for which in (True, False))
    norms = [p for name, p in named.items() if "norm" in name]
    old = [p for p in old if all(p is not norm for norm in norms)]
    optimizer = torch.optim.AdamW(
        [
            {"params": new, "share": 1.0},
            {"params": old, "share": share},
            {"params": norms, "share": share, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )
    if carried:
        for name, state in carried_state(Path(str(recipe.model.path))).items():
            optimizer.state[named[name]] = {key: value.clone() for key, value in state.items()}
    layers = [layer for layer in model.modules() if isinstance(layer, Pattention)]
    starts = [layer.scale.item() for layer in layers]
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(recipe.training.seed)).tolist()
    for step in range(12):
        for layer, start in zip(layers, starts, strict=True):
            way = min(1.0, step / (12 * anneal)) if anneal else 0.0
            layer.scale.fill_((1 - way) * start + way * math.sqrt(layer.num_tokens))
        rate = recipe.optimizer.learning_rate * cosine(step, 12, 1, 0.1)
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * rate
        ids = torch.tensor([data.train[row]["input_ids"] for row in order[4 * step : 4 * step + 4]])
        logits = model(ids).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in named.items()}


@pytest.mark.parametrize(
    ("share", "anneal", "carried"),
    [(0.1, 0.0, False), (3.0, 0.0, False), (0.25, 0.0, True), (1.0, 0.5, False), (0.5, 1.0, True)],
    ids=["slow", "fast", "slow and carried", "annealed", "all at once"],
)
def test_a_grown_model_trains_as_in_a_hand_written_loop(
    share: float, anneal: float, carried: bool, grown: str, make_recipe: MakeRecipe
) -> None:
    recipe = make_recipe(
        model__path=grown,
        optimizer__old_tokens=share,
        optimizer__anneal_scale=anneal,
        optimizer__state="carried" if carried else "fresh",
    )
    train(recipe, progress=False)
    trained = load_file(Path(recipe.out) / "model.safetensors")
    for name, expected in parameters_by_hand(recipe, share=share, anneal=anneal, carried=carried).items():
        torch.testing.assert_close(
            trained[name], expected, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    logged = [line["learning_rate"] for line in read_metrics(Path(recipe.out) / "metrics.jsonl") if "loss" in line]
    assert logged == pytest.approx([3e-3 * cosine(step, 12, 1, 0.1) for step in (1, 3, 5, 7, 9, 11)], rel=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_means_bitwise_unchanged(checkpointing: bool, grown: str, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        model__path=grown,
        optimizer__old_tokens=0.0,
        optimizer__state="carried",
        training__gradient_checkpointing=checkpointing,
    )
    train(recipe, progress=False)
    before, after = load_file(Path(grown) / "model.safetensors"), load_file(Path(recipe.out) / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) != is_new(name), name
    saved = torch.load(whole_checkpoints(Path(recipe.out))[-1] / "optimizer.pt", weights_only=True)
    held = [name for group in saved["param_groups"] for name in group["param_names"]]
    assert sorted(held) == sorted(name for name in before if is_new(name))


def test_training_all_alike_has_the_groups_that_older_checkpoints_have(grown: str, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(model__path=grown)
    train(recipe, progress=False)
    saved = torch.load(whole_checkpoints(Path(recipe.out))[-1] / "optimizer.pt", weights_only=True)
    assert [group["weight_decay"] for group in saved["param_groups"]] == [0.1, 0.0]
    names = [name for name, _ in load_model(grown).named_parameters()]
    assert saved["param_groups"][0]["param_names"] == [name for name in names if "norm" not in name]
    assert saved["param_groups"][1]["param_names"] == [name for name in names if "norm" in name]


@pytest.mark.parametrize(("share", "steps"), [(0.5, 6), (1.0, 12), (0.01, 0.12)])
def test_scale_on_its_way_is_in_the_checkpoints(
    share: float, steps: float, grown: str, make_recipe: MakeRecipe
) -> None:
    recipe = make_recipe(
        model__path=grown, optimizer__anneal_scale=share, training__save_every=1, training__keep_checkpoints=99
    )
    train(recipe, progress=False)
    name = "model.layers.1.ffn.scale"
    start, end = math.sqrt(48), math.sqrt(80)
    for checkpoint in whole_checkpoints(Path(recipe.out)):
        step = int(checkpoint.name.partition("-")[2])
        expected = start + (end - start) * min(1.0, step / steps)
        assert load_file(checkpoint / "model.safetensors")[name].item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(load_file(Path(recipe.out) / "model.safetensors")[name], torch.tensor(80.0).sqrt())
    assert torch.equal(load_model(recipe.out).model.layers[0].attention.query.scale, torch.tensor(32.0).sqrt())


def test_killed_while_all_of_it_is_under_way_the_run_ends_bit_identical(
    grown: str, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {
        "model__path": grown,
        "optimizer__anneal_scale": 0.8,
        "optimizer__old_tokens": 0.1,
        "optimizer__state": "carried",
        "optimizer__schedule_from": 0.3,
        "optimizer__schedule_to": 0.7,
    }
    whole, killed = make_recipe("whole", **fields), make_recipe("killed", **fields)
    train(whole, progress=False)
    original = LanguageTrainer.training_step
    for fatal in (2, 6, 11):

        def dying(self: LanguageTrainer, *args: Any, fatal: int = fatal, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step == fatal:
                raise Killed
            return original(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(LanguageTrainer, "training_step", dying)
            with pytest.raises(Killed):
                train(killed, progress=False)
    train(killed, progress=False)
    one, other = (Path(recipe.out) / "model.safetensors" for recipe in (whole, killed))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(("schedule", "warmup"), [("cosine", 0.1), ("cosine", 0.4), ("constant", 0.3)])
def test_three_runs_share_one_schedule(schedule: str, warmup: float, make_recipe: MakeRecipe) -> None:
    rates = []
    for number, (first, last) in enumerate([(0, 5), (5, 13), (13, 20)]):
        recipe = make_recipe(
            f"part{number}",
            training__tokens=(last - first) * 128,
            training__log_every=1,
            optimizer__schedule=schedule,
            optimizer__warmup=warmup,
            optimizer__schedule_from=first / 20,
            optimizer__schedule_to=last / 20,
        )
        train(recipe, progress=False)
        lines = read_metrics(Path(recipe.out) / "metrics.jsonl")
        rates += [line["learning_rate"] for line in lines if "loss" in line]
    floor = 0.1 if schedule == "cosine" else 1.0
    expected = [3e-3 * cosine(step, 20, round(warmup * 20), floor) for step in range(20)]
    assert rates == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.slow
def test_compiled_training_sees_the_scale_move(grown: str, make_recipe: MakeRecipe) -> None:
    fields: dict[str, Any] = {"model__path": grown, "optimizer__anneal_scale": 0.9, "optimizer__old_tokens": 0.0}
    eager = train(make_recipe("eager", training__compile="off", **fields), progress=False)
    compiled = train(make_recipe("compiled", training__compile="on", **fields), progress=False)
    assert compiled["compile_seconds"] > 0
    assert compiled["eval_loss"] == pytest.approx(eager["eval_loss"], rel=1e-5)


def test_old_tokens_of_a_model_that_was_not_grown(make_recipe: MakeRecipe) -> None:
    first = make_recipe("first", training__tokens=128)
    train(first, progress=False)
    second = make_recipe("second", model__path=first.out, optimizer__old_tokens=0.5)
    with pytest.raises(UserError, match=r"optimizer.old_tokens: the model in model.path was not grown"):
        train(second, progress=False)
    assert not Path(second.out).exists()


def test_a_run_from_before_these_fields_is_the_same_run(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    summary = train(recipe, progress=False)
    file = Path(recipe.out) / "recipe.yaml"
    names = ("old_tokens", "anneal_scale", "schedule_from", "schedule_to", "on_collapse", "collapse_rise")
    lines = file.read_text().splitlines()
    older = [line for line in lines if line.split(":")[0].strip() not in names]
    assert len(older) == len(lines) - len(names)
    file.write_text("\n".join(older) + "\n")
    assert train(recipe, progress=False) == summary
    changed = make_recipe(training__collapse_rise=2.0)
    with pytest.raises(UserError, match=r"training.collapse_rise is 0.0 there and 2.0 here"):
        train(changed, progress=False)
