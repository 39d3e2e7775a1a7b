"""The equation in plain PyTorch: the ground truth that every faster path is tested against.

TokenFormer (Wang et al., ICLR 2025), Eq. 4 and 16. Nothing here is clever: all tokens in one product, in the
precision of the inputs. Pass float64 tensors to get the exact values.
"""

from collections.abc import Sequence

import torch

from tokenformer.ops.activations import Activation, get_activation


def reference_pattention(
    x: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | float,
    *,
    normalization: str = "l2_gelu",
    activation: str | Activation = "gelu",
    eps: float = 1e-12,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of inputs over parameter tokens.

    Args:
        x: inputs, (..., D_in).
        key: keys of the N parameter tokens, (N, D_in).
        value: values of the N parameter tokens, (N, D_out).
        scale: tau, a scalar.
        normalization: `l2_gelu` f(tau A / ||A||), `gelu_l2` tau f(A) / ||f(A)||, `gelu_l1` tau^2 f(A) / ||f(A)||_1, or
            `softmax` tau^2 softmax(A).
        activation: f, GeLU in the paper.
        eps: added to the sum of squares under the root, or of magnitudes, so that a row of zeros stays finite.
        visible: booleans broadcastable to (..., N); where False the token does not exist for that input.

    Returns:
        (..., D_out)
    """
    function = get_activation(activation)
    scores = x @ key.T
    hidden = torch.zeros_like(scores, dtype=torch.bool) if visible is None else ~visible.expand_as(scores)
    if normalization == "l2_gelu":
        scores = scores.masked_fill(hidden, 0)
        norm = (scores.square().sum(-1, keepdim=True) + eps).sqrt()
        weights = function(scale * scores / norm)
    elif normalization == "gelu_l2":
        activated = function(scores).masked_fill(hidden, 0)
        norm = (activated.square().sum(-1, keepdim=True) + eps).sqrt()
        weights = scale * activated / norm
    elif normalization == "gelu_l1":
        activated = function(scores).masked_fill(hidden, 0)
        weights = scale**2 * activated / (activated.abs().sum(-1, keepdim=True) + eps)
    elif normalization == "softmax":
        weights = scale**2 * torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
    else:
        raise ValueError(f"unknown normalization '{normalization}'")
    return weights.masked_fill(hidden, 0) @ value


def reference_segments(
    x: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    scale: torch.Tensor | float,
    visible: Sequence[torch.Tensor | None] | None = None,
    **options: object,
) -> torch.Tensor:
    """`reference_pattention` over several segments, laid side by side."""
    mask = None
    if visible is not None and any(v is not None for v in visible):
        rows = x.shape[:-1]
        full = [torch.ones(1, dtype=torch.bool, device=x.device) if v is None else v for v in visible]
        mask = torch.cat([v.expand(*rows, len(key)) for v, key in zip(full, keys, strict=True)], dim=-1)
    key, value = torch.cat(list(keys)), torch.cat(list(values))
    # Passed on as they are: the function called says their types.
    return reference_pattention(x, key, value, scale, visible=mask, **options)  # type: ignore[arg-type]
