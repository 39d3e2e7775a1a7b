"""What must hold for any sizes and any numbers: gauge, permutation, splitting, and exact growth."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import statement
from tokenformer import ops

normalizations = pytest.mark.parametrize("normalization", ["l2_gelu", "gelu_l2", "gelu_l1", "softmax"])
several = settings(max_examples=25)
sizes = st.tuples(*[st.integers(1, 9)] * 4)  # rows, channels in, channels out, tokens
seeds = st.integers(0, 2**20)


def _draw(size, seed, dtype=torch.float64):
    rows, channels, out, tokens = size
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, channels), (tokens, channels), (tokens, out))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@several
@given(sizes, seeds, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_scale_of_keys_and_inputs_is_a_gauge(size, seed, of_keys, of_inputs) -> None:
    x, key, value = _draw(size, seed)
    output = ops.pattention(x * of_inputs, key * of_keys, value, 1.7, eps=0.0)
    assert statement.error(output, ops.pattention(x, key, value, 1.7, eps=0.0)) < 1e-10


@several
@given(sizes, seeds)
def test_softmax_ignores_a_constant_added_to_all_scores(size, seed) -> None:
    x, key, value = _draw(size, seed)
    x, key = torch.cat([x, torch.ones(len(x), 1)], -1), torch.cat([key, torch.full((len(key), 1), 3.0)], -1)
    output = ops.pattention(x, key, value, 1.7, normalization="softmax")
    expected = ops.pattention(x[:, :-1], key[:, :-1], value, 1.7, normalization="softmax")
    assert statement.error(output, expected) < 1e-10


@normalizations
@several
@given(size=sizes, seed=seeds)
def test_order_of_tokens_is_immaterial(normalization, size, seed) -> None:
    x, key, value = _draw(size, seed)
    order = torch.randperm(len(key), generator=torch.Generator().manual_seed(seed))
    output = ops.pattention(x, key[order], value[order], 1.7, normalization=normalization)
    assert statement.error(output, ops.pattention(x, key, value, 1.7, normalization=normalization)) < 1e-10


@normalizations
@several
@given(size=sizes, seed=seeds, data=st.data())
def test_cutting_into_segments_is_immaterial(normalization, size, seed, data) -> None:
    x, key, value = _draw(size, seed)
    first = data.draw(st.integers(1, len(key)), label="tokens of the first segment")
    counts = [first, len(key) - first] if first < len(key) else [first]
    output = ops.pattention(x, key.split(counts), value.split(counts), 1.7, normalization=normalization)
    assert statement.error(output, ops.pattention(x, key, value, 1.7, normalization=normalization)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "silu", "tanh"])
@pytest.mark.parametrize("normalization", ["l2_gelu", "gelu_l2", "gelu_l1"])
@settings(max_examples=10)
@given(size=sizes, seed=seeds, added=st.integers(1, 9), magnitude=st.sampled_from([0.0, 1e-3, 1.0, 1e4]))
def test_zero_keys_with_any_values_change_no_bit(
    normalization, activation, dtype, size, seed, added, magnitude
) -> None:
    x, key, value = _draw(size, seed, dtype)
    _, _, new = _draw((1, 1, value.shape[1], added), seed + 1, dtype)
    options = {"normalization": normalization, "activation": activation}
    before = ops.pattention(x, key, value, 1.7, **options)
    after = ops.pattention(
        x, [key, torch.zeros(added, key.shape[1], dtype=dtype)], [value, new * magnitude], 1.7, **options
    )
    assert torch.equal(before, after)


@several
@given(sizes, seeds, st.floats(0.1, 10))
def test_output_is_linear_in_values_and_bounded_by_tau(size, seed, tau) -> None:
    """|gelu(z)| <= |z|, so the weights of a row have norm tau at most: |output| <= tau ||V||."""
    x, key, value = _draw(size, seed)
    output = ops.pattention(x, key, value, tau)
    assert statement.error(ops.pattention(x, key, -3 * value, tau), -3 * output) < 1e-10
    assert (output.norm(dim=-1) <= tau * torch.linalg.matrix_norm(value, 2) * (1 + 1e-9)).all()
