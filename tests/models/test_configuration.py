"""The configuration: what it refuses, what it writes and reads, and the sizes of the paper."""

import json

import pytest
import torch
from transformers import AutoConfig

import tokenformer.models  # noqa: F401  (registers the Auto classes)
from tiny import SEGMENTS, tiny_config
from tokenformer import TokenFormerConfig, TokenFormerForCausalLM, UserError

BASE = SEGMENTS[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param(
            {"hidden_size": 30, "num_attention_heads": 4}, "hidden_size 30.*num_attention_heads 4", id="heads"
        ),
        pytest.param({"hidden_size": 40, "num_attention_heads": 2}, "rotary size 5.*rotary_pct", id="odd-rotary"),
        pytest.param({"rotary_pct": 1.5}, "rotary_pct must lie between 0 and 1", id="rotary-above-1"),
        pytest.param({"rotary_pct": -0.5}, "rotary_pct must lie between 0 and 1", id="rotary-below-0"),
        pytest.param({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0", id="no-layers"),
        pytest.param({"vocab_size": -1}, "vocab_size must be at least 1, got -1", id="vocabulary"),
        pytest.param({"num_attention_heads": 0}, "num_attention_heads must be at least 1", id="no-heads"),
        pytest.param({"normalization": "l1_gelu"}, "unknown normalization 'l1_gelu'", id="normalization"),
        pytest.param({"activation": "swoosh"}, "unknown activation 'swoosh'", id="activation"),
        pytest.param({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear'", id="rope-type"),
        pytest.param({"segments": [{**BASE, "name": "first"}]}, "segments must begin with.*'base'", id="no-base"),
        pytest.param({"segments": [BASE, BASE]}, "segment names must differ", id="segment-twice"),
        pytest.param({"segments": [{**BASE, "qkv": 0}]}, "segment 'base': qkv must be at least 1, got 0", id="no-qkv"),
        pytest.param({"segments": [{**BASE, "ffn": 2.5}]}, "segment 'base': ffn .* got 2.5", id="fractional-tokens"),
        pytest.param({"segments": [BASE, {**BASE, "name": "a", "output": -1}]}, "'a': output .* 0", id="negative"),
        pytest.param({"segments": [{"name": "base", "qkv": 3}]}, "fields name, qkv, output and ffn", id="no-ffn"),
        pytest.param({"segments": [{**BASE, "mlp": 3}]}, "fields name, qkv, output and ffn", id="unknown-field"),
        pytest.param({"segments": [BASE, {**BASE, "name": "a.b"}]}, "segment name 'a.b'", id="segment-name"),
        pytest.param({"segments": [BASE, {**BASE, "name": "keys"}]}, "segment name 'keys'", id="reserved-name"),
    ],
)
def test_sizes_that_do_not_fit_are_user_errors_naming_the_field(fields, message) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(**fields)


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown preset '7B'.*150M.*1\.5B.*124M"):
        TokenFormerConfig.preset("7B")


def test_default_segments_are_a_transformers_parameter_count() -> None:
    config = TokenFormerConfig(hidden_size=64, num_attention_heads=2)
    assert config.segments == [{"name": "base", "qkv": 64, "output": 64, "ffn": 256}]
    assert TokenFormerConfig().segments == [{"name": "base", "qkv": 768, "output": 768, "ffn": 3072}]


def test_defaults_are_not_shared_between_configurations() -> None:
    first = TokenFormerConfig()
    first.segments[0]["qkv"] = 1
    first.rope_parameters["rope_theta"] = 1.0
    assert TokenFormerConfig().segments[0]["qkv"] == 768
    assert TokenFormerConfig().rope_parameters["rope_theta"] == 10000.0


def test_json_round_trip(tmp_path) -> None:
    config = tiny_config(
        segments=[*SEGMENTS, {"name": "grown1", "qkv": 0, "output": 3, "ffn": 5}],
        rotary_pct=0.5,
        normalization="softmax",
        activation="silu",
        pattention_eps=1e-9,
        rope_theta=500.0,
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "tokenformer"
    assert written["segments"][1] == {"name": "grown1", "qkv": 0, "output": 3, "ffn": 5}
    # what other servers read
    assert written["rope_parameters"]["partial_rotary_factor"] == 0.5

    read = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(read, TokenFormerConfig)
    fields = (
        "segments",
        "rotary_pct",
        "normalization",
        "activation",
        "pattention_eps",
        "rope_parameters",
        "vocab_size",
    )
    assert {name: getattr(read, name) for name in fields} == {name: getattr(config, name) for name in fields}
    assert read.rope_parameters["rope_theta"] == 500.0
    assert [segment["name"] for segment in read.segments] == ["base", "grown1"]


def test_derived_sizes() -> None:
    config = tiny_config(segments=[*SEGMENTS, {"name": "grown1", "qkv": 0, "output": 3, "ffn": 5}])
    assert (config.head_dim, config.rotary_dim) == (16, 4)
    assert [config.num_tokens(kind) for kind in ("qkv", "output", "ffn")] == [12, 13, 25]


# Presets

# Parameters that PAPER.md (sections 2, 3 and 6) gives in its tables, and how far a nominal size may be off: names are
# rounded, and the paper's two "1.4B" and "1.5B" are 1.31 and 1.59 billion by its own token counts.
NOMINAL = {
    "150M": (150e6, 0.02),
    "450M": (450e6, 0.02),
    "900M": (900e6, 0.01),
    "1.5B": (1.5e9, 0.06),
    "124M": (124e6, 0.005),
    "354M": (354e6, 0.005),
    "757M": (757e6, 0.005),
    "1.4B": (1.4e9, 0.07),
}
# layers, d, heads, qkv and output tokens, ffn tokens
TABLES = {
    "150M": (12, 768, 12, 768, 3072),
    "450M": (24, 1024, 16, 1024, 4096),
    "900M": (32, 1280, 16, 1280, 5120),
    "1.5B": (40, 1536, 16, 1536, 6144),
    "124M": (12, 768, 12, 576, 2304),
    "354M": (12, 768, 12, 2140, 8560),
    "757M": (12, 768, 12, 4850, 19400),
    "1.4B": (12, 768, 12, 8620, 34480),
}


@pytest.mark.parametrize("name", NOMINAL)
def test_presets_have_the_parameters_of_the_paper(name) -> None:
    with torch.device("meta"):
        model = TokenFormerForCausalLM(TokenFormerConfig.preset(name))
    layers, d, heads, attention, ffn = TABLES[name]
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.num_attention_heads) == (
        layers,
        d,
        heads,
    )
    tokens = 2 * layers * d * (4 * attention + ffn)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert model.num_token_parameters() == tokens
    assert total == tokens + 50304 * d + 2 * d, "embeddings are tied, block norms have no parameters"
    nominal, tolerance = NOMINAL[name]
    assert total == pytest.approx(nominal, rel=tolerance)


def test_the_150m_file_has_the_published_size() -> None:
    with torch.device("meta"):
        model = TokenFormerForCausalLM(TokenFormerConfig.preset("150M"))
    assert 4 * sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(608e6, rel=1e-3)


def test_preset_takes_overrides() -> None:
    config = TokenFormerConfig.preset("450M", vocab_size=100, num_hidden_layers=2)
    assert (config.vocab_size, config.num_hidden_layers, config.hidden_size) == (100, 2, 1024)
    assert TokenFormerConfig.preset("450M").num_hidden_layers == 24
