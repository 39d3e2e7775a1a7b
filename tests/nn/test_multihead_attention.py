"""MultiheadAttention: beside torch's own with the same projections, and against the equation written out in float64."""

import copy
from typing import Any

import pytest
import torch
from beside_torch import attention_equation, randomise, with_projections_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import statement
from tokenformer import UserError, grow
from tokenformer.nn import KeyValueCache, MultiheadAttention


def _pair(*args: Any, **kwargs: Any) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    theirs = nn.MultiheadAttention(*args, **kwargs)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    return with_projections_of(MultiheadAttention(*args, **{**kwargs, "bias": False}), theirs), theirs


@st.composite
def _calls(draw: st.DrawFn) -> dict[str, Any]:
    """Everything torch's attention takes: sizes, layout, masks of both types, and what to return."""
    size = st.integers(1, 4)
    return {
        "heads": draw(st.sampled_from([1, 2, 3])),
        "batch": draw(st.one_of(st.none(), st.integers(1, 3))),
        "queries": draw(size),
        "keys": draw(size),
        "kdim": draw(st.sampled_from([None, 5])),
        "vdim": draw(st.sampled_from([None, 7])),
        "bias": draw(st.booleans()),
        "add_bias_kv": draw(st.booleans()),
        "add_zero_attn": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "attn_mask": draw(st.sampled_from([None, "bool", "float", "bool3d", "float3d"])),
        "key_padding_mask": draw(st.sampled_from([None, "bool", "float"])),
        "need_weights": draw(st.booleans()),
        "average": draw(st.booleans()),
        "hide": draw(st.floats(0, 1)),
        "seed": draw(st.integers(0, 2**16)),
    }


def _mask(kind: str, shape: tuple[int, ...], hide: float) -> torch.Tensor:
    hidden = torch.rand(shape) < hide
    if kind.startswith("bool"):
        return hidden
    return torch.randn(shape).masked_fill(hidden, -torch.inf)


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@given(call=_calls())
def test_every_mask_layout_and_option_means_what_it_means_in_torch(call) -> None:
    torch.manual_seed(call["seed"])
    heads, batch, queries, keys = call["heads"], call["batch"], call["queries"], call["keys"]
    options = {name: call[name] for name in ("bias", "add_bias_kv", "add_zero_attn", "kdim", "vdim", "batch_first")}
    ours, theirs = _pair(6, heads, **options)

    def tokens(length: int, channels: int) -> torch.Tensor:
        rows = (length,) if batch is None else (batch, length) if call["batch_first"] else (length, batch)
        return torch.randn(*rows, channels)

    inputs = (tokens(queries, 6), tokens(keys, call["kdim"] or 6), tokens(keys, call["vdim"] or 6))
    masks: dict[str, torch.Tensor] = {}
    if kind := call["attn_mask"]:
        shape = (heads * (batch or 1), queries, keys) if kind.endswith("3d") else (queries, keys)
        masks["attn_mask"] = _mask(kind, shape, call["hide"])
    if kind := call["key_padding_mask"]:
        masks["key_padding_mask"] = _mask(kind, (keys,) if batch is None else (batch, keys), call["hide"])
    flags = {"need_weights": call["need_weights"], "average_attn_weights": call["average"]}

    output, weights = ours(*inputs, **masks, **flags)
    expected, expected_weights = theirs(*inputs, **masks, **flags)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_causal_hint_gives_what_its_mask_gives(batch_first, need_weights, padded) -> None:
    ours, theirs = _pair(8, 2, batch_first=batch_first)
    x = torch.randn(3, 3, 8)
    causal = nn.Transformer.generate_square_subsequent_mask(3)
    padding = torch.zeros(3, 3).masked_fill(torch.tensor([False, False, True]), -torch.inf) if padded else None
    arguments = {"key_padding_mask": padding, "attn_mask": causal, "need_weights": need_weights}
    hinted = ours(x, x, x, is_causal=True, **arguments)
    for other in (theirs(x, x, x, is_causal=True, **arguments), ours(x, x, x, **arguments)):
        torch.testing.assert_close(hinted[0], other[0], rtol=1e-4, atol=1e-5)
        assert not need_weights or torch.allclose(hinted[1], other[1], atol=1e-6)


