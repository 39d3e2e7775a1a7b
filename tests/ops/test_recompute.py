"""Recomputed weights: the same results and gradients, less kept, no product done twice."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tiny import tiny_ids, tiny_model
from tokenformer import Pattention, ops

NORMALIZATIONS = ("l2_gelu", "gelu_l2", "gelu_l1", "softmax")


def _draw(*tokens: int, dtype: torch.dtype = torch.float64):
    x = torch.randn(6, 5, dtype=dtype, requires_grad=True)
    keys = [torch.randn(n, 5, dtype=dtype, requires_grad=True) for n in tokens]
    values = [torch.randn(n, 3, dtype=dtype, requires_grad=True) for n in tokens]
    return x, keys, values


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("tokens", [(7,), (4, 9)])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_results_and_gradients_are_the_same(normalization: str, tokens: tuple[int, ...], hidden: bool) -> None:
    x, keys, values = _draw(*tokens)
    visible = [torch.rand(6, n) > 0.3 for n in tokens] if hidden else None
    tau = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    leaves = [x, *keys, *values, tau]
    outcomes = []
    for recompute in (False, True):
        output = ops.pattention(x, keys, values, tau, normalization=normalization, visible=visible, recompute=recompute)
        outcomes.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for plain, recomputed in zip(*outcomes, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=1e-10)


def _kept(recompute: bool, autocast: bool) -> int:
    """Bytes as large as rows times tokens that the forward pass keeps, each storage once."""
    x, keys, values = _draw(40, 30, dtype=torch.float32)
    sizes = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape in ((6, 40), (6, 30)):
            sizes[tensor.untyped_storage().data_ptr()] = tensor, tensor.numel() * tensor.element_size()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        ops.pattention(x, keys, values, 2.0, recompute=recompute)
    return sum(size for _, size in sizes.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_the_scores_alone_are_kept(autocast: bool) -> None:
    scores = 6 * (40 + 30) * (2 if autocast else 4)
    # Beside them: the scores times tau over the norm, in float32, and the weights.
    assert _kept(recompute=False, autocast=autocast) == 2 * scores + 6 * (40 + 30) * 4
    assert _kept(recompute=True, autocast=autocast) == scores


def test_no_product_is_done_twice() -> None:
    flops = []
    for recompute in (False, True):
        x, keys, values = _draw(7, 4)
        with FlopCounterMode(display=False) as counter:
            ops.pattention(x, keys, values, 2.0, recompute=recompute).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] == 6 * 6 * 11 * (5 + 3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_with_several_segments(checkpointing: bool) -> None:
    segments = [{"name": "base", "qkv": 12, "output": 10, "ffn": 20}, {"name": "more", "qkv": 3, "output": 0, "ffn": 4}]
    model, ids = tiny_model(segments=segments).double().train(), tiny_ids()
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.set_recompute()
    assert all(layer.recompute for layer in model.modules() if isinstance(layer, Pattention))
    if checkpointing:
        # transformers 5.21 renamed the method.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-12)
    model.set_recompute(False)
    assert not any(layer.recompute for layer in model.modules() if isinstance(layer, Pattention))


def test_compiles_without_a_break() -> None:
    layer = Pattention(5, 3, 8)
    layer.add_segment("more", 4)
    x = torch.randn(6, 5, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    layer.recompute = True
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)
