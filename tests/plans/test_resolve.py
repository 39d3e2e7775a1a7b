"""What a plan comes to, against sums by hand; and every plan that cannot be carried out."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from tokenformer.errors import UserError
from tokenformer.plans import Plan, Stage, resolve, resolve_with_data
from tokenformer.plans.plan import Growth, Start
from tokenformer.plans.results import describe, difference
from tokenformer.training.recipe import ModelRecipe, OptimizerRecipe

MakePlan = Callable[..., Plan]
STEP = 4 * 32
VOCABULARY = 320  # 300 rounded up to a multiple of 64


def solve(plan: Plan) -> Any:
    return resolve(plan, vocab_size=300, sequence_length=32)


def tokenformer_parameters(qkv: int, output: int, ffn: int, width: int = 32, layers: int = 2) -> int:
    """PAPER: 2 L d (3 n_qkv + n_o + n_ffn), and the final norm."""
    return 2 * layers * width * (3 * qkv + output + ffn) + 2 * width


def flops(matrices: int, width: int = 32, layers: int = 2, context: int = 32) -> int:
    """Forward and backward of Table 3: 2 per weight, the output embedding too, and 4 L d T."""
    return 3 * (2 * (matrices + VOCABULARY * width) + 4 * layers * width * context)


def test_sizes_and_costs_by_hand(make_plan: MakePlan) -> None:
    base, grown = (solve(make_plan())[name] for name in ("base", "grown"))
    assert base.counts.non_embedding_parameters == tokenformer_parameters(16, 16, 48)
    assert grown.counts.non_embedding_parameters == tokenformer_parameters(24, 24, 64)
    assert grown.counts.parameters == tokenformer_parameters(24, 24, 64) + VOCABULARY * 32
    assert (base.steps, base.tokens) == (6, 6 * STEP)
    base_cost = 6 * STEP * flops(tokenformer_parameters(16, 16, 48) - 64)
    grown_cost = 4 * STEP * flops(tokenformer_parameters(24, 24, 64) - 64)
    assert (base.flops, grown.flops) == (base_cost, grown_cost)
    assert grown.cumulative_flops == base_cost + grown_cost
    assert grown.cumulative_tokens == 10 * STEP
    assert grown.chain == ("base", "grown")


def test_a_budget_of_flops_is_met_to_half_a_step(make_plan: MakePlan) -> None:
    resolved = solve(make_plan())
    for name, times in (("scratch", 1), ("transformer", 2)):
        stage = resolved[name]
        wanted = times * resolved["grown"].cumulative_flops
        assert abs(stage.cumulative_flops - wanted) <= 0.51 * STEP * stage.flops / stage.tokens


def test_a_budget_of_flops_counts_the_stages_before(make_plan: MakePlan) -> None:
    again = Stage(name="again", after="base", grow=Growth(like="grown"), flops_of="grown")
    resolved = solve(make_plan(baselines=[again]))
    assert resolved["again"].steps == resolved["grown"].steps
    assert resolved["again"].config.segments == resolved["grown"].config.segments


def test_a_stage_goes_on_behind_the_rows_that_were_read(make_plan: MakePlan) -> None:
    last = Stage(name="last", after="grown", tokens=STEP)
    elsewhere = Stage(name="elsewhere", after="grown", tokens=STEP, data="other")
    back = Stage(name="back", after="elsewhere", tokens=STEP)
    resolved = solve(make_plan(baselines=[last, elsewhere, back]))
    rows = {name: stage.rows_before for name, stage in resolved.items()}
    assert rows == {"base": 0, "grown": 24, "last": 40, "elsewhere": 0, "back": 40}


def test_the_transformer_has_as_many_parameters(make_plan: MakePlan) -> None:
    resolved = solve(make_plan())
    config = resolved["transformer"].config
    width, ffn = config.hidden_size, config.intermediate_size
    by_hand = 2 * (4 * width * width + 4 * width + 2 * width * ffn + width + ffn + 4 * width) + 2 * width
    assert resolved["transformer"].counts.non_embedding_parameters == by_hand
    assert by_hand == pytest.approx(resolved["grown"].counts.non_embedding_parameters, rel=0.02)


@pytest.mark.parametrize("method", ["net2net", "hypercloning", "width"])
def test_a_transformer_grows_to_the_size_of_a_tokenformer(make_plan: MakePlan, method: Any) -> None:
    small = Stage(name="small", family="gpt_neox", train=Start(like="base"), tokens=STEP)
    wide = Stage(name="wide", after="small", grow=Growth(like="large", method=method), tokens=STEP)
    stages = [
        Stage(name="base", train=Start(qkv=16, output=16, ffn=64), tokens=STEP),
        Stage(name="large", grow=Growth(qkv=64, output=64, ffn=256), tokens=STEP),
    ]
    resolved = solve(make_plan(stages=stages, baselines=[small, wide]))
    before, after = resolved["small"].config, resolved["wide"].config
    assert after.hidden_size % before.hidden_size == 0
    assert after.hidden_size // after.num_attention_heads == before.hidden_size // before.num_attention_heads
    assert after.intermediate_size >= before.intermediate_size
    assert resolved["wide"].counts.non_embedding_parameters == pytest.approx(
        resolved["large"].counts.non_embedding_parameters, rel=0.02
    )


def test_stages_override_the_plan(make_plan: MakePlan) -> None:
    plan = make_plan(optimizer=OptimizerRecipe(warmup=0.1, weight_decay=0.2))
    plan.stages[1].optimizer = {"weight_decay": 0.3}
    plan.stages[1].training = {"batch_size": 2}
    plan.stages[1].schedule = "constant"
    assert plan.stages[1].grow is not None
    plan.stages[1].grow = dataclasses.replace(
        plan.stages[1].grow, scale="anneal", anneal=0.25, old_tokens=0.1, optimizer="carried"
    )
    resolved = solve(plan)
    base, grown = resolved["base"], resolved["grown"]
    assert (base.optimizer.weight_decay, base.optimizer.schedule, base.training.batch_size) == (0.2, "cosine", 4)
    assert (base.optimizer.state, base.optimizer.old_tokens, base.optimizer.anneal_scale) == ("fresh", 1.0, 0.0)
    assert (grown.optimizer.weight_decay, grown.optimizer.schedule, grown.training.batch_size) == (0.3, "constant", 2)
    assert grown.optimizer.warmup == 0.1
    assert (grown.optimizer.state, grown.optimizer.old_tokens, grown.optimizer.anneal_scale) == ("carried", 0.1, 0.25)
    assert grown.steps == 8


def test_a_continued_schedule_is_shared(make_plan: MakePlan) -> None:
    plan = make_plan()
    plan.stages[1].schedule = "continue"
    resolved = solve(plan)
    spans = [(resolved[n].optimizer.schedule_from, resolved[n].optimizer.schedule_to) for n in ("base", "grown")]
    assert spans == [(0.0, 0.6), (0.6, 1.0)]
    alone = resolved["scratch"].optimizer
    assert (alone.schedule_from, alone.schedule_to) == (0.0, 1.0)


def test_stages_that_take_equally_long_continue_one_schedule(make_plan: MakePlan) -> None:
    twin = Stage(name="twin", after="base", tokens=4 * STEP, schedule="continue")
    last = Stage(name="last", after="twin", tokens=10 * STEP)
    plan = make_plan(baselines=[twin, last])
    plan.stages[1].schedule = "continue"
    resolved = solve(plan)
    spans = {name: (one.optimizer.schedule_from, one.optimizer.schedule_to) for name, one in resolved.items()}
    assert spans == {"base": (0.0, 0.6), "grown": (0.6, 1.0), "twin": (0.6, 1.0), "last": (0.0, 1.0)}


@pytest.mark.parametrize(
    ("schedule", "tokens", "names"), [("restart", 4, "'grown'.*'other'"), ("continue", 5, "'other'.*'grown'")]
)
def test_a_schedule_cannot_be_left_unfinished_for_stages_that_differ(
    make_plan: MakePlan, schedule: Any, tokens: int, names: str
) -> None:
    other = Stage(name="other", after="base", grow=Growth(like="grown"), tokens=tokens * STEP, schedule=schedule)
    plan = make_plan(baselines=[other])
    plan.stages[1].schedule = "continue"
    with pytest.raises(
        UserError, match=rf"stage {names[:7]}.*'base' cannot leave its schedule unfinished.*{names[9:]}"
    ):
        solve(plan)


def stage(**fields: Any) -> Stage:
    return Stage(**({"name": "new", "tokens": STEP} | fields))


# What is added to the baselines, and the words of the message that name stage, cause and fix.
BAD_STAGES: dict[str, tuple[Stage, str]] = {
    "no beginning": (stage(), r"stage 'new': it comes after no stage.*train"),
    "unknown stage before": (stage(after="nowhere"), r"stage 'new': after: there is no stage 'nowhere'"),
    "two beginnings": (stage(after="base", train=Start(qkv=4)), r"stage 'new': it goes on from 'base'.*grow"),
    "after itself": (stage(after="new"), r"stage 'new' comes after itself"),
    "shrinks": (stage(after="grown", grow=Growth(qkv=20)), r"'new': grow.qkv: 20 is fewer than the 24.*cannot shrink"),
    "does not grow": (stage(after="base", grow=Growth(qkv=16)), r"stage 'new': grow: nothing grows"),
    "grows nothing": (stage(after="base", grow=Growth()), r"stage 'new': grow: nothing grows; give qkv"),
    "no budget": (stage(tokens=None, after="base"), r"stage 'new': give its budget as tokens or as flops_of"),
    "two budgets": (stage(flops_of="base", after="base"), r"stage 'new': give its budget as tokens or as flops_of"),
    "below one step": (stage(tokens=STEP - 1, after="base"), r"'new': its budget of 127 tokens is below one step \(4"),
    "flops below one step": (
        stage(tokens=None, flops_of="base", after="base"),
        r"stage 'new': its budget of 0 tokens is below one step",
    ),
    "flops already spent": (
        stage(tokens=None, flops_of="base", flops_times=0.5, after="base"),
        r"stage 'new': its budget of -\d+ tokens is below one step",
    ),
    "no rate": (stage(after="base", learning_rate=[]), r"stage 'new': learning_rate"),
    "negative rate": (stage(after="base", learning_rate=[1e-3, -1.0]), r"stage 'new': learning_rate"),
    "rate twice": (stage(after="base", learning_rate=[1e-3, 1e-3]), r"stage 'new': learning_rate"),
    "seeds that are not there": (stage(after="base", seeds=[7]), r"stage 'new': seeds: \[7\].*'base'"),
    "other family": (stage(after="base", family="gpt_neox"), r"stage 'new': family: tokenformer.*gpt_neox"),
    "tokens of a transformer": (
        stage(after="transformer", grow=Growth(qkv=64)),
        r"stage 'new': grow.qkv: a Transformer has no parameter tokens",
    ),
    "width not a multiple": (
        stage(after="transformer", grow=Growth(hidden_size=41)),
        r"stage 'new': grow.hidden_size 41 is not a whole multiple",
    ),
    "ffn shrinks": (
        stage(after="transformer", grow=Growth(intermediate_size=2)),
        r"stage 'new': grow.intermediate_size 2 is fewer.*cannot shrink",
    ),
    "cannot be widened so": (
        stage(after="transformer", grow=Growth(like="base")),
        r"stage 'new': a Transformer of width \d+.*cannot be widened to the \d+ parameters of 'base'",
    ),
    "cannot match": (
        stage(family="gpt_neox", train=Start(like="base", hidden_size=512)),
        r"stage 'new': .*(parameters|match)",
    ),
    "size of a transformer": (
        stage(train=Start(like="transformer")),
        r"stage 'new': train.like: 'transformer' is a Transformer",
    ),
    "size of nothing": (stage(train=Start(like="nothing")), r"stage 'new': there is no stage 'nothing'"),
    "continues nothing": (stage(train=Start(qkv=4), schedule="continue"), r"stage 'new': schedule: nothing comes"),
    "unknown optimizer field": (stage(after="base", optimizer={"lr": 1}), r"stage 'new': optimizer.lr: not a field"),
    "stage's own field": (stage(after="base", training={"seed": 1}), r"stage 'new': training.seed: not a field"),
    "anneals over nothing": (stage(after="base", grow=Growth(qkv=32, anneal=0.0)), r"'new': grow.anneal"),
    "negative noise": (stage(after="base", grow=Growth(qkv=32, noise=-1.0)), r"'new': grow.noise"),
    "noise on random weights": (
        stage(after="transformer", grow=Growth(hidden_size=80, method="width", noise=0.1)),
        r"stage 'new': grow.noise",
    ),
    "norms of images": (
        stage(train=Start(like="base", norm_affine=True)),
        r"stage 'new': train.norm_affine: no model of a plan in tokens has it",
    ),
    "unknown normalization": (
        stage(train=Start(like="base", normalization="l3")),
        r"stage 'new': unknown normalization 'l3'.*gelu_l1",
    ),
    "heads that do not divide": (stage(train=Start(qkv=4, num_attention_heads=5)), r"stage 'new': hidden_size 32"),
}


@pytest.mark.parametrize("case", BAD_STAGES)
def test_a_stage_that_cannot_be_is_named(make_plan: MakePlan, case: str) -> None:
    bad, message = BAD_STAGES[case]
    plan = make_plan()
    with pytest.raises(UserError, match=message):
        solve(dataclasses.replace(plan, baselines=[*plan.baselines, bad]))


def test_sizes_that_wait_for_each_other(make_plan: MakePlan) -> None:
    one, two = stage(name="one", train=Start(like="two")), stage(name="two", train=Start(like="one"))
    with pytest.raises(UserError, match=r"its size depends on itself: .*one -> two -> one"):
        solve(make_plan(baselines=[one, two]))


def test_budgets_that_wait_for_each_other(make_plan: MakePlan) -> None:
    one = stage(name="one", train=Start(qkv=4), tokens=None, flops_of="two")
    two = stage(name="two", train=Start(qkv=4), tokens=None, flops_of="one")
    with pytest.raises(UserError, match=r"its budget depends on itself"):
        solve(make_plan(baselines=[one, two]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": []}, "stages: a plan has at least one"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
    ],
)
def test_a_plan_that_cannot_be(make_plan: MakePlan, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        solve(make_plan(**fields))


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "a b"])
def test_a_name_that_is_no_folder(make_plan: MakePlan, name: str) -> None:
    with pytest.raises(UserError, match="a name is made of"):
        solve(make_plan(stages=[stage(name=name, train=Start(qkv=4))]))


def test_a_name_that_stands_twice(make_plan: MakePlan) -> None:
    with pytest.raises(UserError, match="stage 'base': the name stands twice"):
        solve(make_plan(baselines=[stage(name="base", train=Start(qkv=4))]))


def test_presets_are_the_papers(make_plan: MakePlan) -> None:
    plan = make_plan(
        model=ModelRecipe(preset="124M"),
        stages=[
            stage(name="base", train=Start(), tokens=10_000),
            stage(name="grown", grow=Growth(qkv=2140, output=2140, ffn=8560), tokens=10_000),
        ],
        baselines=[],
    )
    resolved = resolve(plan, vocab_size=50304, sequence_length=1024)
    assert resolved["base"].counts.non_embedding_parameters == tokenformer_parameters(576, 576, 2304, 768, 12)
    assert resolved["grown"].counts.non_embedding_parameters == tokenformer_parameters(2140, 2140, 8560, 768, 12)
    with pytest.raises(UserError, match="packed to 2048 tokens, the model takes 1024"):
        resolve(plan, vocab_size=50304, sequence_length=2048)


def test_yaml_there_and_back(make_plan: MakePlan) -> None:
    plan = make_plan(seeds=[3, 4])
    assert Plan.from_yaml(plan.to_yaml()) == plan


# What version 0.1.0 wrote into stages.json, before there were plans for images.
WRITTEN = """
{"label": "grown", "family": "tokenformer", "after": "base", "chain": ["base", "grown"], "baseline": false,
 "grow": {"like": null, "qkv": 24, "output": 24, "ffn": 64, "keys": "zero", "scale": "keep", "anneal": 0.5,
          "noise": 0.0, "old_tokens": 1.0, "optimizer": "fresh", "method": "hypercloning", "hidden_size": null,
          "intermediate_size": null},
 "schedule": "restart",
 "model": {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
           "segments": [{"name": "base", "qkv": 16, "output": 16, "ffn": 48},
                        {"name": "grown1", "qkv": 8, "output": 8, "ffn": 16}],
           "value_initializer_range": null},
 "parameters": 30784, "non_embedding_parameters": 20544, "tokens": 512, "steps": 4, "sequence_length": 32,
 "flops_per_token": 208896, "flops": 106954752, "cumulative_tokens": 1280, "cumulative_flops": 239075328,
 "data": "data/words", "held_out_rows": 8, "rows_before": 24,
 "optimizer": {"schedule": "cosine", "warmup": 0.1, "min_ratio": 0.1, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95,
               "max_grad_norm": 1.0, "state": "fresh", "old_tokens": 1.0, "anneal_scale": 0.0, "schedule_from": 0.0,
               "schedule_to": 1.0},
 "training": {"tokens": 512, "batch_size": 4, "micro_batch_size": null, "precision": "fp32", "compile": "off",
              "gradient_checkpointing": false, "eval_every": 3, "save_every": 2, "log_every": 1, "keep_checkpoints": 2,
              "seed": 0, "threads": 1, "on_collapse": "stop", "collapse_rise": 0.0}}
