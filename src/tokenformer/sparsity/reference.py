"""What a sparse layer means, step by step: every token is scored and those not chosen are masked. Slow, and exact."""

import torch

from tokenformer.ops import get_activation
from tokenformer.sparse import SparsePattention


@torch.no_grad()
def masked_dense(layer: SparsePattention, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The output (R, D_out), in float64, of rows x (R, D_in) that compute the groups `chosen` (R, k)."""
    x, key, value = x.double(), layer.key.double(), layer.value.double()
    scores = x @ key.T
    # The norm over all scores, not through the Gram identity.
    directions = layer.scale.double() / torch.sqrt(scores.square().sum(-1, keepdim=True) + layer.eps)
    weights = get_activation(layer.activation)(scores * directions)
    computed = torch.zeros(len(x), layer.num_groups, dtype=torch.bool, device=x.device).scatter(1, chosen, True)
    weights = weights * computed.repeat_interleave(layer.group_size, dim=1)
    rest = (x * directions) @ layer.down.double().T @ layer.up.double().T + layer.bias.double()
    return weights @ value + rest
