"""What explanations of texts and of images have in common: the model, what is likeliest, which tokens matter most."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from tokenformer.interpret.addresses import TokenAddress, pattention_layers, segment_sizes
from tokenformer.interpret.attribution import Contributions
from tokenformer.interpret.tallies import state
from tokenformer.tuning.adapters import kind_of

FORMAT = 1
# Likeliest outcomes, and those that a value raises or lowers most.
LISTED = 10

# What the figures of both kinds do not show.
STRONGEST = (
    "Strongest means the largest |weight| times length of the value: what a token adds to its layer's output. Later "
    "layers may undo it."
)
GRADIENT = (
    "Gradient contributions count all later layers, to first order: minus them is an estimate of the measured change, "
    "which leaves out curvature and that the norm of the scores changes too."
)
MEASURED = (
    "Measured: the logit with the token switched off at all positions, minus the logit with it. Tokens taken off "
    "together need not do the sum of what they do alone. Without a token the others share the norm and speak louder."
)
SHARES = "Shares of segments add up to 1 and can be negative: of a segment that speaks against the rest."


def short(number: float) -> float:
    """Five digits: a page shows fewer, and the file is half as large."""
    return float(f"{number:.5g}")


def own_address(text: str) -> TokenAddress:
    """An address that came from here; `find_token`, which takes any, looks through the whole model."""
    layer, segment, place = text.rsplit("/", 2)
    return TokenAddress(layer, segment, int(place))


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """Name, parameters, layers and segments of a model, as the page shows them."""
    layers = []
    for name, layer in pattention_layers(model).items():
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        sizes = segment_sizes(model, name)
        layers.append(
            {
                "name": name,
                "kind": kind_of(layer),
                "block": numbers[0] if numbers else 0,
                "segments": [{"name": segment, "num_tokens": size} for segment, size in sizes.items()],
            }
        )
    name = str(model.config.name_or_path).rstrip("/").rpartition("/")[2]
    return {"name": name or type(model).__name__, "parameters": model.num_parameters(), "layers": layers}


def likeliest(logits: torch.Tensor, name: Callable[[int], str], count: int = LISTED) -> list[dict[str, Any]]:
    """The outcomes of the highest logits (V,), highest first: `id`, `piece` (its name) and `probability` of each."""
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    best = torch.softmax(wide, -1).topk(min(count, len(wide)))
    return [
        {"id": outcome, "piece": name(outcome), "probability": probability}
        for probability, outcome in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def target_of(logits: torch.Tensor, target_id: int, name: Callable[[int], str]) -> dict[str, Any]:
    """The outcome that is explained, by logits (V,): `id`, `piece`, `probability`, `logit`."""
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    probability = torch.softmax(wide, -1)[target_id].item()
    return {"id": target_id, "piece": name(target_id), "probability": probability, "logit": wide[target_id].item()}


def ranked(
    gradient: Contributions, direct: Contributions, weight: Callable[[str, str, int], float], count: int
) -> list[dict[str, Any]]:
    """The tokens that move a logit most.

    Args:
        gradient: first-order contributions (N,) by layer and segment, by which they are ranked.
        direct: exact terms (N,) of those layers that have them.
        weight: of a token, by layer, segment and number.
        count: at most so many.

    Returns:
        Of each `address`, `weight`, `gradient` and `direct` (or None), the greatest first.
    """
    entries = [(name, segment, c) for name, parts in gradient.items() for segment, c in parts.items()]
    order = torch.cat([c for _, _, c in entries]).abs().argsort(descending=True)
    places = [(name, segment, i) for name, segment, c in entries for i in range(len(c))]
    return [
        {
            "address": str(TokenAddress(name, segment, i)),
            "weight": short(weight(name, segment, i)),
            "gradient": short(gradient[name][segment][i].item()),
            "direct": short(direct[name][segment][i].item()) if name in direct else None,
        }
        for name, segment, i in (places[place] for place in order[:count].tolist())
    ]


def layer_effects(gradient: Contributions) -> list[dict[str, Any]]:
    """How much the tokens of each layer raise and lower a logit in all, by first-order contributions (N,)."""
    # Not one sum: that of a value layer is zero, as what follows it does not depend on the length of its output.
    whole = {name: torch.cat(list(parts.values())) for name, parts in gradient.items()}
    return [
        {"name": name, "raises": short(c.clamp(min=0).sum().item()), "lowers": short(c.clamp(max=0).sum().item())}
        for name, c in whole.items()
    ]


def use_of(statistics: Mapping[str, torch.Tensor], index: int) -> dict[str, Any]:
    """`statistics` and `state` of one token of a segment, over what was read."""
    found = {name: float(values[index]) for name, values in statistics.items()}
    return {"statistics": {name: short(value) for name, value in found.items()}, "state": state(found["active"])}
