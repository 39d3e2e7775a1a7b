"""The benchmarks of whole models: equal sizes, counted bytes, refused results, and what the records say."""

import itertools

import numpy as np
import pytest
import torch

import statement
from tiny import tiny_config, tiny_ids, tiny_model
from tokenformer import TokenFormerConfig, UserError
from tokenformer import pattention as layers
from tokenformer.benchmarks import decode, forward, models
from tokenformer.models import modeling_tokenformer

# 2 layers of 2 * 32 * (4 * 24 + 102) = 12672 parameters, beside a layer of GPTNeoX with 12704
CONFIG = tiny_config(
    segments=[{"name": "base", "qkv": 24, "output": 24, "ffn": 96}, {"name": "grown1", "qkv": 0, "output": 0, "ffn": 6}]
)
CASES = ["tokenformer_eager", "tokenformer_compiled", "gpt_neox_eager", "gpt_neox_compiled"]
SMALL = {"threads": 1, "repeats": 2, "compiler": "eager"}
RUNS = {"forward": (forward, {"length": 9}), "decode": (decode, {"prompt": 6, "tokens": 4})}
benchmarks = pytest.mark.parametrize("benchmark", RUNS)


def measure(benchmark, **options):
    module, sizes = RUNS[benchmark]
    return module.measure(options.pop("config", CONFIG), **{**sizes, **SMALL, **options})


@pytest.fixture(scope="module")
def records():
    return {
        benchmark: measure(benchmark, dtypes=("float32", "bfloat16") if benchmark == "decode" else ("float32",))
        for benchmark in RUNS
    }


# Two models of equal size


