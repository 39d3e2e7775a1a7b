"""The fast path: two matrix products per segment with everything between them in one element-wise chain.

Written so that torch.compile fuses the chain into the products' surroundings (no graph breaks, no data-dependent
control flow). Segments are never concatenated: sharded ones would be gathered by that.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tokenformer.ops.activations import Activation, get_activation
from tokenformer.ops.normalization import get_normalization


def segment_activities(
    x: torch.Tensor,
    key: torch.Tensor,
    *,
    normalization: str = "l2_gelu",
    activation: str | Activation = "gelu",
    visible: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Phase one of a segment: activities (..., N) and the row statistic (..., 1).

    The statistic is the sum of squares for the L2 kinds and the log-sum-exp for `softmax`.
    """
    kind = get_normalization(normalization)
    activities = kind.activities(F.linear(x, key), get_activation(activation), visible)
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
    weights = get_normalization(normalization).weights(activities, total, scale, get_activation(activation), eps)
    if visible is not None:
        # An activation with f(0) != 0 would let a hidden token speak.
        weights = weights.masked_fill(~visible, 0)
    return F.linear(weights.to(activities.dtype), value.T)


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
) -> torch.Tensor:
    """Both phases over all segments; `total` (..., 1), where given, stands for the row total of a larger set."""
    masks = [None] * len(keys) if visible is None else list(visible)
    activities, statistics = zip(
        *(
            segment_activities(x, key, normalization=normalization, activation=activation, visible=mask)
            for key, mask in zip(keys, masks, strict=True)
        ),
        strict=True,
    )
    if total is None:
        total = get_normalization(normalization).combine(statistics)
    shares = [
        segment_output(a, v, scale, total, normalization=normalization, activation=activation, eps=eps, visible=mask)
        for a, v, mask in zip(activities, values, masks, strict=True)
    ]
    output = shares[0]
    for share in shares[1:]:
        output = output + share
    return output
