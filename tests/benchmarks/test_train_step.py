"""Training steps: the limit's FLOPs, memory by hand, refused results, variants, the record, the command."""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tiny import tiny_config, tiny_ids
from tokenformer import UserError
from tokenformer import pattention as layers
from tokenformer.benchmarks import memory
from tokenformer.benchmarks import train_step as bench
from tokenformer.benchmarks.models import build_models
from tokenformer.benchmarks.training import TrainingStep, new_optimizer
from tokenformer.cli import main
from tokenformer.hardware import versions
from tokenformer.models.cost import training_flops_per_token

# 2 layers of 2 * 32 * (4 * 24 + 102) = 12672 parameters, beside a layer of GPTNeoX with 12704
CONFIG = tiny_config(segments=[{"name": "base", "qkv": 24, "output": 24, "ffn": 102}])
SMALL = {"batch": 2, "length": 9, "threads": 1, "repeats": 2, "compiler": "eager"}
CPU = torch.device("cpu")
EAGER = ("tokenformer_eager", "gpt_neox_eager", "products")


@pytest.fixture(scope="module")
def record():
    return bench.measure(CONFIG, **SMALL)


@pytest.fixture
def step():
    model = build_models(CONFIG, torch.float32)["tokenformer"].train()
    return TrainingStep(model, new_optimizer(model), tiny_ids(2, 9), torch.float32)


# The limit


def test_products_are_those_of_a_step(step):
    products = bench.Products(step.model, 18, torch.float32)
    with FlopCounterMode(display=False) as counter:
        products()
    assert counter.get_total_flops() == 18 * training_flops_per_token(step.model, 0)


def test_products_leave_the_model_alone(step):
    before = [p.detach().clone() for p in step.model.parameters()]
    bench.Products(step.model, 18, torch.bfloat16)()
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
    assert all(p.grad is None for p in step.model.parameters())


# Memory


def test_peak_of_a_call_by_hand():
    def call():
        a = torch.ones(1000, dtype=torch.float64)  # 8000
        b = torch.ones(500, dtype=torch.float64)  # 12000
        del a
        c = torch.ones(250, dtype=torch.float64)  # 6000
        return b.sum() + c.sum()

    found = memory.peak_bytes(call, CPU)
    assert 12000 <= found < 12100  # scalars


def test_what_was_there_before_does_not_count():
    held = [torch.ones(10000)]

    def call():
        held.clear()
        torch.ones(100, dtype=torch.float64).sum()

    assert 800 <= memory.peak_bytes(call, CPU) < 900


def test_held_bytes_are_parameters_and_moments(step):
    count = sum(p.numel() for p in step.model.parameters())
    buffers = sum(b.nbytes for b in step.model.buffers())
    assert memory.held_bytes(step.model, step.optimizer) == 4 * count + buffers
    step()
    steps = len(list(step.model.parameters())) * 4  # a step count in float32 for each parameter
    assert memory.held_bytes(step.model, step.optimizer) == 3 * 4 * count + buffers + steps


def test_a_step_adds_gradients_and_activations(step):
    step()
    gradients = 4 * sum(p.numel() for p in step.model.parameters())
    short = memory.peak_bytes(step, CPU)
    assert short > gradients
    longer = TrainingStep(step.model, step.optimizer, tiny_ids(8, 9), torch.float32)
    # Gradients do not grow with the batch, what is kept for the backward pass does.
    assert short < memory.peak_bytes(longer, CPU) < 4 * short


# Wrong results


@pytest.fixture
def untimed(monkeypatch):
    monkeypatch.setattr(bench, "interleave", lambda *args: pytest.fail("timed a wrong result"))


