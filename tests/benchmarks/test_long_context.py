"""Training steps over sequence length: sizes, FLOPs by hand and by counting, refused results, the record."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tiny import tiny_config, tiny_ids
from tokenformer import UserError
from tokenformer import pattention as layers
from tokenformer.benchmarks import long_context as bench

LAYERS, WIDTH, WORDS = 2, 32, 31
TOKENS = {"qkv": 24, "output": 20, "ffn": 100}
CONFIG = tiny_config(segments=[{"name": "base", **TOKENS}])
NAMES = [f"{kind}_x{growth}" for kind in ("tokenformer", "gpt_neox") for growth in (1, 2, 4)]
SMALL = {"lengths": (8, 4), "tokens": 16, "threads": 1, "repeats": 2}


@pytest.fixture(scope="module")
def models():
    return bench.build_models(CONFIG)


@pytest.fixture(scope="module")
def record():
    return bench.measure(CONFIG, **SMALL)


# Sizes


def test_tokenformers_grow_in_tokens_alone(models):
    per_token = 2 * LAYERS * WIDTH * (3 * TOKENS["qkv"] + TOKENS["output"] + TOKENS["ffn"])
    for growth in (1, 2, 4):
        model = models[f"tokenformer_x{growth}"]
        assert model.num_token_parameters() == growth * per_token
        assert (model.config.hidden_size, model.config.num_hidden_layers) == (WIDTH, LAYERS)
        for kind, count in TOKENS.items():
            assert model.config.num_tokens(kind) == growth * count
    assert [segment["name"] for segment in models["tokenformer_x4"].config.segments] == ["base", "grown1", "grown2"]
    assert CONFIG.segments == [{"name": "base", **TOKENS}]


def test_transformers_grow_in_width_to_as_many_parameters(models):
    widths = []
    for growth in (1, 2, 4):
        model = models[f"gpt_neox_x{growth}"]
        d, f = model.config.hidden_size, model.config.intermediate_size
        # weights and biases of query, key, value, output and the two of the MLP; two norms; the final norm
        layer = 4 * d**2 + 2 * d * f + (3 * d + d + f + d) + 4 * d
        wanted = models[f"tokenformer_x{growth}"].num_token_parameters()
        assert abs((LAYERS * layer + 2 * d) / wanted - 1) < 0.03
        assert model.config.num_hidden_layers == LAYERS
        widths.append(d)
    assert widths[0] < widths[1] < widths[2]


def test_the_default_transformer_widens_by_the_root_of_the_growth():
    config = bench.default_config()
    found = [bench.wider_transformer(config, growth, growth * 12 * 3 * 256**2) for growth in (1, 2, 4)]
    # 362 is the root of two times 256; 360 has 5 heads of 72
    assert [(wider.hidden_size, wider.num_attention_heads) for wider in found] == [(256, 4), (360, 5), (512, 8)]


def test_no_transformer_of_that_size_is_an_error():
    with pytest.raises(UserError, match="no GPTNeoX of 2 layers"):
        bench.wider_transformer(CONFIG, 2, 100)


# FLOPs


@pytest.mark.parametrize("length", [4, 64])
@pytest.mark.parametrize("growth", [1, 2, 4])
def test_flops_by_hand(models, growth, length):
    tokens = 2 * LAYERS * WIDTH * (3 * TOKENS["qkv"] + TOKENS["output"] + TOKENS["ffn"])
    grown = bench.flops_per_token(models[f"tokenformer_x{growth}"], length)
    assert grown["forward"] == {
        "parameters": 2 * (growth * tokens + WORDS * WIDTH),
        "attention": 4 * LAYERS * WIDTH * length,  # whatever the growth
    }
    wider = models[f"gpt_neox_x{growth}"]
    d, f = wider.config.hidden_size, wider.config.intermediate_size
    found = bench.flops_per_token(wider, length)
    assert found["forward"] == {
        "parameters": 2 * (LAYERS * (4 * d**2 + 2 * d * f) + WORDS * d),
        "attention": 4 * LAYERS * d * length,
    }
    for flops in (grown, found):
        assert flops["training"] == {part: 3 * count for part, count in flops["forward"].items()}
        assert flops["deviation"] == 0
        assert flops["counted"]["training"] == sum(flops["training"].values())


@pytest.mark.parametrize("name", ["tokenformer_x4", "gpt_neox_x2"])
def test_counting_shapes_is_counting_a_step_that_runs(models, name):
    model = copy.deepcopy(models[name])
    model.set_attn_implementation("eager")
    ids = tiny_ids(3, 12)
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        forward = counter.get_total_flops()
        loss.backward()
    counted = bench.counted_flops_per_token(model, 12)
    assert counted == {"forward": forward / ids.numel(), "training": counter.get_total_flops() / ids.numel()}


def test_deviation_is_of_what_is_counted(models, monkeypatch):
    model = models["tokenformer_x1"]
    stated = sum(bench.flops_per_token(model, 8)["training"].values())
    monkeypatch.setattr(
        bench, "counted_flops_per_token", lambda *args: {"forward": stated / 3, "training": 0.9 * stated}
    )
    assert bench.flops_per_token(model, 8)["deviation"] == pytest.approx(0.1)


# Steps


def test_a_step_is_forward_backward_and_update(models):
    model = copy.deepcopy(models["tokenformer_x2"])
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    step = bench.TrainingStep(model, torch.optim.SGD(model.parameters(), lr=0.5), tiny_ids(1, 9), torch.float32)
    gradients = step.results()["gradients"]
    step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert gradients.abs().max() > 1e-3
    torch.testing.assert_close(after, before - 0.5 * gradients)
    assert all(p.grad is None for p in model.parameters())


# Wrong results


@pytest.fixture
def untimed(monkeypatch):
    monkeypatch.setattr(bench, "interleave", lambda *args: pytest.fail("timed a wrong result"))
    monkeypatch.setattr(bench, "flops_per_token", lambda *args: {})  # takes seconds, and has tests of its own


def replace_operator(monkeypatch, wrong):
    """Let `wrong(original, x, keys, values, scale, **options)` stand for the operator that is measured."""
    original = layers.pattention

    def operator(x, keys, values, scale, backend="auto", **options):
        # The exact copy asks for another backend, and is not touched.
        return original(x, keys, values, scale, backend=backend, **options)

    def replaced(x, keys, values, scale, **options):
        if options.get("backend", "auto") == "auto":
            return wrong(operator, x, keys, values, scale, **options)
        return operator(x, keys, values, scale, **options)

    monkeypatch.setattr(layers, "pattention", replaced)


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_logits_are_not_timed(monkeypatch, dtype):
    replace_operator(monkeypatch, lambda f, x, keys, values, scale, **options: 2 * f(x, keys, values, scale, **options))
    with pytest.raises(UserError, match=f"tokenformer_x1 in {dtype} is wrong: logits.*no speed is reported"):
        bench.measure(CONFIG, **SMALL, dtypes=(dtype,))


@pytest.mark.usefixtures("untimed")
def test_a_segment_that_is_left_out_is_not_timed(monkeypatch):
    replace_operator(
        monkeypatch, lambda f, x, keys, values, scale, **options: f(x, keys[:1], values[:1], scale, **options)
    )
    with pytest.raises(UserError, match="tokenformer_x2 in float32 is wrong: logits"):
        bench.measure(CONFIG, **SMALL, dtypes=("float32",))


@pytest.mark.usefixtures("untimed")
def test_wrong_gradients_are_not_timed(monkeypatch):
    def twice(f, *args, **options):
        output = f(*args, **options)
        return output + (output - output.detach())

    replace_operator(monkeypatch, twice)
    with pytest.raises(UserError, match="tokenformer_x1 in float32 is wrong: gradients"):
        bench.measure(CONFIG, **SMALL, dtypes=("float32",))


# The record


def test_record(record, models):
    assert record["benchmark"] == "long-context"
    assert record["options"] == {"lengths": [4, 8], "tokens": 16, "dtypes": ["float32", "bfloat16"], "repeats": 2}
    assert list(record["models"]) == NAMES
    for name, model in record["models"].items():
        assert model["hidden_size"] == models[name].config.hidden_size
        assert list(record["flops_per_token"][name]) == ["4", "8"]
    assert len(record["models"]["tokenformer_x4"]["segments"]) == 3
    for dtype in ("float32", "bfloat16"):
        for length in ("4", "8"):
            rows = record["seconds"][dtype][length]
            assert list(rows) == NAMES
            for case, figures in rows.items():
                assert len(figures["rounds"]) == 2
                assert min(figures["rounds"]) > 0
                speed = record["tokens_per_second"][dtype][length][case]
                assert speed == pytest.approx(16 / np.median(figures["rounds"]))
    found = {(row["dtype"], row["length"], row["numerator"], row["denominator"]) for row in record["ratios"]}
    assert found == {
        (dtype, length, f"tokenformer_x{growth}", f"gpt_neox_x{growth}")
        for dtype in ("float32", "bfloat16")
        for length in (4, 8)
        for growth in (1, 2, 4)
    }


def test_bfloat16_is_what_is_multiplied(record):
    """Errors of the size that 8 bits give, and of 24 bits in float32."""
    for name in NAMES:
        for result in ("logits", "gradients"):
            assert record["checks"]["bfloat16"]["errors"][name][result]["relative"] > 1e-4
            assert record["checks"]["float32"]["errors"][name][result]["relative"] < 1e-5


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lengths": ()}, "lengths must be one or more"),
        ({"lengths": (4, 4)}, "each once"),
        ({"lengths": (1,)}, "lengths must be at least 2"),
        ({"lengths": (4, 5)}, "length 5 does not divide the 16 tokens"),
        ({"lengths": (32,)}, "length 32 does not divide the 16 tokens"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"dtypes": ("float16",)}, "unknown dtype 'float16'"),
    ],
    ids=str,
)
def test_bad_options(monkeypatch, options, words):
    monkeypatch.setattr(bench, "flops_per_token", lambda *args: pytest.fail("began to measure"))
    with pytest.raises(UserError, match=words):
        bench.measure(CONFIG, **{**SMALL, **options})
