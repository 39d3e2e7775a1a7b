"""The Transformer to compare with: its sizes, its count of parameters, and what it cannot match."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPTNeoXForCausalLM

from tiny import tiny_config, tiny_ids
from tokenformer import TokenFormerConfig, TokenFormerForCausalLM, UserError
from tokenformer.baselines import matching_transformer, num_parameters, transformer_config

SIZES = {
    "vocab_size": 31,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 44,
}


def by_hand(config):
    """Weights of query, key, value, output and the feed-forward; biases of each; norms of weight and bias."""
    d, f = config.hidden_size, config.intermediate_size
    weights, biases, norms = 4 * d * d + 2 * d * f, 3 * d + d + f + d, 2 * 2 * d
    return config.num_hidden_layers * (weights + biases + norms) + 2 * d


# Configuration and count


def test_configuration_is_that_of_a_tokenformer_in_all_they_share():
    theirs = TokenFormerConfig.preset("124M")
    ours = transformer_config(
        vocab_size=theirs.vocab_size,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=1024,
    )
    shared = set(ours.to_dict()) & set(theirs.to_dict()) - {"model_type", "architectures", "transformers_version"}
    assert {"vocab_size", "rope_parameters", "layer_norm_eps", "initializer_range", "eos_token_id"} <= shared
    for name in shared:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.hidden_act == theirs.activation == "gelu"
    assert ours.attention_dropout == ours.hidden_dropout == 0
    assert by_hand(ours) == 12 * (12 * 768**2 + 13 * 768) + 2 * 768  # 85 M: a GPT-2 small
    assert num_parameters(ours) == by_hand(ours)


@pytest.mark.parametrize("tied", [True, False])
def test_count_leaves_out_embeddings_tied_or_not(tied):
    config = transformer_config(**SIZES, tie_word_embeddings=tied)
    assert num_parameters(config) == by_hand(config)
    model = GPTNeoXForCausalLM(config)
    assert num_parameters(model) == by_hand(config)
    assert sum(p.numel() for p in model.parameters()) == by_hand(config) + (1 if tied else 2) * 31 * 32


def test_count_of_a_tokenformer_is_that_of_the_paper():
    config = tiny_config()
    tokens = 2 * 2 * 32 * (3 * 12 + 10 + 20)
    assert num_parameters(config) == num_parameters(TokenFormerForCausalLM(config)) == tokens + 2 * 32


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_attention_heads": 3}, "hidden_size 32 is not divisible by num_attention_heads 3"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"intermediate_size": 0}, "intermediate_size must be at least 1"),
        ({"rotary_pct": 0.2}, "rotary size 3 .* is odd"),
        ({"rotary_pct": 1.5}, "rotary_pct must lie between 0 and 1"),
    ],
)
def test_sizes_that_do_not_fit_together(fields, words):
    with pytest.raises(UserError, match=words):
        transformer_config(**{**SIZES, **fields})


# Matching


@pytest.mark.parametrize("preset", ["124M", "354M", "150M", "1.5B"])
def test_matches_the_sizes_of_the_paper(preset):
    config = TokenFormerConfig.preset(preset)
    wanted = (
        2
        * config.num_hidden_layers
        * config.hidden_size
        * sum(count * config.segments[0][kind] for kind, count in (("qkv", 3), ("output", 1), ("ffn", 1)))
    )
    found = matching_transformer(
        wanted,
        vocab_size=config.vocab_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
    )
    assert by_hand(found) == pytest.approx(wanted, rel=0.002)
    assert found.intermediate_size / found.hidden_size == pytest.approx(4, rel=0.25)
    # 12 L d^2 parameters
    assert found.hidden_size == pytest.approx((wanted / 12 / config.num_hidden_layers) ** 0.5, rel=0.07)


@settings(max_examples=50)
@given(
    wanted=st.integers(100, 10**9),
    layers=st.integers(1, 40),
    heads=st.integers(1, 16),
    rotary_pct=st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.9, 1.0]),
    multiple=st.none() | st.integers(1, 20),
    tolerance=st.sampled_from([0.02, 0.001]),
)
def test_matches_or_says_what_comes_nearest(wanted, layers, heads, rotary_pct, multiple, tolerance):
    sizes = {"vocab_size": 31, "num_hidden_layers": layers, "num_attention_heads": heads, "rotary_pct": rotary_pct}
    hidden = None if multiple is None else 40 * heads * multiple
    try:
        found = matching_transformer(wanted, hidden_size=hidden, tolerance=tolerance, **sizes)
    except UserError as error:
        found, message = None, str(error)
    if found is not None:
        assert abs(by_hand(found) / wanted - 1) <= tolerance
        assert found.hidden_size / 2 <= found.intermediate_size <= 16 * found.hidden_size
        assert hidden in (None, found.hidden_size)
        head = found.hidden_size // heads
        assert int(head * rotary_pct) % 2 == 0
        if hidden is None:
            assert head % 8 == 0
            assert int(head * rotary_pct) >= (2 if rotary_pct else 0)
        return
    assert "comes within" in message
    assert "\n" not in message
    if hidden is not None:
        # No intermediate size that is allowed does it: found by trying them.
        config = transformer_config(hidden_size=hidden, intermediate_size=1, **sizes)
        each = layers * (2 * hidden + 1)
        nearest = min(range(hidden // 2, 16 * hidden + 1), key=lambda f: abs(by_hand(config) + (f - 1) * each - wanted))
        assert abs(by_hand(config) + (nearest - 1) * each - wanted) > tolerance * wanted


def test_intermediate_size_is_even_within_the_tolerance_and_as_close_as_can_be_beyond():
    wanted = 3_400_000
    sizes = {"vocab_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 4, "hidden_size": 256}
    usual = matching_transformer(wanted, **sizes)
    exact = matching_transformer(wanted, tolerance=0.0005, **sizes)
    assert usual.intermediate_size % 8 == 0
    one = 6 * (2 * 256 + 1)  # of one neuron in each layer
    assert abs(by_hand(usual) - wanted) <= 4 * one
    assert abs(by_hand(exact) - wanted) <= one / 2


def test_matching_transformer_runs():
    found = matching_transformer(30_000, vocab_size=31, num_hidden_layers=2, num_attention_heads=2)
    model = GPTNeoXForCausalLM(found)
    assert num_parameters(model) == by_hand(found) == pytest.approx(30_000, rel=0.02)
    assert torch.isfinite(model(tiny_ids()).logits).all()


@pytest.mark.parametrize(
    ("parameters", "fields", "words"),
    [
        (
            1000,
            {},
            r"no GPTNeoX of 6 layers, 4 heads and any hidden_size .* 1000 .* the nearest has 32608 \(hidden_size"
            r" 32, intermediate_size 16\), so change layers or heads",
        ),
        (
            10**8,
            {"hidden_size": 256},
            r"this hidden_size .* the nearest has 14194688 \(hidden_size 256, "
            r"intermediate_size 4096\), so change hidden_size or layers",
        ),
        (10**6, {"hidden_size": 250}, "hidden_size 250 is not divisible by num_attention_heads 4"),
        (0, {}, "must be at least 1, got 0"),
        (10**6, {"hidden_size": 0}, "hidden_size must be at least 1"),
        (10**6, {"rotary_pct": 2}, "rotary_pct must lie between 0 and 1"),
        (10**6, {"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
    ],
)
def test_what_cannot_be_matched(parameters, fields, words):
    with pytest.raises(UserError, match=words):
        matching_transformer(
            parameters, **{"vocab_size": 31, "num_hidden_layers": 6, "num_attention_heads": 4, **fields}
        )
