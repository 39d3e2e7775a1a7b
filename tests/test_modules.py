"""The parts: rotary positions, attention and block, against transformers, complex numbers and sums written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gpt_neox import modeling_gpt_neox as neox

from tokenformer import TokenFormerConfig
from tokenformer.modules import (
    TokenFormerAttention,
    TokenFormerBlock,
    apply_rotary,
    build_pattention,
    eager_attention,
    rotary_angles,
)


def _config(**fields) -> TokenFormerConfig:
    sizes = {"vocab_size": 11, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    return TokenFormerConfig(**{**sizes, "attn_implementation": "eager", **fields})


def _randomise(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


# Rotary


@pytest.mark.parametrize(("head_size", "rotary"), [(16, 4), (24, 6), (8, 8), (16, 2)], ids=lambda size: str(size))
def test_rotary_is_multiplication_by_a_complex_number(head_size, rotary) -> None:
    x = torch.randn(2, 3, 5, head_size, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 0, 1, 500, 2]])
    actual = apply_rotary(x, *rotary_angles(positions, rotary, 10000.0, torch.float64))

    half = rotary // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) * 2 / rotary)
    turn = torch.exp(1j * positions[:, None, :, None] * frequencies)
    turned = torch.complex(x[..., :half], x[..., half:rotary]) * turn
    expected = torch.cat([turned.real, turned.imag, x[..., rotary:]], dim=-1)
    # The angles are computed in float32: at position 500, 500 * 6e-8.
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=2e-6)


def test_rotary_is_that_of_transformers_gpt_neox() -> None:
    query, key = torch.randn(2, 3, 7, 16), torch.randn(2, 3, 7, 16)
    positions = torch.arange(7).expand(2, -1)
    theirs = neox.GPTNeoXConfig(
        hidden_size=48, num_attention_heads=3, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.25}
    )
    cos, sin = neox.GPTNeoXRotaryEmbedding(theirs)(query, positions)
    expected = neox.apply_rotary_pos_emb(query, key, cos, sin)
    angles = rotary_angles(positions, 4, 10000.0, torch.float32)
    for tensor, wanted in zip((query, key), expected, strict=True):
        torch.testing.assert_close(apply_rotary(tensor, *angles), wanted, rtol=1e-5, atol=1e-6)


def test_no_rotary_channels_leave_everything_as_it_is() -> None:
    x = torch.randn(1, 2, 3, 8)
    assert torch.equal(apply_rotary(x, *rotary_angles(torch.arange(3)[None], 0, 10000.0, x.dtype)), x)


def test_rotary_depends_on_the_position_not_on_the_place_in_the_batch() -> None:
    """A known fault of other implementations turns by the batch axis."""
    x = torch.randn(1, 2, 3, 8).expand(4, -1, -1, -1)
    turned = apply_rotary(x, *rotary_angles(torch.arange(3)[None], 4, 10000.0, x.dtype))
    assert all(torch.equal(turned[0], row) for row in turned)
    assert not torch.equal(turned[:, :, 1], x[:, :, 1])


# Attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eager_attention_is_scaled_dot_product_attention(dtype) -> None:
    query, key, value = (torch.randn(2, 3, 5, 8, dtype=dtype) for _ in range(3))
    mask = torch.full((5, 5), -torch.inf, dtype=dtype).triu(1)
    output, probabilities = eager_attention(torch.nn.Identity(), query, key, value, mask, scaling=0.3)
    expected = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask.double(), scale=0.3
    )
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(output.double(), expected.transpose(1, 2), rtol=tolerance, atol=tolerance)
    assert output.dtype == probabilities.dtype == dtype
    torch.testing.assert_close(probabilities.sum(-1).double(), torch.ones(2, 3, 5).double(), rtol=0, atol=tolerance)


def test_attention_module_is_its_four_layers_around_a_sum_over_heads() -> None:
    attention = _randomise(TokenFormerAttention(_config(), 0)).double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)
    cos, sin = rotary_angles(torch.arange(5)[None], 4, 10000.0, torch.float64)
    output, probabilities = attention(x, mask, (cos, sin))

    query, key, value = attention.query(x), attention.key(x), attention.value(x)
    mixed = torch.zeros_like(x)
    for b in range(2):
        for h in range(2):
            channels = slice(16 * h, 16 * h + 16)
            for t in range(5):
                q = apply_rotary(query[b, t, channels][None, None, None], cos[:, t : t + 1], sin[:, t : t + 1])
                k = apply_rotary(key[b, : t + 1, channels][None, None], cos[:, : t + 1], sin[:, : t + 1])
                scores = (q.flatten() * k[0, 0]).sum(-1) / math.sqrt(16)
                shares = scores.exp() / scores.exp().sum()
                mixed[b, t, channels] = shares @ value[b, : t + 1, channels]
                torch.testing.assert_close(probabilities[b, h, t, : t + 1].double(), shares, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(output, attention.output(mixed), rtol=1e-9, atol=1e-9)


def test_block_is_pre_norm_with_residuals_and_norms_without_parameters() -> None:
    block = _randomise(TokenFormerBlock(_config(), 0))
    x = 3 + 5 * torch.randn(2, 4, 32)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    inner = x + block.attention(normed)[0]
    normed = (inner - inner.mean(-1, keepdim=True)) / (inner.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(block(x), inner + block.ffn(normed), rtol=1e-4, atol=1e-4)
    assert all("segments." in name for name, _ in block.named_parameters())


# Layers from a configuration


def test_build_pattention_takes_everything_from_the_configuration() -> None:
    config = _config(
        normalization="gelu_l2",
        activation="relu",
        pattention_eps=1e-9,
        segments=[
            {"name": "base", "qkv": 9, "output": 5, "ffn": 7},
            {"name": "later", "qkv": 0, "output": 3, "ffn": 4},
        ],
    )
    counts = {
        kind: {name: segment.num_tokens for name, segment in build_pattention(config, kind).segments.items()}
        for kind in ("qkv", "output", "ffn")
    }
    assert counts == {"qkv": {"base": 9}, "output": {"base": 5, "later": 3}, "ffn": {"base": 7, "later": 4}}
    layer = build_pattention(config, "ffn")
    assert (layer.kind, layer.normalization, layer.activation, layer.eps) == ("ffn", "gelu_l2", "relu", 1e-9)
    assert (layer.in_features, layer.out_features) == (32, 32)
    # tau is that of the base: the later tokens were grown
    assert layer.scale.item() == pytest.approx(7**0.5)