def test_the_causal_hint_leaves_appended_positions_visible() -> None:
    """The kernel's own causal pattern would hide a zero key behind the last position from every query."""
    attention = MultiheadAttention(8, 2, add_zero_attn=True, add_bias_kv=True)
    x, causal = torch.randn(3, 2, 8), nn.Transformer.generate_square_subsequent_mask(3)
    hinted, _ = attention(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)
    torch.testing.assert_close(hinted, attention(x, x, x, attn_mask=causal)[0], rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_torch() -> None:
    ours, theirs = _pair(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    mask = torch.randn(4, 5, 5)
    ours(x, x, x, attn_mask=mask)[0].square().sum().backward()
    actual = [layer.weight.grad for layer in (ours.query, ours.key, ours.value)]
    theirs.zero_grad()
    theirs(x, x, x, attn_mask=mask)[0].square().sum().backward()
    torch.testing.assert_close(torch.cat(actual), theirs.in_proj_weight.grad, rtol=1e-4, atol=1e-4)


def test_dropout_is_drawn_in_training_only_and_like_torch() -> None:
    ours, theirs = _pair(8, 2, dropout=0.5)
    x = torch.randn(5, 2, 8)
    for need_weights in (True, False):
        torch.manual_seed(1)
        dropped = ours(x, x, x, need_weights=need_weights)
        torch.manual_seed(1)
        expected = theirs(x, x, x, need_weights=need_weights)
        torch.testing.assert_close(dropped[0], expected[0], rtol=1e-4, atol=1e-5)
    ours.eval()
    assert not torch.allclose(ours(x, x, x)[0], dropped[0])
    assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])


# The true path: Pattentions


@pytest.mark.parametrize("normalization", ["l2_gelu", "gelu_l2", "gelu_l1", "softmax"])
def test_attention_is_the_equation_in_float64(normalization) -> None:
    layer = randomise(
        MultiheadAttention(
            8, 2, kdim=6, vdim=6, batch_first=True, qkv=5, output=9, normalization=normalization
        ).double()
    )
    query, source = torch.randn(2, 3, 8).double(), torch.randn(2, 4, 6).double()
    hidden = torch.rand(2, 3, 4) < 0.4
    hidden[..., 0] = False
    output, _ = layer(query, source, source, attn_mask=hidden.repeat_interleave(2, 0), need_weights=False)
    assert statement.error(output, attention_equation(layer, query, source, hidden)) < 1e-10


def test_sizes_kinds_and_defaults() -> None:
    layer = MultiheadAttention(12, 3, kdim=5, vdim=7, qkv=4, dtype=torch.bfloat16)
    shapes = {name: (p.in_features, p.out_features, p.num_tokens, p.kind) for name, p in layer.named_children()}
    assert shapes == {
        "query": (12, 12, 4, "qkv"),
        "key": (5, 12, 4, "qkv"),
        "value": (7, 12, 4, "qkv"),
        "output": (12, 12, 12, "output"),
    }
    assert all(p.dtype == torch.bfloat16 for p in layer.parameters())
    assert {p.device.type for p in MultiheadAttention(12, 3, add_bias_kv=True, device="meta").parameters()} == {"meta"}


def test_bfloat16_autocast_follows_float32() -> None:
    layer = MultiheadAttention(16, 4, add_bias_kv=True, add_zero_attn=True)
    x, causal = torch.randn(5, 2, 16), nn.Transformer.generate_square_subsequent_mask(5)
    expected = [layer(x, x, x, attn_mask=causal, need_weights=need)[0] for need in (True, False)]
    with torch.autocast("cpu", torch.bfloat16):
        actual = [layer(x, x, x, attn_mask=causal, need_weights=need)[0] for need in (True, False)]
    for low, full in zip(actual, expected, strict=True):
        assert low.dtype == torch.bfloat16
        assert statement.error(low, full) < statement.TOLERANCE[torch.bfloat16]


def test_growing_keeps_the_outputs_and_a_state_dict_keeps_them_too() -> None:
    layer = randomise(MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True))
    x = torch.randn(2, 3, 8)
    before = layer(x, x, x)[0]
    grow(layer, qkv=12, output=10)
    assert layer.query.num_tokens == layer.key.num_tokens == layer.value.num_tokens == 12
    assert torch.equal(layer(x, x, x)[0], before)
    again = grow(MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True), qkv=12, output=10)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x, x, x)[0], before)
    assert torch.equal(copy.deepcopy(layer)(x, x, x)[0], before)


# Cache


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("steps", [[1, 1, 1, 1, 1], [3, 1, 1], [2, 3]], ids=str)
def test_cached_steps_give_the_full_pass(batch_first, steps) -> None:
    layer = randomise(MultiheadAttention(8, 2, batch_first=batch_first, add_bias_kv=True, add_zero_attn=True)).double()
    x = torch.randn(2, 5, 8).double()
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    padding = torch.tensor([[True, False, False, False, False], [False] * 5])
    x = x if batch_first else x.transpose(0, 1)
    expected, _ = layer(x, x, x, padding, attn_mask=causal, need_weights=False)
    cache, outputs, done = KeyValueCache(), [], 0
    dim = 1 if batch_first else 0
    for length in steps:
        part = x.narrow(dim, done, length)
        mask = causal[done : done + length, : done + length]
        done += length
        # The hint is right for the whole, and must not be taken for the corner of the mask.
        out, _ = layer(
            part, part, part, padding[:, :done], attn_mask=mask, need_weights=False, is_causal=True, cache=cache
        )
        outputs.append(out)
        assert cache.length == done
    # The first query of row 0 sees no position of the sequence, only the appended ones.
    torch.testing.assert_close(torch.cat(outputs, dim), expected, rtol=1e-9, atol=1e-9)


