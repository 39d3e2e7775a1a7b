"""How the weights f(tau A / ||A||) of a model's tokens are spread: what sparsity can and cannot use."""

from typing import Any

import torch

from tokenformer.errors import UserError
from tokenformer.models.modeling_tokenformer import TokenFormerForCausalLM
from tokenformer.ops import get_activation
from tokenformer.pattention import Pattention
from tokenformer.sparse import norm_factor

# A weight below this is called small: scores have a mean square of tau^2 / N, 1 in a model that has not grown.
_SMALL = 0.1


@torch.no_grad()
def activation_statistics(model: TokenFormerForCausalLM, rows: torch.Tensor) -> dict[str, dict[str, Any]]:
    """By the name of each layer, how the weights of its tokens are spread over calibration text.

    Args:
        model: dense, with `l2_gelu`.
        rows: token ids (B, T); all of them are read at once.

    Returns:
        - `kind` and `num_tokens`;
        - `positive`: share of scores above 0;
        - `small`: share of weights between -0.1 and 0.1;
        - `zero`: share of weights that are 0, as ReLU makes them;
        - `energy`: share of (weight times value norm)^2 in the loudest 10 %, 25 % and 50 % of an input's tokens, over
          the inputs on which any speaks; None if there are none, as in a layer of ReLU that has died;
        - `varying`: share of the energy of the output that is not its mean; None if the output is 0.

    Raises:
        UserError: another normalisation.
    """
    if model.config.normalization != "l2_gelu":
        raise UserError(f"normalization '{model.config.normalization}': only the weights of l2_gelu are described")
    found: dict[str, dict[str, Any]] = {}

    def describe(name: str, layer: Pattention, x: torch.Tensor) -> None:
        parts = [segment(x) for segment in layer.segments.values()]
        key = torch.cat([key for key, _ in parts]).float()
        value = torch.cat([value for _, value in parts]).float()
        x = x.flatten(0, -2).float()
        norm = torch.linalg.vector_norm(x @ norm_factor(key).T, dim=-1, keepdim=True)
        scores = x @ key.T * (layer.scale / norm.clamp_min(1e-30))
        weights = get_activation(layer.activation)(scores)
        energy = (weights * value.norm(dim=1)).square().sort(dim=1, descending=True).values.cumsum(1)
        spoken = energy[energy[:, -1] > 0]
        output = weights @ value
        total = output.square().sum()
        found[name] = {
            "kind": layer.kind,
            "num_tokens": layer.num_tokens,
            "positive": (scores > 0).float().mean().item(),
            "small": (weights.abs() < _SMALL).float().mean().item(),
            "zero": (weights == 0).float().mean().item(),
            "energy": {
                f"{share:g}": (spoken[:, max(1, round(share * layer.num_tokens)) - 1] / spoken[:, -1]).mean().item()
                for share in (0.1, 0.25, 0.5)
            }
            if len(spoken)
            else None,
            "varying": ((output - output.mean(0)).square().sum() / total).item() if total > 0 else None,
        }

    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: describe(name, layer, args[0]))
        for name, layer in model.named_modules()
        if isinstance(layer, Pattention)
    ]
    try:
        model(rows.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found
