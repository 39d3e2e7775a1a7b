"""The product of inputs and weights: what it equals, and where it is written as dot products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenformer import Pattention
from tokenformer.ops import products
from tokenformer.ops.products import linear

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
ONE_ROW = [(12,), (1, 12), (1, 1, 12)]


def traced(function, *inputs):
    """What `function` gives compiled, and the names of the operations in its graph."""
    names = []

    def look(graph, example):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    torch.compiler.reset()
    output = torch.compile(function, fullgraph=True, backend=look)(*inputs)
    return output, " ".join(names)


@dtypes
@pytest.mark.parametrize("shape", [*ONE_ROW, (3, 12), (2, 1, 12)], ids=str)
def test_equals_the_matrix_product(shape, dtype):
    x, weight = torch.randn(shape).to(dtype), torch.randn(7, 12).to(dtype)
    expected = x.double() @ weight.double().T
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for output in (linear(x, weight), traced(linear, x, weight)[0]):
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", ONE_ROW, ids=str)
def test_gradients_of_one_row_are_those_of_the_product(shape):
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(7, 12, dtype=torch.float64)
    x, weight, upstream = x.requires_grad_(), weight.requires_grad_(), torch.randn(*shape[:-1], 7, dtype=torch.float64)
    output, graph = traced(linear, x, weight)
    assert "linear" not in graph
    found = torch.autograd.grad(output, (x, weight), upstream)
    expected = torch.autograd.grad(F.linear(x, weight), (x, weight), upstream)
    for result, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-12)


class Quantised(nn.Parameter):
    """Stands for weights of other classes, which define their own products."""


@pytest.mark.parametrize(
    ("shape", "dots"), [((1, 1, 12), True), ((1, 12), True), ((2, 12), False), ((2, 1, 12), False)], ids=str
)
def test_one_row_alone_is_written_as_dot_products(shape, dots):
    _, graph = traced(linear, torch.randn(shape), torch.randn(7, 12))
    assert ("sum" in graph, "linear" in graph) == (dots, not dots)


def test_weights_of_other_classes_and_autocast_keep_the_product():
    x, weight = torch.randn(1, 12), torch.randn(7, 12)

    def cast(x, weight):
        with torch.autocast("cpu", torch.bfloat16):
            return linear(x, weight)

    output, graph = traced(cast, x, weight)
    assert "linear" in graph
    assert output.dtype == torch.bfloat16
    assert not products._is_one_row(x, Quantised(weight))


def test_exported_graphs_keep_the_product():
    layer = Pattention(12, 5, 7).eval()
    program = torch.export.export(layer, (torch.randn(1, 12),))
    assert str(program.graph).count("aten.linear") == 2


@pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("inductor", marks=pytest.mark.slow)],  # slow: two graphs through the C++ compiler
)
def test_growth_with_zero_keys_changes_no_bit_of_a_compiled_row(backend):
    layer, x = Pattention(24, 40, 17), torch.randn(1, 1, 24)
    before = torch.compile(layer, fullgraph=True, backend=backend)(x)
    torch.nn.init.zeros_(layer.add_segment("grown1", 9).key)
    torch.compiler.reset()
    after = torch.compile(layer, fullgraph=True, backend=backend)(x)
    assert torch.equal(after, before)
    torch.testing.assert_close(before, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # a graph through the C++ compiler
@dtypes
def test_one_row_through_the_compiler(dtype):
    x, weight = torch.randn(1, 1, 33).to(dtype), torch.randn(50, 33).to(dtype)
    torch.compiler.reset()
    output = torch.compile(linear, fullgraph=True)(x, weight)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(output.double(), x.double() @ weight.double().T, rtol=tolerance, atol=tolerance)
