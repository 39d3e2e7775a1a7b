"""Outputs and all gradients of both backends against the float64 statement; activations."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import statement
from tokenformer import UserError, ops

NORMALIZATIONS = ("l2_gelu", "gelu_l2", "gelu_l1", "softmax")
BACKENDS = ("fused", "reference")

# leading shape, channels in, channels out, tokens of each segment
SHAPES = {
    "one-token": ((3,), 5, 2, (1,)),
    "one-row": ((1,), 4, 4, (6,)),
    "no-batch": ((), 5, 3, (4,)),
    "odd-sizes": ((3,), 7, 5, (13,)),
    "more-leading": ((2, 1, 3), 4, 6, (8,)),
    "wide-out": ((2, 5), 3, 17, (33,)),
    "two-segments": ((2, 3), 6, 4, (4, 3)),
    "three-segments": ((4,), 5, 5, (2, 1, 5)),
    "empty-batch": ((0,), 4, 3, (2, 3)),
}
shapes = pytest.mark.parametrize(
    ("leading", "channels", "out", "tokens"), [pytest.param(*shape, id=name) for name, shape in SHAPES.items()]
)
normalizations = pytest.mark.parametrize("normalization", NORMALIZATIONS)
backends = pytest.mark.parametrize("backend", BACKENDS)


def _draw(leading, channels, out, tokens, dtype=torch.float64):
    x = torch.randn(*leading, channels, dtype=torch.float64)
    keys = [torch.randn(n, channels, dtype=torch.float64) / channels**0.5 for n in tokens]
    values = [torch.randn(n, out, dtype=torch.float64) for n in tokens]
    return [tensor.to(dtype).requires_grad_() for tensor in (x, *keys, *values)]


def _value_and_gradients(function, leaves, upstream):
    output = function(leaves[0], leaves[1 : 1 + len(leaves) // 2], leaves[1 + len(leaves) // 2 :])
    return output, torch.autograd.grad(output, leaves, upstream.to(output.dtype))


# The reference computes in the precision of its inputs, which is not meant for 16 bits.
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
        for backend in BACKENDS
        for dtype in statement.TOLERANCE
        if backend == "fused" or dtype.itemsize >= 4
    ],
)
@shapes
@normalizations
def test_output_and_gradients_are_those_of_the_equation(
    normalization, leading, channels, out, tokens, backend, dtype
) -> None:
    tau = 1.7
    leaves = _draw(leading, channels, out, tokens, dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    upstream = torch.randn(*leading, out).to(dtype).double()

    output, gradients = _value_and_gradients(
        # without an epsilon, as in the equation
        lambda x, k, v: ops.pattention(x, k, v, tau, normalization=normalization, eps=0.0, backend=backend),
        leaves,
        upstream,
    )
    expected, expected_gradients = _value_and_gradients(
        lambda x, k, v: statement.pattention(x, k, v, tau, normalization), exact, upstream
    )
    assert output.dtype == dtype
    assert statement.error(output, expected) < statement.TOLERANCE[dtype]
    for gradient, wanted, leaf in zip(gradients, expected_gradients, leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert statement.error(gradient, wanted) < statement.TOLERANCE[dtype]


@backends
def test_a_case_computed_by_hand(backend) -> None:
    """Scores 3 and 4, norm 5, tau 10: weights 6 and 8, on which gelu is the identity to 1e-8."""
    x, key = torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    value = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]])
    output = ops.pattention(x, key, value, 10.0, backend=backend)
    torch.testing.assert_close(output, torch.tensor([6.0, 8.0, -2.0]), rtol=0, atol=1e-5)
    # softmax of (3, 4) times 100
    output = ops.pattention(x, key, value, 10.0, backend=backend, normalization="softmax")
    first = 100 / (1 + math.e)
    torch.testing.assert_close(output, torch.tensor([first, 100 - first, 2 * first - 100]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [2.5, torch.tensor(2.5), torch.tensor(2.5, dtype=torch.float64)], ids=repr)
@backends
def test_scale_may_be_a_number_or_a_tensor(backend, scale) -> None:
    x, key, value = (leaf.detach() for leaf in _draw((3,), 4, 2, (5,), torch.float32))
    output = ops.pattention(x, key, value, scale, backend=backend)
    assert output.dtype == torch.float32
    assert statement.error(output, statement.pattention(x.double(), [key.double()], [value.double()], 2.5)) < 1e-5


@normalizations
@backends
def test_first_and_second_derivatives_by_finite_differences(backend, normalization) -> None:
    leaves = _draw((2,), 3, 2, (3, 1))
    mask = torch.tensor([[True, False, True], [True, True, True]])

    def function(x, k1, k2, v1, v2):
        return ops.pattention(
            x, [k1, k2], [v1, v2], 1.3, normalization=normalization, backend=backend, visible=[mask, None]
        )

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


# Autocast


@normalizations
def test_autocast_stays_close_to_float64(normalization) -> None:
    x, *rest = _draw((4, 3), 16, 8, (24, 8), torch.float32)
    keys, values = rest[:2], rest[2:]
    with torch.autocast("cpu", torch.bfloat16):
        output = ops.pattention(x, keys, values, 5.0, normalization=normalization)
    gradients = torch.autograd.grad(output.float().sum(), [x, *rest])
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, *rest)]
    expected = statement.pattention(exact[0], exact[1:3], exact[3:], 5.0, normalization)
    assert output.dtype == torch.bfloat16
    assert statement.error(output, expected) < 4e-2
    # The gradients of rounded scores: softmax over scores of about 10 amplifies their error tenfold.
    limit = 0.3 if normalization == "softmax" else 6e-2
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert gradient.dtype == torch.float32
        assert statement.error(gradient, wanted) < limit


# Activations

FORMULAS = {
    "gelu": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2,
    "identity": lambda z: z,
    "relu": lambda z: max(z, 0.0),
    "relu_squared": lambda z: max(z, 0.0) ** 2,
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "silu": lambda z: z / (1 + math.exp(-z)),
    "softplus": lambda z: math.log1p(math.exp(z)),
    "tanh": math.tanh,
    # names that only transformers knows
    "gelu_new": lambda z: z / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "quick_gelu": lambda z: z / (1 + math.exp(-1.702 * z)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_named_activation_is_its_formula(name) -> None:
    points = [-3.0, -1.0, -0.1, 0.0, 0.5, 2.0]
    actual = ops.get_activation(name)(torch.tensor(points, dtype=torch.float64))
    expected = torch.tensor([FORMULAS[name](point) for point in points], dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        pytest.param("relu", lambda z: z.clamp(min=0), id="by-name"),
        pytest.param(F.silu, lambda z: z / (1 + torch.exp(-z)), id="torch-function"),
        pytest.param(lambda z: z**3, lambda z: z * z * z, id="lambda"),
        pytest.param(nn.LeakyReLU(0.5), lambda z: torch.where(z > 0, z, z / 2), id="module"),
        pytest.param("gelu_new", lambda z: F.gelu(z, approximate="tanh"), id="transformers-name"),
    ],
)
@pytest.mark.parametrize("normalization", ["l2_gelu", "gelu_l2", "gelu_l1"])
@backends
def test_activation_enters_the_equation(backend, normalization, activation, function) -> None:
    x, key, value = (leaf.detach() for leaf in _draw((6,), 4, 3, (7,)))
    output = ops.pattention(x, key, value, 1.3, normalization=normalization, activation=activation, backend=backend)
    expected = statement.pattention(x, [key], [value], 1.3, normalization, function)
    assert statement.error(output, expected) < 1e-9


@backends
def test_unknown_names_are_user_errors(backend) -> None:
    x, key, value = (leaf.detach() for leaf in _draw((2,), 4, 3, (5,)))
    with pytest.raises(UserError, match=r"unknown activation 'swoosh'.*gelu"):
        ops.pattention(x, key, value, 1.0, activation="swoosh", backend=backend)
    with pytest.raises(UserError, match=r"unknown normalization 'l3'.*l2_gelu"):
        ops.pattention(x, key, value, 1.0, normalization="l3", backend=backend)


def test_backends_that_cannot_are_refused() -> None:
    x, key, value = (leaf.detach() for leaf in _draw((2,), 4, 3, (5,)))
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        ops.pattention(x, key, value, 1.0, backend="cuda")
    with pytest.raises(ValueError, match="backend='fused'"):
        ops.pattention(x, key, value, 1.0, backend="reference", total=torch.ones(2, 1))


def test_auto_backend_is_the_fused_one() -> None:
    x, key, value = (leaf.detach() for leaf in _draw((2,), 4, 3, (5,), torch.float32))
    assert torch.equal(ops.pattention(x, key, value, 1.0), ops.pattention(x, key, value, 1.0, backend="fused"))


# torch.compile


@pytest.mark.parametrize(
    ("normalization", "tokens", "backend"),
    [
        pytest.param("l2_gelu", (5, 3), "inductor", id="l2_gelu-two-segments-inductor", marks=pytest.mark.slow),
        pytest.param("l2_gelu", (6,), "aot_eager", id="l2_gelu-one-segment"),
        pytest.param("gelu_l2", (4, 2, 1), "aot_eager", id="gelu_l2-three-segments"),
        pytest.param("gelu_l1", (4, 2), "aot_eager", id="gelu_l1-two-segments"),
        pytest.param("softmax", (4, 2), "aot_eager", id="softmax-two-segments"),
    ],
)
def test_compiles_without_graph_breaks_and_equals_eager(normalization, tokens, backend) -> None:
    torch._dynamo.reset()
    leaves = _draw((3,), 4, 2, tokens, torch.float32)
    upstream = torch.randn(3, 2)

    def eager(x, keys, values):
        return ops.pattention(x, keys, values, 2.0, normalization=normalization)

    compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend=backend)
    output, gradients = _value_and_gradients(compiled, leaves, upstream)
    expected, expected_gradients = _value_and_gradients(eager, leaves, upstream)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