def replace_operator(monkeypatch, wrong):
    """Let `wrong(output)` stand for what the operator that is measured gives; the exact copy asks for another."""
    original = layers.pattention

    def replaced(x, keys, values, scale, backend="auto", **options):
        output = original(x, keys, values, scale, backend=backend, **options)
        return output if backend == "reference" else wrong(output)

    monkeypatch.setattr(layers, "pattention", replaced)


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_logits_are_not_timed(monkeypatch, dtype):
    replace_operator(monkeypatch, lambda output: 2 * output)
    with pytest.raises(UserError, match=f"tokenformer_eager in {dtype} is wrong: logits.*no speed is reported"):
        bench.measure(CONFIG, **SMALL, dtypes=(dtype,), cases=EAGER)


@pytest.mark.usefixtures("untimed")
def test_wrong_gradients_are_not_timed(monkeypatch):
    replace_operator(monkeypatch, lambda output: output + (output - output.detach()))
    with pytest.raises(UserError, match="tokenformer_eager in float32 is wrong: gradients"):
        bench.measure(CONFIG, **SMALL, dtypes=("float32",), cases=EAGER)


def test_what_does_not_compile_is_left_out_and_named(monkeypatch):
    def no_compiler(*args, **options):
        raise RuntimeError("no C++ compiler\nwith details")

    monkeypatch.setattr(torch, "compile", lambda model, **options: no_compiler)
    record = bench.measure(CONFIG, **SMALL, dtypes=("float32",))
    failed = record["checks"]["float32"]["failed_to_compile"]
    assert set(failed) == {"tokenformer_compiled", "gpt_neox_compiled"}
    assert list(record["seconds"]["float32"]["step"]) == list(EAGER)


# Variants


@pytest.mark.parametrize(
    ("variant", "results"),
    [("tokenformer_recompute", {"logits", "loss", "gradients"}), ("tokenformer_fused_loss", {"loss", "gradients"})],
)
def test_a_variant_trains_the_same_weights(variant, results):
    record = bench.measure(
        CONFIG, **SMALL, dtypes=("float32",), cases=(f"{variant}_eager", "tokenformer_eager", "products")
    )
    assert list(record["models"]) == ["tokenformer", variant]
    errors = record["checks"]["float32"]["errors"]
    assert {case: set(found) for case, found in errors.items()} == {
        f"{variant}_eager": results,
        "tokenformer_eager": {"logits", "loss", "gradients"},
    }
    held = {case: memory["held"] for case, memory in record["peak_memory"]["float32"].items()}
    assert held[f"{variant}_eager"] == held["tokenformer_eager"]
    models = bench._models(CONFIG, (f"{variant}_eager",), CPU)
    for one, other in zip(models["tokenformer"].parameters(), models[variant].parameters(), strict=True):
        assert one is other


def test_variants_are_other_ways_to_compute():
    names = ("tokenformer_recompute_eager", "tokenformer_fused_loss_eager")
    models = bench._models(CONFIG, names, CPU)
    assert [m.fused_loss for m in models.values()] == [False, True, False]
    recompute = [
        {layer.recompute for layer in m.modules() if isinstance(layer, layers.Pattention)} for m in models.values()
    ]
    assert recompute == [{False}, {False}, {True}]


# The record


