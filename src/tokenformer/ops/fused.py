"""The fast path: two matrix products per segment with everything between them in one element-wise chain.

Written so that torch.compile fuses the chain into the products' surroundings (no graph breaks, no data-dependent
control flow). Segments are never concatenated: sharded ones would be gathered by that.
"""

from collections.abc import Sequence
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tokenformer.ops.activations import Activation, get_activation
from tokenformer.ops.normalization import Normalization, get_normalization
from tokenformer.ops.products import linear


def segment_activities(
    x: torch.Tensor,
    key: torch.Tensor,
    *,
    normalization: str = "l2_gelu",
    activation: str | Activation = "gelu",
    visible: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Phase one of a segment: activities (..., N) and the row statistic (..., 1).

    The statistic is the sum of squares for the L2 kinds, that of magnitudes for `gelu_l1`, and the log-sum-exp for
    `softmax`.
    """
    kind = get_normalization(normalization)
    activities = kind.activities(linear(x, key), get_activation(activation), visible)
    return activities, kind.statistic(activities)


def segment_output(
    activities: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | float,
    total: torch.Tensor,
    *,
    normalization: str = "l2_gelu",
    activation: str | Activation = "gelu",
    eps: float = 1e-12,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """Phase two of a segment: its share (..., D_out) of the output, given the row total over all segments."""
    kind, function = get_normalization(normalization), get_activation(activation)
    return _share(activities, value, scale, total, kind, function, eps, visible)


def fused_segments(
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
    recompute: bool = False,
) -> torch.Tensor:
    """Both phases over all segments; `total` (..., 1), where given, stands for the row total of a larger set.

    With `recompute`, phase two keeps its inputs only; the backward pass makes the weights from them again. The product
    with the values is not repeated: a checkpoint stops once it has what it needs.
    """
    kind, function = get_normalization(normalization), get_activation(activation)
    masks = [None] * len(keys) if visible is None else visible
    activities = [kind.activities(linear(x, key), function, mask) for key, mask in zip(keys, masks, strict=True)]
    if total is None:
        total = kind.combine([kind.statistic(segment) for segment in activities])
    share = partial(checkpoint, _share, use_reentrant=False) if recompute and torch.is_grad_enabled() else _share
    shares = [
        share(segment, value, scale, total, kind, function, eps, mask)
        for segment, value, mask in zip(activities, values, masks, strict=True)
    ]
    return reduce(torch.add, shares)


def _share(
    activities: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | float,
    total: torch.Tensor,
    kind: Normalization,
    function: Activation,
    eps: float,
    visible: torch.Tensor | None,
) -> torch.Tensor:
    weights = kind.weights(activities, total, scale, function, eps)
    if visible is not None:
        # An activation with f(0) != 0 would let a hidden token speak.
        weights = weights.masked_fill(~visible, 0)
    return F.linear(weights.to(activities.dtype), value.T)