"""


def test_a_run_that_an_earlier_version_began_goes_on(make_plan: MakePlan) -> None:
    plan = make_plan()
    now = describe(plan, solve(plan)["grown"])
    assert difference(json.loads(WRITTEN), now) is None
    assert difference(json.loads(WRITTEN.replace('"tokens": 512', '"tokens": 640')), now) is not None


def test_another_normalization_is_another_plan(make_plan: MakePlan) -> None:
    plan = make_plan()
    before = describe(plan, solve(plan)["grown"])
    plan.model.normalization = "softmax"
    said = difference(before, describe(plan, solve(plan)["grown"]))
    assert said == "model.normalization is None there and softmax here"


def test_images_are_no_budget_for_language(make_plan: MakePlan) -> None:
    bad = stage(tokens=None, images=8, after="base")
    with pytest.raises(UserError, match=r"stage 'new': images: the budgets of this plan are tokens"):
        solve(make_plan(baselines=[bad]))
    with pytest.raises(
        UserError, match=r"stage 'new': family: vit is not of this kind of plan; use tokenformer or gpt"
    ):
        solve(make_plan(baselines=[stage(family="vit", train=Start(qkv=4))]))
    with pytest.raises(UserError, match=r"model.path: a plan begins with new models; leave out runs/other"):
        solve(make_plan(model=ModelRecipe(path="runs/other")))


def test_settings_that_no_run_can_have_are_named_with_their_stage(make_plan: MakePlan) -> None:
    late = stage(after="grown", optimizer={"warmup": 2.0})
    with pytest.raises(UserError, match=r"stage 'new': optimizer.warmup must lie between 0 and 1, got 2.0"):
        resolve_with_data(make_plan(baselines=[late]))
