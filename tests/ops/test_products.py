"""The product of inputs and weights: what it equals, and where it is written as dot products."""

import pytest
import torch
from torch import nn

from tokenformer import Pattention
from tokenformer.ops import products
from tokenformer.ops.products import linear

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def traced(function, *inputs, gradients=False):
    """What `function` gives compiled, and the names of the operations in its graph."""
    names = []

    def look(graph, example):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    torch.compiler.reset()
    with torch.set_grad_enabled(gradients):
        output = torch.compile(function, fullgraph=True, backend=look)(*inputs)
    return output, " ".join(names)


@dtypes
@pytest.mark.parametrize("shape", [(12,), (1, 12), (1, 1, 12), (3, 12), (2, 1, 12)], ids=str)
def test_equals_the_matrix_product(shape, dtype):
    x, weight = torch.randn(shape).to(dtype), torch.randn(7, 12).to(dtype)
    expected = x.double() @ weight.double().T
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for output in (linear(x, weight), traced(linear, x, weight)[0]):
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_view_into_a_larger_tensor_is_read_where_it_lies():
    rows, weight = torch.randn(5, 12), torch.randn(7, 12)
    for x in (rows[3:4], rows.T[:12, 2], torch.randn(12, 3)[None, :, 1]):
        output, graph = traced(linear, x, weight)
        assert "sum" in graph
        torch.testing.assert_close(output, x @ weight.T)


def test_with_gradients_the_product_stays():
    x, weight = torch.randn(1, 12), torch.randn(7, 12, requires_grad=True)
    output, graph = traced(linear, x, weight, gradients=True)
    assert "linear" in graph
    assert output.requires_grad


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
    with torch.no_grad():
        assert products._is_decoding(x, nn.Parameter(weight))
        assert not products._is_decoding(x, Quantised(weight))


def test_exported_graphs_keep_the_product():
    layer = Pattention(12, 5, 7).eval()
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(1, 12),))
    assert str(program.graph).count("aten.linear") == 2


@pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("inductor", marks=pytest.mark.slow)],  # slow: two graphs through the C++ compiler
)
@torch.no_grad()
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
@torch.no_grad()
def test_one_row_through_the_compiler(dtype):
    x, weight = torch.randn(1, 1, 33).to(dtype), torch.randn(50, 33).to(dtype)
    torch.compiler.reset()
    output = torch.compile(linear, fullgraph=True)(x, weight)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(output.double(), x.double() @ weight.double().T, rtol=tolerance, atol=tolerance)


@pytest.mark.slow  # five graphs through the C++ compiler
@torch.no_grad()
def test_rows_cut_out_inside_the_graph_through_the_compiler():
    weight, x = torch.randn(9, 33), torch.randn(1, 7, 33)
    cuts = [
        lambda x: torch.layer_norm(x, (33,))[:, -1:],
        lambda x: (x + 1)[:, 3],
        lambda x: x.cos().transpose(1, 2)[:, :7, 5].repeat(1, 5)[:, 1:34],
        lambda x: torch.cat((x, x.sin()), -1)[:, 2:3, 20:53],
        lambda x: torch.cat((x, 3 * x), 1).split([3, 1, 10], 1)[1],
    ]
    for cut in cuts:
        torch.compiler.reset()
        output = torch.compile(lambda x, cut=cut: linear(cut(x), weight), fullgraph=True)(x)
        torch.testing.assert_close(output, cut(x) @ weight.T, rtol=1e-4, atol=1e-4)
