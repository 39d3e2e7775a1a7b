"""Zero, tiny, huge and mixed rows: what stays finite, what stays exact, and where the range of float32 ends."""

import math

import pytest
import torch

import statement
from tokenformer import ops

normalizations = pytest.mark.parametrize("normalization", ["l2_gelu", "gelu_l2", "gelu_l1", "softmax"])
l2_kinds = pytest.mark.parametrize("normalization", ["l2_gelu", "gelu_l2"])
backends = pytest.mark.parametrize("backend", ["fused", "reference"])
FLOAT32_MAX = torch.finfo(torch.float32).max


def _draw(rows=4, channels=6, out=3, tokens=10):
    return torch.randn(rows, channels), torch.randn(tokens, channels), torch.randn(tokens, out)


def _run(x, key, value, normalization, backend="fused", tau=2.0):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, key, value)]
    output = ops.pattention(*leaves, tau, normalization=normalization, backend=backend)
    return output, torch.autograd.grad(output, leaves, torch.ones_like(output))


# Zeros


@pytest.mark.parametrize("zero", ["x", "key", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@normalizations
@backends
def test_rows_of_zero_scores_are_finite(backend, normalization, dtype, zero) -> None:
    x, key, value = (tensor.to(dtype) for tensor in _draw())
    x = torch.zeros_like(x) if zero in ("x", "both") else x
    key = torch.zeros_like(key) if zero in ("key", "both") else key
    output, gradients = _run(x, key, value, normalization, backend)
    # The norm of nothing gives nothing; softmax of equal scores is the mean, times tau^2.
    expected = 4 * value.mean(0).expand_as(output) if normalization == "softmax" else torch.zeros_like(output)
    assert statement.error(output, expected) < statement.TOLERANCE[dtype]
    assert all(gradient.isfinite().all() for gradient in gradients)


@normalizations
@backends
def test_a_zero_row_does_not_disturb_its_neighbours(backend, normalization) -> None:
    x, key, value = _draw()
    x[1] = 0
    output, gradients = _run(x, key, value, normalization, backend)
    others = [0, 2, 3]
    exact = [tensor.double().requires_grad_() for tensor in (x[others], key, value)]
    expected = statement.pattention(exact[0], [exact[1]], [exact[2]], 2.0, normalization)
    wanted = torch.autograd.grad(expected.sum(), exact)
    assert statement.error(output[others], expected) < 1e-5
    assert statement.error(gradients[0][others], wanted[0]) < 1e-5
    if normalization != "softmax":  # where the zero row sees the mean of the values
        assert statement.error(gradients[1], wanted[1]) < 1e-5
        assert statement.error(gradients[2], wanted[2]) < 1e-5


@l2_kinds
def test_slope_at_a_zero_row_is_that_of_the_smoothed_root(normalization) -> None:
    """d f(tau a / sqrt(a^2 + eps)) / da at 0 is f'(0) tau / sqrt(eps): finite, but 1e6 with the default epsilon."""
    x = torch.zeros(1, 1, requires_grad=True)
    output = ops.pattention(x, torch.ones(1, 1), torch.ones(1, 1), 3.0, normalization=normalization, eps=1e-4)
    output.sum().backward()
    assert x.grad.item() == pytest.approx(0.5 * 3.0 / 1e-2, rel=1e-5)


# Magnitudes


@pytest.mark.parametrize("magnitude", [1e-4, 1e-2, 1e4, 1e10, 1e15, 1e18])
@backends
def test_magnitude_of_the_input_is_immaterial(backend, magnitude) -> None:
    """l2_gelu is invariant to the scale of a row; epsilon shows only where |A| nears 1e-6."""
    x, key, value = _draw()
    exact = [tensor.double().requires_grad_() for tensor in (x, key, value)]
    expected = statement.pattention(exact[0], [exact[1]], [exact[2]], 2.0)
    wanted = torch.autograd.grad(expected.sum(), exact)
    output, gradients = _run(x * magnitude, key, value, "l2_gelu", backend)
    assert statement.error(output, expected) < 1e-5
    assert statement.error(gradients[0] * magnitude, wanted[0]) < 2e-5
    assert statement.error(gradients[1], wanted[1]) < 2e-5
    assert statement.error(gradients[2], wanted[2]) < 2e-5


@pytest.mark.parametrize("magnitude", [1e-3, 1e6, 1e15, 1e18])
@backends
def test_huge_and_small_inputs_where_gelu_comes_first(backend, magnitude) -> None:
    x, key, value = _draw()
    output, gradients = _run(x * magnitude, key, value, "gelu_l2", backend)
    # In float64 the sum of squares has room; gelu is not homogeneous, so the statement sees the magnitude, too.
    exact = [tensor.double().requires_grad_() for tensor in (x * magnitude, key, value)]
    expected = statement.pattention(exact[0], [exact[1]], [exact[2]], 2.0, "gelu_l2")
    wanted = torch.autograd.grad(expected.sum(), exact)
    assert statement.error(output, expected) < 1e-4
    assert statement.error(gradients[0] * magnitude, wanted[0] * magnitude) < 1e-4
    assert statement.error(gradients[1], wanted[1]) < 1e-4
    assert statement.error(gradients[2], wanted[2]) < 1e-4


@backends
def test_softmax_has_the_whole_range_of_float32(backend) -> None:
    x, key, value = _draw()
    x = x * 1e37
    output, gradients = _run(x, key, value, "softmax", backend)
    winner = (x.double() @ key.double().T).argmax(-1)
    torch.testing.assert_close(output, 4 * value[winner])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("tokens", [2, 16, 400])
@l2_kinds
def test_the_limit_is_the_sum_of_squares_in_float32(normalization, tokens) -> None:
    """|A| of every token may reach sqrt(float32 max / N) = 1.8e19 / sqrt(N); beyond, the output is silently zero."""
    limit = math.sqrt(FLOAT32_MAX / tokens)
    key, value = torch.ones(tokens, 1), torch.full((tokens, 1), 0.5)
    exact = statement.pattention(torch.ones(1, 1).double(), [key.double()], [value.double()], 3.0, normalization)
    if normalization == "gelu_l2":  # of huge scores, on which gelu is the identity
        exact = torch.full_like(exact, 3.0 * tokens / math.sqrt(tokens) * 0.5)
    below, gradients = _run(torch.full((1, 1), 0.99 * limit), key, value, normalization, tau=3.0)
    assert statement.error(below, exact) < 1e-5
    assert all(gradient.isfinite().all() for gradient in gradients)

    beyond, gradients = _run(torch.full((1, 1), 1.01 * limit), key, value, normalization, tau=3.0)
    assert beyond.abs().max() == 0
    assert gradients[0].isnan().all(), "training notices"


@l2_kinds
def test_bfloat16_has_the_range_and_the_norm_of_float32(normalization) -> None:
    x, key, value = (tensor.bfloat16() for tensor in _draw())
    output, _ = _run(x * 1e15, key, value, normalization)
    expected = statement.pattention((x * 1e15).double(), [key.double()], [value.double()], 2.0, normalization)
    assert statement.error(output, expected) < statement.TOLERANCE[torch.bfloat16]


@l2_kinds
def test_float16_ends_where_a_score_does(normalization) -> None:
    """The norm is taken in float32, so scores whose squares overflow float16 are fine; scores above 65504 are not."""
    key, value = torch.ones(4, 1).half(), torch.ones(4, 1).half()
    fine, _ = _run(torch.full((1, 1), 6e4).half(), key, value, normalization)
    expected = statement.gelu(torch.tensor(1.0)) if normalization == "l2_gelu" else torch.tensor(1.0)
    torch.testing.assert_close(fine.float().squeeze(), 4 * expected, rtol=5e-3, atol=0)
    over, _ = _run(torch.full((1, 1), 6e4).half(), 2 * key, value, normalization)
    assert not over.isfinite().any()
