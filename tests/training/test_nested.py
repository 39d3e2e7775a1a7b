"""Nested training: which sizes are drawn, what they cost, and that a resumed run trains the same ones."""

import dataclasses
import json
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny import tiny_model
from tokenformer import TokenFormerForImageClassification, TokenFormerVisionConfig, UserError
from tokenformer.data import PreparedData
from tokenformer.elastic import prefix, shrink
from tokenformer.evaluation import evaluate_images, evaluate_perplexity
from tokenformer.images import open_images
from tokenformer.images.processing import load_processor
from tokenformer.models.cost import training_flops_per_image, training_flops_per_token
from tokenformer.models.loading import load_image_classifier, load_model
from tokenformer.plans import Plan, Stage, resolve
from tokenformer.plans.plan import Start
from tokenformer.plans.results import describe
from tokenformer.training import train
from tokenformer.training.image_recipe import ImageDataRecipe, ImageModelRecipe, ImageRecipe, ImageTrainingRecipe
from tokenformer.training.nested import Nesting
from tokenformer.training.recipe import ModelRecipe, TrainingRecipe
from tokenformer.training.run import open_task
from tokenformer.training.trainer import LanguageTrainer

SHARES = [0.25, 0.5, 1.0]


def nesting(draw="sizes", seed=0, shares=SHARES):
    return Nesting(tiny_model(), shares, draw, seed)


def test_each_size_once_in_a_block():
    drawn = [tuple(nesting().drawn(number).values()) for number in range(300)]
    sizes = {(3, 2, 5), (6, 5, 10), (12, 10, 20)}  # of 12, 10 and 20; halves go to the even number
    assert all(set(drawn[i : i + 3]) == sizes for i in range(0, 300, 3))
    assert len({tuple(drawn[i : i + 3]) for i in range(0, 300, 3)}) == 6  # all orders come


def test_draw_depends_on_seed_and_number_alone():
    forwards = [nesting().drawn(number) for number in range(50)]
    shared = nesting()
    assert [shared.drawn(number) for number in reversed(range(50))] == forwards[::-1]
    assert [nesting(seed=1).drawn(number) for number in range(50)] != forwards


def test_kinds_draw_apart():
    drawn = [nesting("kinds").drawn(number) for number in range(300)]
    for kind, sizes in (("qkv", (3, 6, 12)), ("output", (2, 5, 10)), ("ffn", (5, 10, 20))):
        assert Counter(sizes_of[kind] for sizes_of in drawn) == dict.fromkeys(sizes, 100)
    assert len({tuple(sizes.values()) for sizes in drawn}) == 27


def test_any_number_from_the_smallest_size_on():
    drawn = [nesting("any").drawn(number) for number in range(400)]
    assert {sizes["ffn"] for sizes in drawn} == set(range(5, 21))
    assert {sizes["output"] for sizes in drawn} == set(range(2, 11))


@pytest.mark.parametrize("draw", ["sizes", "kinds", "any"])
def test_cost_of_passes(draw):
    """Against the parameters of models of these sizes, counted by themselves."""
    nested = nesting(draw)
    full = tiny_model().num_token_parameters()
    left_out = 0
    for number in range(7):
        segment = {"name": "base", **nested.drawn(number)}
        assert nested.left_out_before(number) == left_out
        left_out += full - tiny_model(segments=[segment]).num_token_parameters()
    many = 3000
    assert nested.left_out_before(many) / many == pytest.approx(nested.mean_left_out(), rel=0.02)


def test_share_of_a_count_is_meant_as_written():
    assert nesting(shares=[0.15, 0.7, 1.0]).sizes(0.7) == {"qkv": 8, "output": 7, "ffn": 14}
    assert nesting(shares=[0.001, 1.0]).sizes(0.001) == {"qkv": 1, "output": 1, "ffn": 1}


def nested_recipe(make_recipe, out="run", **fields):
    """Two passes a step, of three sizes."""
    defaults = {"training__nested": list(SHARES), "training__micro_batch_size": 2, "training__compile": "off"}
    return make_recipe(out, **(defaults | fields))


