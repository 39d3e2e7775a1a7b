"""The middle of Pattention as a pair of Triton kernels: scores to weights, and back, each a single pass over memory.

For `l2_gelu` with GeLU. Checked on a CPU by Triton's interpreter, never run on a GPU: nothing chooses them by itself.

Shapes: R rows, N parameter tokens. With the row total s, r = tau / sqrt(s + eps) and u = r A the weights are
W = gelu(u). Given dW, g = dW gelu'(u) and p = sum(g A) over the row: dA = r g + 2 A ds where the total is that of the
row itself, dA = r g where it is given; ds = -p r / (2 (s + eps)) and dtau = sum(p r) / tau over the rows.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from tokenformer.ops.activations import Activation
from tokenformer.ops.normalization import get_normalization

_LARGEST_BLOCK = 4096


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]  # Triton has types of its own
    scores, scale, total, weights, num_tokens, eps, GIVEN: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    if GIVEN:
        row_total = tl.load(total + row)
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, num_tokens, BLOCK):
            inside = start + columns < num_tokens
            a = tl.load(scores + row * num_tokens + start + columns, mask=inside, other=0.0).to(tl.float32)
            squares += a * a
        row_total = tl.sum(squares)
        tl.store(total + row, row_total)
    factor = tl.load(scale) / tl.sqrt(row_total + eps)
    for start in range(0, num_tokens, BLOCK):
        inside = start + columns < num_tokens
        u = tl.load(scores + row * num_tokens + start + columns, mask=inside, other=0.0).to(tl.float32) * factor
        weight = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
        tl.store(weights + row * num_tokens + start + columns, weight.to(weights.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]  # as above
    gradient, scores, scale, total, to_scores, to_total, num_tokens, eps, GIVEN: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    row_total = tl.load(total + row) + eps
    factor = tl.load(scale) / tl.sqrt(row_total)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_tokens, BLOCK):
        inside = start + columns < num_tokens
        a = tl.load(scores + row * num_tokens + start + columns, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gradient + row * num_tokens + start + columns, mask=inside, other=0.0).to(tl.float32)
        u = a * factor
        slope = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
        products += g * slope * a
    row_gradient = -0.5 * tl.sum(products) * factor / row_total
    tl.store(to_total + row, row_gradient)
    for start in range(0, num_tokens, BLOCK):
        inside = start + columns < num_tokens
        a = tl.load(scores + row * num_tokens + start + columns, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gradient + row * num_tokens + start + columns, mask=inside, other=0.0).to(tl.float32)
        u = a * factor
        slope = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
        result = g * slope * factor
        if not GIVEN:
            result += 2.0 * a * row_gradient
        tl.store(to_scores + row * num_tokens + start + columns, result.to(to_scores.dtype.element_ty), mask=inside)


@triton_op("tokenformer::normalized_gelu", mutates_args=())
def _own_total(scores: torch.Tensor, scale: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (R, N) of scores (R, N) and their sums of squares (R,)."""
    total = torch.empty(len(scores), dtype=torch.float32, device=scores.device)
    return _launch_forward(scores, scale, total, eps, given=False), total


@triton_op("tokenformer::normalized_gelu_of_part", mutates_args=())
def _given_total(scores: torch.Tensor, scale: torch.Tensor, total: torch.Tensor, eps: float) -> torch.Tensor:
    """Weights (R, N) of scores (R, N) that are part of a row with the sum of squares `total` (R,)."""
    return _launch_forward(scores, scale, total, eps, given=True)


@triton_op("tokenformer::normalized_gelu_backward", mutates_args=())
def _backward(
    gradient: torch.Tensor, scores: torch.Tensor, scale: torch.Tensor, total: torch.Tensor, eps: float, given: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients to scores (R, N) and to the total (R,); unless it is given, the latter is in the former."""
    to_scores, to_total = torch.empty_like(scores), torch.empty_like(total)
    rows, num_tokens = scores.shape
    if scores.numel():
        wrap_triton(_backward_kernel)[(rows,)](
            gradient.contiguous(),
            scores,
            scale,
            total,
            to_scores,
            to_total,
            num_tokens,
            eps,
            GIVEN=given,
            BLOCK=_block(num_tokens),
        )
    return to_scores, to_total


def _launch_forward(
    scores: torch.Tensor, scale: torch.Tensor, total: torch.Tensor, eps: float, *, given: bool
) -> torch.Tensor:
    weights = torch.empty_like(scores)
    rows, num_tokens = scores.shape
    if scores.numel():
        wrap_triton(_forward_kernel)[(rows,)](
            scores, scale, total, weights, num_tokens, eps, GIVEN=given, BLOCK=_block(num_tokens)
        )
    return weights


def _block(num_tokens: int) -> int:
    return min(_LARGEST_BLOCK, triton.next_power_of_2(num_tokens))


def _keep_own(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    scores, scale, ctx.eps = inputs
    ctx.save_for_backward(scores, scale, output[1])


def _own_gradients(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
    scores, scale, total = ctx.saved_tensors
    to_scores, to_total = _backward(gradient, scores, scale, total, ctx.eps, False)
    return to_scores, _to_scale(ctx, scale, total, to_total), None


def _keep_given(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    scores, scale, total, ctx.eps = inputs
    ctx.save_for_backward(scores, scale, total)


def _given_gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, None]:
    scores, scale, total = ctx.saved_tensors
    to_scores, to_total = _backward(gradient, scores, scale, total, ctx.eps, True)
    return to_scores, _to_scale(ctx, scale, total, to_total), to_total, None


def _to_scale(ctx: Any, scale: torch.Tensor, total: torch.Tensor, to_total: torch.Tensor) -> torch.Tensor | None:
    return (-2 * to_total * (total + ctx.eps)).sum() / scale if ctx.needs_input_grad[1] else None


_own_total.register_autograd(_own_gradients, setup_context=_keep_own)
_given_total.register_autograd(_given_gradients, setup_context=_keep_given)


def triton_segments(
    x: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    scale: torch.Tensor | float,
    visible: Sequence[torch.Tensor | None] | None = None,
    *,
    normalization: str = "l2_gelu",
    activation: str | Activation = "gelu",
    eps: float = 1e-12,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `fused_segments`, with the kernels between the two products.

    Raises:
        ValueError: another normalization or activation than `l2_gelu` with `gelu`, or float64.
    """
    if normalization != "l2_gelu" or activation not in ("gelu", F.gelu):
        raise ValueError("backend 'triton' computes l2_gelu with gelu alone: use backend='fused'")
    kind = get_normalization(normalization)
    masks = [None] * len(keys) if visible is None else visible
    # gelu(0) = 0, so a token hidden here stays silent.
    scores = [kind.activities(F.linear(x, key), F.gelu, mask) for key, mask in zip(keys, masks, strict=True)]
    if scores[0].dtype == torch.float64:
        raise ValueError("backend 'triton' computes in float32: use backend='fused' for float64")
    tau = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    if total is None and len(keys) > 1:
        total = kind.combine([kind.statistic(segment) for segment in scores])
    shares = [F.linear(_weights(part, tau, total, eps), value.T) for part, value in zip(scores, values, strict=True)]
    return reduce(torch.add, shares)


def _weights(scores: torch.Tensor, tau: torch.Tensor, total: torch.Tensor | None, eps: float) -> torch.Tensor:
    rows = scores.reshape(-1, scores.shape[-1]).contiguous()
    if total is None:
        weights, _ = _own_total(rows, tau, eps)
    else:
        weights = _given_total(rows, tau, total.float().expand(*scores.shape[:-1], 1).reshape(-1).contiguous(), eps)
    return weights.view(scores.shape)