@pytest.mark.parametrize(
    ("preset", "layers"), [("150M", 16), ("450M", 32), ("900M", 43), ("1.5B", 53), ("124M", 12), ("354M", 45)]
)
def test_transformer_has_as_many_parameters(preset, layers):
    config = TokenFormerConfig.preset(preset)
    other = models.equal_transformer(config)
    d, tokens = config.hidden_size, config.segments[0]
    parameter_tokens = 2 * config.num_hidden_layers * d * (3 * tokens["qkv"] + tokens["output"] + tokens["ffn"])
    weights = 12 * d**2  # of a layer: query, key, value, output and the two of the MLP
    assert other.num_hidden_layers == layers
    assert abs(other.num_hidden_layers * weights / parameter_tokens - 1) < 0.01
    for name in ("vocab_size", "hidden_size", "num_attention_heads", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(other, name) == getattr(config, name)
    assert other.intermediate_size == 4 * d
    assert other.rope_parameters["partial_rotary_factor"] == config.rotary_pct == 0.25


def test_no_equal_transformer_is_an_error_that_says_so():
    config = tiny_config(segments=[{"name": "base", "qkv": 32, "output": 32, "ffn": 64}])
    with pytest.raises(UserError, match="change its tokens or layers until they agree"):
        models.equal_transformer(config)


def test_parameters_and_bytes_by_hand():
    built = models.build_models(CONFIG, torch.bfloat16)
    d, words, context = 32, 31, 100
    tokens = 2 * 2 * d * (4 * 24 + 102)
    assert models.num_parameters(built["tokenformer"]) == tokens + 2 * d
    count = 2
    layer = 12 * d**2 + (3 + 1 + 4 + 1) * d + 2 * 2 * d  # weights, biases, two norms
    assert models.num_parameters(built["gpt_neox"]) == count * layer + 2 * d
    # once the output embedding, one row of the input embedding, keys and values of the cache
    others = words * d + d
    assert models.decode_bytes(built["gpt_neox"], context) == 2 * (
        count * layer + 2 * d + others + 2 * count * d * context
    )
    assert models.decode_bytes(built["tokenformer"], context) == built["tokenformer"].decode_bytes_per_token(context)


def test_exact_copy_is_the_published_forward_pass_whatever_the_operator_does(monkeypatch):
    model = tiny_model(segments=CONFIG.segments)
    ids = tiny_ids(1, 7)
    monkeypatch.setattr(layers, "pattention", lambda *args, **options: pytest.fail("used what is measured"))
    exact = models.exact_copy(model)
    expected, _, _ = statement.forward(model, ids[0].tolist())
    np.testing.assert_allclose(exact(ids).logits[0].detach().numpy(), expected, rtol=1e-10, atol=1e-10)
    monkeypatch.undo()
    assert model(ids).logits.dtype == torch.float32  # the model itself stays as it is


# Wrong results


@pytest.fixture
def uncompiled(monkeypatch):
    """For tests that compare nothing compiled: it takes seconds."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("benchmark", "dtype"), [("forward", "float32"), ("forward", "bfloat16"), ("decode", "float32")]
)
def test_wrong_results_are_not_timed(benchmark, dtype, monkeypatch):
    def wrong(x, keys, values, scale, backend="auto", **options):
        return original(x, keys, values, (1.1 if backend == "auto" else 1) * scale, backend=backend, **options)

    original = layers.pattention
    monkeypatch.setattr(layers, "pattention", wrong)
    monkeypatch.setattr(RUNS[benchmark][0], "interleave", lambda *args: pytest.fail("timed a wrong result"))
    with pytest.raises(UserError, match=f"tokenformer_eager in {dtype} is wrong: logits.*no speed is reported"):
        measure(benchmark, dtypes=(dtype,))


@pytest.mark.usefixtures("uncompiled")
def test_a_step_that_misreads_the_cache_is_not_timed(monkeypatch):
    """The prompt is right, but each later token takes itself to stand one position further."""
    original = modeling_tokenformer.rotary_angles

    def shifted(positions, *args):
        return original(positions + (positions.shape[1] == 1), *args)

    monkeypatch.setattr(modeling_tokenformer, "rotary_angles", shifted)
    with pytest.raises(UserError, match="tokenformer_eager in float32 is wrong"):
        measure("decode", dtypes=("float32",))


@benchmarks
def test_what_does_not_compile_is_left_out_and_named(benchmark):
    def no_compiler(graph, inputs, **options):
        raise RuntimeError("no C++ compiler\nwith details")

    torch._dynamo.reset()
    torch._dynamo.register_backend(no_compiler, name=f"absent_for_{benchmark}")
    record = measure(benchmark, dtypes=("float32",), compiler=f"absent_for_{benchmark}")
    failed = record["checks"]["float32"]["failed_to_compile"]
    assert set(failed) == {"tokenformer_compiled", "gpt_neox_compiled"}
    assert all("no C++ compiler" in reason and "\n" not in reason for reason in failed.values())
    for rows in record["seconds"]["float32"].values():
        assert list(rows) == ["tokenformer_eager", "gpt_neox_eager"]
    assert [ratio["numerator"] for ratio in record["ratios"]] == ["tokenformer_eager"]


# Records


@benchmarks
def test_record(benchmark, records):
    record = records[benchmark]
    passes = {"forward": {"prefill": 9}, "decode": {"prompt": 6, "decode": 1}}[benchmark]
    assert record["benchmark"] == benchmark
    assert record["threads"] == 1
    assert record["versions"]["transformers"]
    assert record["options"].items() >= {"repeats": 2, "compiler": "eager", **RUNS[benchmark][1]}.items()
    sizes = [model["parameters_without_embeddings"] for model in record["models"].values()]
    assert abs(sizes[0] / sizes[1] - 1) < 0.02
    for dtype in record["options"]["dtypes"]:
        assert list(record["seconds"][dtype]) == list(passes)
        for name, tokens in passes.items():
            rows = record["seconds"][dtype][name]
            assert list(rows) == CASES
            for case, figures in rows.items():
                assert len(figures["rounds"]) == 2
                assert min(figures["rounds"]) > 0
                speed = record["tokens_per_second"][dtype][name][case]
                assert speed == pytest.approx(tokens / np.median(figures["rounds"]))
        checks = record["checks"][dtype]
        assert set(checks["compile_seconds"]) == {"tokenformer_compiled", "gpt_neox_compiled"}
        limit = checks["tolerance"]["relative"]
        assert all(0 < checks["errors"][case]["logits"]["relative"] < limit for case in CASES)
    assert {(row["numerator"], row["denominator"]) for row in record["ratios"]} == {
        ("tokenformer_eager", "gpt_neox_eager"),
        ("tokenformer_compiled", "gpt_neox_compiled"),
    }
    assert {(row["at_most"], row["met"]) for row in record["ratios"]} == {(1.0, None)}  # a target for the 150M model


def test_decode_is_a_fraction_of_what_the_memory_gives(records):
    record = records["decode"]
    built = models.build_models(CONFIG, torch.float32)["tokenformer"]
    assert record["memory"]["float32"]["decode_bytes_per_token"]["tokenformer"] == built.decode_bytes_per_token(6 + 2)
    for dtype, memory in record["memory"].items():
        assert min(memory["bytes_per_second"].values()) > 1e8
        for case, fractions in memory["fraction"].items():
            seconds = record["seconds"][dtype]["decode"][case]["median"]
            for name, fraction in fractions.items():
                bytes_per_token = memory["decode_bytes_per_token"][case.rsplit("_", 1)[0]]
                assert fraction * memory["bytes_per_second"][name] * seconds == pytest.approx(bytes_per_token)


@pytest.mark.usefixtures("uncompiled")
def test_targets_are_judged_for_the_default_model(monkeypatch):
    monkeypatch.setattr(forward, "default_config", lambda: CONFIG)
    record = forward.measure(length=4, dtypes=("float32",), **SMALL)
    assert all(row["met"] == (row["value"] <= 1) for row in record["ratios"])


class Clocked:
    """A model whose prompt takes 5 seconds and each later token 2; the rest of the call takes 1."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(decode.time, "perf_counter", lambda: self.now)

    def generate(self, ids, generation_config, streamer):
        streamer.put(ids)
        for seconds in itertools.islice(
            itertools.chain([5.0], itertools.repeat(2.0)), generation_config.max_new_tokens
        ):
            self.now += seconds
            streamer.put(ids[:, :1])
        self.now += 1.0
        streamer.end()


def test_times_of_prompt_and_tokens(monkeypatch):
    run = decode.Generation(Clocked(monkeypatch), tiny_ids(1, 3), decode.generation_configs(4, "eager")["eager"])
    run()
    run()
    assert (run.prompt, run.decode) == ([5.0, 5.0], [2.0, 2.0])


@pytest.mark.usefixtures("uncompiled")
def test_every_token_is_generated_though_one_would_end_the_text():
    config = tiny_config(eos_token_id=list(range(31)), segments=CONFIG.segments)
    for model in models.build_models(config, torch.float32).values():
        for generation in decode.generation_configs(5, "eager").values():
            ids, logits = decode.Generation(model, tiny_ids(1, 3), generation).results()
            assert (ids.shape, logits.shape) == ((1, 3 + 4), (1, 5, 31))


# Options


@pytest.mark.parametrize(
    ("benchmark", "options", "words"),
    [
        ("forward", {"batch": 0}, "batch must be at least 1, got 0"),
        ("forward", {"length": -2}, "length must be at least 1"),
        ("forward", {"repeats": 0}, "repeats must be at least 1"),
        ("forward", {"threads": 0}, "threads must be at least 1"),
        ("forward", {"dtypes": ("float16",)}, "unknown dtype 'float16'"),
        ("decode", {"prompt": 0}, "prompt must be at least 1"),
        ("decode", {"tokens": 1}, "tokens must be at least 2"),
        ("decode", {"dtypes": ()}, "one or more"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_options(benchmark, options, words):
    with pytest.raises(UserError, match=words):
        measure(benchmark, **options)
