"""The plan of a run on many processes, against what one of them is seen to hold and to send."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tokenformer import TokenFormerConfig
from tokenformer.cli import main
from tokenformer.models.cost import training_flops_per_token
from tokenformer.parallel.mesh import Layout
from tokenformer.plans.estimate import training_memory
from tokenformer.plans.scale import Machines, Shape, plan_scale, rank_memory, step_time, step_traffic
from tokenformer.training.recipe import ModelRecipe, ParallelRecipe, Recipe, TrainingRecipe

ROOT = Path(__file__).parents[2]
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "segments": [{"name": "base", "qkv": 256, "output": 192, "ffn": 1024}],
}
LAYOUTS: list[tuple[tuple[int, int, int], str, tuple[str, ...]]] = [
    ((1, 1, 1), "bf16", ()),
    ((1, 2, 1), "fp32", ()),
    ((1, 4, 1), "bf16", ()),
    ((4, 1, 1), "bf16", ()),
    ((1, 1, 4), "bf16", ()),
    ((1, 1, 2), "fp32", ()),
    ((2, 2, 2), "fp32", ()),
    ((1, 4, 2), "bf16", ()),
    ((1, 4, 1), "fp32", ("gradient_checkpointing",)),
    ((1, 4, 1), "bf16", ("gradient_checkpointing",)),
    ((1, 4, 1), "bf16", ("recompute",)),
    ((2, 1, 2), "fp32", ("recompute",)),
    ((1, 2, 2), "bf16", ("recompute", "fused_loss")),
    ((1, 4, 1), "fp32", ("fused_loss",)),
    ((2, 2, 1), "bf16", ("gradient_checkpointing", "recompute", "fused_loss")),
]


def shape_of(precision: str, saving: tuple[str, ...] = (), rows: int = 4, batch_size: int = 16) -> Shape:
    config = TokenFormerConfig(**SIZES)
    return Shape(config, rows, 128, batch_size, precision, **dict.fromkeys(saving, True))


@pytest.fixture(scope="module")
def measured() -> dict[Any, dict[str, Any]]:
    cases = [
        {"layout": layout, "precision": precision, "saving": saving, "config": SIZES, "rows": 4, "length": 128}
        for layout, precision, saving in LAYOUTS
    ]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("scale_measuring.py")],
        input="".join(json.dumps(case) + "\n" for case in cases),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(LAYOUTS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_memory_is_what_a_process_holds_at_its_peak(case: Any, measured: dict[Any, dict[str, Any]]) -> None:
    layout, precision, saving = case
    planned = sum(rank_memory(shape_of(precision, saving), Layout(*layout)).values())
    assert planned == pytest.approx(measured[case]["peak"], rel=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_traffic_is_what_a_process_sends(case: Any, measured: dict[Any, dict[str, Any]]) -> None:
    layout, precision, saving = case
    shape = shape_of(precision, saving)
    sent = measured[case]["sent"]
    # One micro-batch was measured.
    planned = {
        name: size * 4 * layout[0] * layout[1] / 16 for name, size in step_traffic(shape, Layout(*layout)).items()
    }
    assert planned["gather"] == pytest.approx(sent.get("gather", 0), rel=0.02)
    assert planned["reduce"] == pytest.approx(sent.get("reduce_scatter", 0), rel=0.02)
    summed = sent.get("all_reduce", 0) + sent.get("allreduce", 0)
    # The numbers of the norms, a hundredth here, are summed where the counting does not see them.
    assert planned["tensor"] + planned["replicate"] == pytest.approx(summed, rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("saving", [(), ("gradient_checkpointing",), ("recompute", "fused_loss")], ids=str)
def test_one_process_is_the_plan_of_one_device(precision: str, saving: tuple[str, ...]) -> None:
    shape = shape_of(precision, saving)
    model = AutoModelForCausalLM.from_config(shape.config)
    assert shape.parameters == model.num_parameters()
    assert shape.flops_per_token == training_flops_per_token(model, 128)
    alone = training_memory(
        shape.config,
        parameters=shape.parameters,
        non_embedding_parameters=shape.parameters - shape.config.vocab_size * shape.config.hidden_size,
        rows=4,
        sequence_length=128,
        precision=precision,
        **dict.fromkeys(saving, True),
    )
    memory = rank_memory(shape, Layout())
    assert sum(memory.values()) == pytest.approx(alone.total, rel=1e-3)
    assert sum(step_traffic(shape, Layout()).values()) == 0


def test_time_by_hand() -> None:
    """Two machines of four: tensor inside, shard between; compute and tensor wait for each other, shard does not."""
    shape = shape_of("bf16", rows=4, batch_size=16)
    layout = Layout(data=1, shard=4, tensor=2)
    machines = Machines(gpu="a100", per_node=4, mfu=0.5, inside=100, between=10)
    traffic = step_traffic(shape, layout)
    time = step_time(shape, layout, machines)
    flops = 16 * 128 * shape.flops_per_token
    assert time["compute"] == pytest.approx(flops / (8 * 312e12 * 0.5))
    assert time["tensor"] == pytest.approx(traffic["tensor"] / 100e9)
    assert time["shard"] == pytest.approx((traffic["gather"] + traffic["reduce"]) / 10e9)
    assert time["step"] == pytest.approx(max(time["compute"] + time["tensor"], time["shard"]))
    assert time["mfu"] == pytest.approx(flops / (time["step"] * 8 * 312e12))
    faster = step_time(shape, layout, Machines(gpu="a100", per_node=4, mfu=0.5, inside=1e9, between=1e9))
    assert faster["mfu"] == pytest.approx(0.5, rel=1e-3)  # nothing sent in no time


def recipe(**parallel: int) -> Recipe:
    return Recipe(
        model=ModelRecipe(preset="1.5B"),
        training=TrainingRecipe(batch_size=1024, micro_batch_size=2, precision="bf16", tokens=10**9),
        parallel=ParallelRecipe(**parallel),
    )


def test_every_layout_of_a_number_of_processes_is_tried() -> None:
    plan = plan_scale(recipe(), processes=16)
    layouts = [(one["data"], one["shard"], one["tensor"]) for one in plan["layouts"]]
    assert len(set(layouts)) == len(layouts) == 14  # 15 ways to write 16 as a product of three, but tensor 16
    assert all(d * s * t == 16 and t <= 8 for d, s, t in layouts)
    fits = [one["fits"] for one in plan["layouts"]]
    assert fits == sorted(fits, reverse=True)
    steps = [one["time"]["step"] for one in plan["layouts"] if one["fits"]]
    assert steps == sorted(steps)


def test_sharing_takes_memory_from_each() -> None:
    totals = [plan_scale(recipe(shard=s))["layouts"][0]["memory"]["total"] for s in (1, 2, 8, 64)]
    assert totals == sorted(totals, reverse=True)
    assert plan_scale(recipe(), Machines(memory=10))["layouts"][0]["fits"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "abacus"], "unknown accelerator 'abacus'"),
        (["--mfu", "2"], "mfu must lie in (0, 1]"),
        (["--per-node", "0"], "per_node must be positive"),
        (["--processes", "0"], "processes must be at least 1"),
        (["--parallel.shard", "3"], "training.batch_size 16 is not a multiple"),
        (["--processes", "512"], "no layout of 512 processes divides training.batch_size 16"),
        (["--model.path", "somewhere"], "not model.path"),
        (["--model.family", "gpt_neox"], "another family"),
        (["--vocab-size", "0"], "at least 1"),
        (["nothing.yaml"], "recipe nothing.yaml not found"),
    ],
)
def test_what_cannot_be_planned(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan-scale", *words]) == 2
    assert message in capsys.readouterr().err


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published = str(ROOT / "recipes/language/pile-1.5B.yaml")
    assert main(["plan-scale", published, "--processes", "8", "--json", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert len(plan["layouts"]) == 10
    assert "1.5" in shown
    assert shown.splitlines()[4].split()[-1] == "yes"  # the first is the best
    assert main(["plan-scale", published, "--parallel.shard", "8", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["layouts"][0]["shard"] == 8
