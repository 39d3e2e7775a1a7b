"""Growing: append parameter tokens to every Pattention of a model (TokenFormer, section 3.3).

With zero keys and the scale kept, the grown model computes exactly what it computed before: a new token scores 0, which
adds nothing to the norm and, as f(0) = 0, nothing to the output; its random value is what learning starts from. The
released code instead derives tau from the number of tokens, which changes every output (44-50 % when doubling); that
is `scale="sqrt"` here.
"""

import re
import warnings
from typing import Any, Literal

import torch
from torch import nn

from tokenformer.errors import UserError
from tokenformer.ops import get_activation
from tokenformer.pattention import ParameterTokens, Pattention

KeyInit = Literal["zero", "random"]
ScaleRule = Literal["keep", "sqrt"]


@torch.no_grad()
def grow(
    model: nn.Module,
    *,
    qkv: int | None = None,
    output: int | None = None,
    ffn: int | None = None,
    tokens: int | None = None,
    keys: KeyInit = "zero",
    scale: ScaleRule = "keep",
    name: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Append a segment of new tokens to the Pattention layers of `model`, in place.

    Args:
        model: a TokenFormer, or any module that contains Pattention layers.
        qkv: tokens that each query, key and value layer has *after* growing; None leaves them alone.
        output: likewise for the output projection of attention.
        ffn: likewise for the feed-forward.
        tokens: likewise for layers of no kind (`Pattention.kind` is None), as in a module of your own.
        keys: `zero` changes no output (with `scale="keep"`); `random` initialises keys as in a new model, as the paper
            does, and the loss jumps.
        scale: `keep` leaves tau as it is; `sqrt` sets it to the root of the new number of tokens, as the paper does.
        name: of the new segment; `grown1`, `grown2`, ... if not given.
        optimizer: an optimizer over the model's parameters: the new ones join it, each in the group that holds the old
            tokens of its layer, and the state of the old parameters stays as it is. Without it, make a new one.

    Returns:
        `model`.

    Raises:
        UserError: nothing to grow, a count that is not larger than what a layer has, or a segment name that is taken.
            The model is then unchanged.
    """
    targets = {"qkv": qkv, "output": output, "ffn": ffn, None: tokens}
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, Pattention)}
    plan = _plan(layers, targets)
    name = _segment_name(layers, name)
    _check_function_kept(layers.values(), keys, scale)

    init_weights = getattr(model, "_init_weights", ParameterTokens.reset_parameters)
    for layer, added in plan:
        segment = layer.add_segment(name, added)
        init_weights(segment)
        if keys == "zero":
            segment.key.zero_()
        if scale == "sqrt":
            layer.scale.fill_(layer.num_tokens**0.5)
        if optimizer is not None:
            _join(optimizer, layer, segment)
    _record(model, name, plan)
    return model


def _plan(layers: dict[str, Pattention], targets: dict[str | None, int | None]) -> list[tuple[Pattention, int]]:
    """Which layer gets how many tokens; raises before anything is changed."""
    if not layers:
        raise UserError("the model has no Pattention layers: nothing can grow")
    if all(target is None for target in targets.values()):
        raise UserError("nothing to grow: give the number of tokens after growing, as qkv=, output= or ffn=")
    for kind, target in targets.items():
        if target is None:
            continue
        label = kind or "tokens"
        counts = {layer.num_tokens for layer in layers.values() if layer.kind == kind}
        if target < 1:
            raise UserError(f"{label} must be at least 1, got {target}")
        if not counts:
            raise UserError(f"{label}={target}: the model has no layers of that kind")
        if target < max(counts):
            raise UserError(
                f"{label}={target} is fewer than the {max(counts)} tokens there are: growing cannot shrink, "
                f"so give a number above {max(counts)}"
            )
    plan = [
        (layer, target - layer.num_tokens)
        for layer in layers.values()
        if (target := targets.get(layer.kind)) is not None and target > layer.num_tokens
    ]
    if not plan:
        raise UserError("nothing to grow: every layer already has the number of tokens asked for")
    return plan


def _segment_name(layers: dict[str, Pattention], name: str | None) -> str:
    taken = {segment for layer in layers.values() for segment in layer.segments}
    if name is None:
        used = [int(found[1]) for segment in taken if (found := re.fullmatch(r"grown(\d+)", segment))]
        return f"grown{max(used, default=0) + 1}"
    if name in taken:
        raise UserError(f"segment '{name}' exists already: choose another name")
    if not name.isidentifier():
        raise UserError(f"segment name '{name}' must be letters, digits and underscores, not starting with a digit")
    return name


def _check_function_kept(layers: Any, keys: KeyInit, scale: ScaleRule) -> None:
    """Warn where zero keys and a kept scale promise what the layer's mathematics cannot give."""
    if keys != "zero" or scale != "keep":
        return
    for layer in layers:
        if layer.normalization == "softmax":
            warnings.warn("with softmax a token of zero score takes weight: growing changes the outputs", stacklevel=3)
            return
        if get_activation(layer.activation)(torch.zeros(())).item() != 0:
            warnings.warn(f"{layer.activation}(0) is not 0: growing changes the outputs", stacklevel=3)
            return


def _join(optimizer: torch.optim.Optimizer, layer: Pattention, segment: ParameterTokens) -> None:
    old = next(iter(layer.segments.values()))
    for parameter, like in ((segment.key, old.key), (segment.value, old.value)):
        for group in optimizer.param_groups:
            if any(member is like for member in group["params"]):
                group["params"].append(parameter)
                break
        else:
            raise UserError("the optimizer does not hold the model's parameters: pass the one that trains this model")


def _record(model: nn.Module, name: str, plan: list[tuple[Pattention, int]]) -> None:
    """Write the new segment into the configuration, from which from_pretrained rebuilds the shapes."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "segments"):
        return
    added = {layer.kind: count for layer, count in plan}
    config.segments = [
        *config.segments,
        {"name": name, **{kind: added.get(kind, 0) for kind in ("qkv", "output", "ffn")}},
    ]