@contextmanager
def watched(monkeypatch, fatal=None):
    """The tokens of a feed-forward that took part in each training pass; the process dies in pass number `fatal`."""
    seen, original = [], LanguageTrainer.compute_loss

    def compute_loss(self, model, *args, **kwargs):
        if len(seen) == fatal:
            raise Killed
        seen.append(len(model.model.layers[1].ffn.segments["base"](torch.zeros(1))[0]))
        return original(self, model, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageTrainer, "compute_loss", compute_loss)
        yield seen


class Killed(BaseException):
    pass


def test_a_killed_run_trains_the_same_sizes_and_ends_bit_identical(make_recipe, monkeypatch):
    whole, killed = nested_recipe(make_recipe, "whole"), nested_recipe(make_recipe, "killed")
    with watched(monkeypatch) as sizes:
        summary = train(whole, progress=False)
    nested = open_task(whole).nesting
    assert sizes == [nested.drawn(number)["ffn"] for number in range(24)]
    assert Counter(sizes) == {12: 8, 24: 8, 48: 8}
    with watched(monkeypatch, fatal=13), pytest.raises(Killed):  # in the seventh step, after the checkpoint at 4
        train(killed, progress=False)
    with watched(monkeypatch) as again:
        resumed = train(killed, progress=False)
    assert again == sizes[8:]
    one, other = (load_file(Path(recipe.out) / "model.safetensors") for recipe in (whole, killed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {k: v for k, v in summary.items() if "second" not in k and k != "mfu"} == {
        k: v for k, v in resumed.items() if "second" not in k and k != "mfu"
    }


def test_summary_counts_and_measures_every_size(make_recipe):
    recipe = nested_recipe(make_recipe, training__tokens=5 * 4 * 32, training__log_every=1)
    summary = train(recipe, progress=False)
    model = load_model(recipe.out)
    rows = PreparedData.load(recipe.data.path).held_out
    flops = []
    for share, sizes in {0.25: (4, 4, 12), 0.5: (8, 8, 24), 1.0: (16, 16, 48)}.items():
        named = dict(zip(("qkv", "output", "ffn"), sizes, strict=True))
        assert summary["nested"][f"{share:g}"] == named
        with prefix(model, **named):
            loss = evaluate_perplexity(model, rows, tokens_per_byte=1.0, batch_size=2)["loss"]
        assert summary["eval_loss" if share == 1 else f"eval_loss_at_{share:g}"] == pytest.approx(loss, abs=1e-6)
        shrunk = shrink(load_model(recipe.out), **named) if share < 1 else model
        flops.append(2 * 32 * training_flops_per_token(shrunk, 32))
    # Ten passes: three whole blocks, and one pass of the fourth.
    order = open_task(recipe).nesting
    last = {12: 0, 24: 1, 48: 2}[order.drawn(9)["ffn"]]
    assert summary["flops"] == 3 * sum(flops) + flops[last]
    lines = [json.loads(line) for line in (Path(recipe.out) / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert lines[-1]["flops"] == summary["flops"]
    places = [{12: 0, 24: 1, 48: 2}[order.drawn(number)["ffn"]] for number in range(2)]
    assert next(line for line in lines if line["step"] == 1)["flops"] == sum(flops[place] for place in places)


def test_tokens_beyond_the_prefix_are_not_trained(make_recipe):
    """The passes of a run without a whole size in them: one step of one pass, until the draw is the smallest."""
    seed = next(seed for seed in range(50) if nesting(seed=seed).drawn(0)["ffn"] == 5)
    recipe = nested_recipe(
        make_recipe,
        training__tokens=4 * 32,
        training__micro_batch_size=None,
        training__seed=seed,
        optimizer__weight_decay=0.0,
        optimizer__warmup=0.0,
    )
    before = open_task(recipe).model.state_dict()
    train(recipe, progress=False)
    after = load_file(Path(recipe.out) / "model.safetensors")
    for name, tensor in after.items():
        if name.endswith((".key", ".value")):
            count = len(tensor) // 4
            assert torch.equal(tensor[count:], before[name][count:])
            assert not torch.equal(tensor[:count], before[name][:count])


def test_image_classifiers_are_trained_and_measured_at_every_size(tmp_path):
    recipe = ImageRecipe(
        out=str(tmp_path / "run"),
        model=ImageModelRecipe(
            image_size=8,
            patch_size=4,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            qkv=8,
            output=8,
            ffn=8,
        ),
        data=ImageDataRecipe(train="digits", held_out_images=40),
        training=ImageTrainingRecipe(
            images=64, batch_size=16, threads=1, precision="fp32", compile="off", nested=[0.5, 1.0], ema=0.5
        ),
    )
    summary = train(recipe, progress=False)
    with torch.device("meta"):
        full, half = (training_flops_per_image(tiny_digits(tokens)) for tokens in (8, 4))
    assert summary["flops"] == 16 * 2 * (full + half)
    assert summary["eval_loss_at_0.5"] != summary["eval_loss"]
    model, images = load_image_classifier(recipe.out), open_images("digits").held_out
    with prefix(model, qkv=4, output=4, ffn=4):
        figures = evaluate_images(model, images, load_processor(recipe.out), limit=40)
    assert summary["eval_loss_at_0.5"] == pytest.approx(figures["loss"], abs=1e-5)


def tiny_digits(tokens):
    config = TokenFormerVisionConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=10,
        segments=[{"name": "base", "qkv": tokens, "output": tokens, "ffn": tokens}],
    )
    return TokenFormerForImageClassification(config)


@pytest.mark.slow  # compiles a model for two sizes
def test_a_compiled_run_follows_the_sizes(make_recipe):
    fields = {"training__nested": [0.5, 1.0], "training__tokens": 4 * 4 * 32}
    plain = train(nested_recipe(make_recipe, "plain", **fields), progress=False)
    compiled = train(nested_recipe(make_recipe, "compiled", **fields, training__compile="on"), progress=False)
    assert abs(plain["eval_loss_at_0.5"] - plain["eval_loss"]) > 2e-3
    assert compiled["eval_loss_at_0.5"] == pytest.approx(plain["eval_loss_at_0.5"], abs=1e-3)
    assert compiled["eval_loss"] == pytest.approx(plain["eval_loss"], abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"training__nested": [0.5]}, "the whole model"),
        ({"training__nested": [1.0]}, "whole model alone"),
        ({"training__nested": [0.0, 1.0]}, "between 0 and 1"),
        ({"training__nested": [0.5, 1.5, 1.0]}, "between 0 and 1"),
        ({"training__nested": [0.5, 0.5, 1.0]}, "different shares"),
        ({"training__nested": [], "training__nested_draw": "any"}, "needs training.nested"),
        ({"training__nested_draw": "kinds", "training__compile": "on"}, "training.compile on"),
        ({"training__nested": [i / 9 for i in range(1, 10)], "training__compile": "on"}, "8 sizes at most"),
        ({"model__family": "gpt_neox"}, "no parameter tokens"),
    ],
)
def test_what_cannot_be_nested(fields, words, make_recipe):
    recipe = nested_recipe(make_recipe, **fields)
    with pytest.raises(UserError, match=words):
        train(recipe, progress=False)
    assert not Path(recipe.out).exists()


