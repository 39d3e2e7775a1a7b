"""The sparse layer against the masked dense computation, written out here in NumPy and float64."""

import math

import numpy as np
import pytest
import torch

from tokenformer import Pattention, UserError
from tokenformer.sparse import SparsePattention, apply_sparsity, dense_like, norm_factor, sparse_like

SIZES = [(16, 24, 48, 4, 3, 5, 6), (16, 16, 12, 2, 2, 0, 4), (8, 6, 32, 1, 20, 3, 8), (16, 16, 40, 5, 8, 16, 16)]


def layer_of(d_in, d_out, tokens, size, active, rank, router_rank, dtype=torch.float64):
    layer = SparsePattention(
        d_in, d_out, tokens, group_size=size, active=active, rank=rank, router_rank=router_rank, dtype=dtype
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        layer.factor.copy_(norm_factor(layer.key))
        layer.scale.fill_(1.7)
    return layer


def gelu(z):
    return z * 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))


def masked(layer, x):
    """All tokens scored, the norm over all of them, those not chosen masked: no code shared with the layer."""
    p = {name: tensor.detach().double().numpy() for name, tensor in layer.named_parameters()}
    x = x.double().numpy()
    scores = x @ p["key"].T
    norm = np.sqrt((scores**2).sum(1, keepdims=True) + layer.eps)
    u = float(layer.scale) * x / norm
    preferences = u @ p["router_down"].T @ p["router_up"].T + p["router_bias"]
    chosen = np.argsort(-preferences, axis=1)[:, : layer.active]
    mask = np.zeros((len(x), layer.num_groups))
    np.put_along_axis(mask, chosen, 1, axis=1)
    weights = gelu(float(layer.scale) * scores / norm) * np.repeat(mask, layer.group_size, axis=1)
    return torch.from_numpy(weights @ p["value"] + u @ p["down"].T @ p["up"].T + p["bias"])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 50])
@torch.no_grad()
def test_every_path_is_the_masked_dense_computation(sizes, rows):
    layer = layer_of(*sizes)
    x = torch.randn(rows, sizes[0], dtype=torch.float64)
    torch.testing.assert_close(layer(x), masked(layer, x), rtol=0, atol=1e-10)


@torch.no_grad()
def test_leading_dimensions_are_kept():
    layer = layer_of(*SIZES[0])
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x).flatten(0, 1), masked(layer, x.flatten(0, 1)), rtol=0, atol=1e-10)
    assert layer(x[:1, :1]).shape == (1, 1, 24)


@pytest.mark.slow  # the compiler takes seconds
@pytest.mark.parametrize("rows", [1, 4])
@torch.no_grad()
def test_compiled_paths(rows):
    layer = layer_of(*SIZES[0], dtype=torch.float32)
    x = torch.randn(rows, 16)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x).double(), masked(layer, x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_row_and_a_few_read_only_the_tokens_that_they_compute():
    layer = layer_of(*SIZES[0])
    for rows in (1, 2):
        x = torch.randn(rows, 16, dtype=torch.float64)
        expected = layer(x)
        spoilt = layer_of(*SIZES[0])
        chosen = layer.choose(layer.directions(x)).unique()
        others = torch.ones(layer.num_groups, dtype=torch.bool).index_fill(0, chosen, False).repeat_interleave(4)
        assert others.any()
        spoilt.key[others], spoilt.value[others] = math.nan, math.nan
        torch.testing.assert_close(spoilt(x), expected, rtol=0, atol=0)


def test_the_factor_gives_the_exact_norm_and_is_triangular():
    for tokens in (5, 16, 40):
        key, x = torch.randn(tokens, 16, dtype=torch.float64), torch.randn(7, 16, dtype=torch.float64)
        factor = norm_factor(key)
        assert factor.shape == (min(tokens, 16), 16)
        assert (factor.tril(-1) == 0).all()
        torch.testing.assert_close((x @ factor.T).norm(dim=1), (x @ key.T).norm(dim=1), rtol=1e-12, atol=0)


@torch.no_grad()
def test_all_groups_and_no_remainder_are_the_dense_layer_and_back():
    dense = Pattention(16, 24, 48, dtype=torch.float64, scale=2.5)
    sparse = sparse_like(dense, group_size=4, active=12, rank=2, router_rank=3)
    base = dense.segments["base"]
    order = torch.randperm(48)
    sparse.key.copy_(base.key[order])
    sparse.value.copy_(base.value[order])
    sparse.factor.copy_(norm_factor(base.key))
    for rows in (1, 6):
        x = torch.randn(rows, 16, dtype=torch.float64)
        torch.testing.assert_close(sparse(x), dense(x), rtol=0, atol=1e-12)
        torch.testing.assert_close(dense_like(sparse)(x), dense(x), rtol=0, atol=1e-12)


def test_the_output_does_not_depend_on_the_length_of_the_input_and_the_scale_stays_exact():
    layer = layer_of(*SIZES[0], dtype=torch.float32)
    x = torch.randn(5, 16)
    torch.testing.assert_close(layer(1000 * x), layer(x))
    layer.scale.fill_(math.pi)
    assert layer.to(torch.bfloat16).scale.dtype == torch.float32
    assert layer.scale.item() == torch.tensor(math.pi).item()


def test_memory_counted_is_the_memory_of_the_parameters_but_for_half_of_the_triangle():
    layer = layer_of(64, 64, 256, 4, 16, 8, 8)
    read = layer.elements_read()
    assert read["tokens"] == 16 * 4 * (64 + 64)
    assert read["router"] == sum(p.numel() for p in (layer.router_down, layer.router_up, layer.router_bias))
    assert read["remainder"] == sum(p.numel() for p in (layer.down, layer.up, layer.bias))
    assert read["norm"] == 64 * 64 * 9 // 16


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((16, 16, 10, 4, 1, 0, 1), "do not divide"),
        ((16, 16, 12, 4, 4, 0, 1), "between 1 and the 3 groups"),
        ((16, 16, 12, 4, 0, 0, 1), "between 1 and the 3 groups"),
        ((16, 16, 12, 4, 1, 17, 1), "rank must lie"),
        ((16, 16, 12, 4, 1, 0, 17), "router_rank must lie"),
    ],
)
def test_sizes_that_do_not_fit(sizes, words):
    d_in, d_out, tokens, size, active, rank, router_rank = sizes
    with pytest.raises(UserError, match=words):
        SparsePattention(d_in, d_out, tokens, group_size=size, active=active, rank=rank, router_rank=router_rank)


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("1", {"num_tokens": 8, "group_size": 2, "active": 1, "rank": 1, "router_rank": 1}, "no such Pattention"),
        ("0", {"num_tokens": 6, "group_size": 2, "active": 1, "rank": 1, "router_rank": 1}, "it has 8 tokens"),
        ("0", {"num_tokens": 8, "group_size": 3, "active": 1, "rank": 1, "router_rank": 1}, "do not divide"),
        ("0", {"num_tokens": 8, "group_size": 2, "active": "1", "rank": 1, "router_rank": 1}, "whole numbers"),
        ("0", {"num_tokens": 8}, "whole numbers"),
    ],
)
def test_a_description_that_does_not_fit_the_model(name, sizes, words):
    with pytest.raises(UserError, match=words):
        apply_sparsity(torch.nn.Sequential(Pattention(4, 4, 8)), {name: sizes})