def test_a_single_step_with_the_causal_hint_sees_all_cached_keys() -> None:
    layer = randomise(MultiheadAttention(8, 2, batch_first=True))
    x, cache = torch.randn(1, 4, 8), KeyValueCache()
    layer(x[:, :3], x[:, :3], x[:, :3], cache=cache)
    last = x[:, 3:]
    hinted, _ = layer(last, last, last, need_weights=False, attn_mask=torch.zeros(1, 4), is_causal=True, cache=cache)
    torch.testing.assert_close(hinted, layer(last, x, x)[0], rtol=1e-4, atol=1e-5)


def test_cached_keys_alone_and_in_another_order() -> None:
    layer = randomise(MultiheadAttention(8, 2, batch_first=True))
    x, query, cache = torch.randn(3, 4, 8), torch.randn(3, 1, 8), KeyValueCache()
    layer(query, x, x, cache=cache)
    rows = torch.tensor([2, 0, 0])
    cache.reorder(rows)
    assert cache.length == 4
    torch.testing.assert_close(
        layer(query, None, None, cache=cache)[0], layer(query, x[rows], x[rows])[0], rtol=1e-4, atol=1e-5
    )


# What is refused

_X = torch.zeros(3, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"embed_dim": 8, "num_heads": 3}, "num_heads must divide embed_dim"),
        ({"embed_dim": 8, "num_heads": 0}, "num_heads must divide embed_dim"),
        ({"embed_dim": 8, "num_heads": 2, "bias": True}, "pass bias=False"),
        ({"embed_dim": 8, "num_heads": 2, "dropout": 1.5}, "between 0 and 1"),
        ({"embed_dim": 8, "num_heads": 2, "qkv": 0}, "at least 1"),
        ({"embed_dim": 8, "num_heads": 2, "normalization": "l3"}, "unknown normalization"),
    ],
)
def test_bad_layers_are_refused(arguments, words) -> None:
    with pytest.raises(UserError, match=words):
        MultiheadAttention(**arguments)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"is_causal": True}, "pass the causal mask as attn_mask too"),
        ({"query": torch.zeros(3, 2, 7)}, "embed_dim, 8"),
        ({"query": torch.zeros(8)}, "2 dimensions, or 3"),
        ({"key": torch.zeros(3, 2, 7)}, "the last of 8"),
        ({"value": torch.zeros(3, 8)}, "3 dimensions like query"),
        ({"value": torch.zeros(4, 2, 8)}, "differ in length or batch"),
        ({"key": None}, "key and value belong together"),
        ({"key": None, "value": None}, "no keys to attend to"),
        ({"key": None, "value": None, "cache": KeyValueCache()}, "no keys to attend to"),
        ({"key": torch.zeros(3, 5, 8), "value": torch.zeros(3, 5, 8)}, "batch of 2 queries .* batch of 5"),
        ({"attn_mask": torch.zeros(3, 4)}, r"use \(3, 3\)"),
        ({"attn_mask": torch.zeros(2, 3, 3)}, r"\(4, 3, 3\)"),
        ({"attn_mask": torch.zeros(3, 3, dtype=torch.int64)}, "attn_mask must be boolean"),
        ({"key_padding_mask": torch.zeros(3, 2)}, r"use \(2, 3\)"),
        ({"key_padding_mask": torch.zeros(2, 3, dtype=torch.uint8)}, "key_padding_mask must be boolean"),
        (
            {"query": torch.nested.nested_tensor([torch.zeros(2, 8)], layout=torch.jagged)},
            "nested tensors are not supported",
        ),
    ],
)
def test_bad_calls_are_refused(call, words) -> None:
    layer = MultiheadAttention(8, 2)
    with pytest.raises(UserError, match=words):
        layer(**{"query": _X, "key": _X, "value": _X, **call})


def test_a_call_that_is_refused_leaves_the_cache_as_it_was() -> None:
    layer, cache = MultiheadAttention(8, 2), KeyValueCache()
    layer(_X, _X, _X, cache=cache)
    one = _X[:, :1]
    with pytest.raises(UserError, match="begin with a new cache"):
        layer(one, one, one, cache=cache)
    with pytest.raises(UserError, match=r"use \(3, 6\)"):
        layer(_X, _X, _X, attn_mask=torch.zeros(3, 3), cache=cache)
    assert cache.length == 3