def test_a_plan_counts_what_nested_stages_cost():
    """Four passes of three sizes cost 4/3 of the three together; FLOPs of all sizes trained apart buy as many steps."""
    segment = {"qkv": 12, "output": 12, "ffn": 24}
    plan = Plan(
        model=ModelRecipe(hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
        training=TrainingRecipe(batch_size=4),
        stages=[Stage(name="whole", train=Start(**segment), tokens=300 * 128)],
        baselines=[
            Stage(name="nested", train=Start(**segment), flops_of="whole", training={"nested": [0.25, 0.5, 1.0]}),
            Stage(name="half", train=Start(qkv=6, output=6, ffn=12), tokens=128),
            Stage(name="quarter", train=Start(qkv=3, output=3, ffn=6), tokens=128),
        ],
    )
    stages = resolve(plan, vocab_size=300, sequence_length=32)
    mean = sum(stages[name].counts.flops_per_row for name in ("whole", "half", "quarter")) / 3
    assert stages["nested"].counts.flops_per_row == pytest.approx(mean, abs=1)
    assert stages["nested"].steps == round(300 * stages["whole"].counts.flops_per_row / mean)
    assert "nested" not in describe(plan, stages["whole"])["training"]
    neox = Stage(name="neox", family="gpt_neox", train=Start(like="whole"), tokens=128, training={"nested": [0.5, 1.0]})
    with pytest.raises(UserError, match=r"stage 'neox': training.nested"):
        resolve(dataclasses.replace(plan, baselines=[neox]), vocab_size=300, sequence_length=32)