def test_record(record):
    assert record["benchmark"] == "train-step"
    assert record["device"] == "cpu"
    assert record["versions"].keys() > versions().keys()
    assert record["mfu"] == {}  # the peak of a CPU is not known
    sizes = [model["parameters_without_embeddings"] for model in record["models"].values()]
    assert abs(sizes[0] / sizes[1] - 1) < 0.02
    for dtype in ("float32", "bfloat16"):
        rows = record["seconds"][dtype]["step"]
        assert set(rows) == set(bench.CASES)
        for case, figures in rows.items():
            assert len(figures["rounds"]) == 2
            speed = record["tokens_per_second"][dtype]["step"][case]
            assert speed == pytest.approx(18 / np.median(figures["rounds"]))
        checks = record["checks"][dtype]
        for case in set(bench.CASES) - {"products"}:
            assert set(checks["errors"][case]) == {"logits", "loss", "gradients"}
            parts = record["peak_memory"][dtype][case]
            assert parts["total"] == parts["held"] + parts["step"]
            # parameters, two moments and gradients of float32
            assert parts["total"] > 16 * record["models"][case.rpartition("_")[0]]["parameters"]
    for rows in (record["ratios"], record["memory_ratios"]):
        assert all(row["met"] is None for row in rows)  # targets are for the 150M model
        assert {(row["numerator"], row["denominator"], row["dtype"], row["at_most"]) for row in rows} >= {
            ("tokenformer_compiled", "gpt_neox_compiled", "bfloat16", 1.0),
            ("tokenformer_compiled", "gpt_neox_compiled", "float32", None),
        }
    memory_of = record["peak_memory"]["float32"]
    row = next(r for r in record["memory_ratios"] if r["numerator"] == "tokenformer_eager" and r["dtype"] == "float32")
    assert row["value"] == memory_of["tokenformer_eager"]["total"] / memory_of["gpt_neox_eager"]["total"]


def test_bfloat16_is_what_is_multiplied(record):
    for case in ("tokenformer_eager", "gpt_neox_compiled"):
        assert record["checks"]["bfloat16"]["errors"][case]["gradients"]["relative"] > 1e-4
        assert record["checks"]["float32"]["errors"][case]["gradients"]["relative"] < 1e-5


def test_targets_are_judged_for_the_default_model(monkeypatch):
    monkeypatch.setattr(bench, "default_config", lambda: CONFIG)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    found = bench.measure(**SMALL, dtypes=("bfloat16",))
    for rows in (found["ratios"], found["memory_ratios"]):
        judged = [row for row in rows if row["at_most"] is not None]
        assert [row["met"] for row in judged] == [row["value"] <= 1 for row in judged]
        assert len(judged) == 1


def test_mfu_is_of_the_peak(record):
    model = build_models(CONFIG, torch.float32)["tokenformer"]
    models = {"tokenformer": model, "gpt_neox": model}
    found = bench._mfu(record, models, 9, 1e9)
    speed = record["tokens_per_second"]["bfloat16"]["step"]["tokenformer_eager"]
    assert found["bfloat16"]["tokenformer_eager"] == pytest.approx(speed * training_flops_per_token(model, 9) / 1e9)
    assert set(found) == {"bfloat16"}
    assert "products" not in found["bfloat16"]


# Options


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--length", "1"], "length must be at least 2"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--repeats", "0"], "repeats must be at least 1"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--dtypes", "float16"], "unknown dtype 'float16'"),
        (["--cases", "tokenformer"], "unknown case 'tokenformer': use tokenformer_eager"),
        (["--cases", "products,products"], "each once"),
        (["--preset", "3B"], "3B"),
        (["--json", "absent/record.json"], "create it first"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(capsys, monkeypatch, argv, words):
    monkeypatch.setattr(bench, "build_models", lambda *args: pytest.fail("began to measure"))
    assert main(["bench", "train-step", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_table(capsys, monkeypatch, tmp_path, record):
    monkeypatch.setattr(bench, "measure", lambda config, **options: record)
    file = tmp_path / "record.json"
    assert main(["bench", "train-step", "--quick", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert (
        json.loads(file.read_text(encoding="utf-8"))["command"] == f"tokenformer bench train-step --quick --json {file}"
    )
    (first, second) = (line for line in out.splitlines() if line.strip().startswith("TokenFormer, compiled  "))
    total = record["peak_memory"]["float32"]["tokenformer_compiled"]["total"] / 2**20
    assert f" {total:,.0f} MiB" in first
    assert f" {record['tokens_per_second']['bfloat16']['step']['tokenformer_compiled']:.1f} " in second
    assert "memory: TokenFormer, eager / GPTNeoX, eager" in out
    assert "its matrix products alone" in out
