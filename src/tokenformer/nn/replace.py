"""Swap the linear layers of any model for Pattentions."""

import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from tokenformer.errors import UserError
from tokenformer.ops import get_activation
from tokenformer.ops.activations import Activation
from tokenformer.pattention import BASE, ParameterTokens, Pattention

Patterns = str | Sequence[str]
Choice = Patterns | Callable[[str, nn.Module], bool]
Count = int | Callable[[str, nn.Module], int]
Init = Literal["random", "linear"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class BiasedPattention(Pattention):
    """A Pattention plus a learned bias: what `replace_linear` puts in place of a linear layer that has one.

    Args:
        in_features: channels of the input and of keys.
        out_features: channels of the output, of values and of the bias.
        num_tokens: parameter tokens of the first segment.
        **options: those of `Pattention`.

    Attributes:
        bias: (out_features,)
    """

    def __init__(self, in_features: int, out_features: int, num_tokens: int, **options: Any) -> None:
        super().__init__(in_features, out_features, num_tokens, **options)
        key = cast(ParameterTokens, self.segments[BASE]).key
        self.bias = nn.Parameter(torch.zeros(out_features, device=key.device, dtype=key.dtype))

    def reset_parameters(self) -> None:
        """As `Pattention.reset_parameters`, and a bias of zeros."""
        super().reset_parameters()
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`Pattention.forward` plus the bias: (..., in_features) to (..., out_features)."""
        out = super().forward(x, *args, **kwargs)
        # Under autocast the products are in a lower precision than the bias, and so is nn.Linear's output.
        return out + self.bias.to(out.dtype)


def replace_linear(
    model: nn.Module,
    include: Choice | None = None,
    exclude: Patterns = (),
    *,
    num_tokens: Count | None = None,
    bias: bool = True,
    init: Init = "random",
    normalization: str = "l2_gelu",
    activation: str | Activation = "gelu",
) -> list[str]:
    """Swap linear layers of `model` for Pattention layers, in place.

    Outputs change: a Pattention looks at the direction of a row, not at its length, so no number of tokens makes it a
    linear map. Train afterwards. New parameters have device and dtype of the old weight and are trainable; an optimizer
    made earlier does not know them. Replaced are `nn.Linear` itself, not its subclasses, and transformers' `Conv1D`.

    Args:
        model: any module that contains linear layers.
        include: which ones: patterns, or a function of path and layer that says so. A pattern is a path, or its end
            (`q_proj`, `mlp.*`); one that names a module stands for all linear layers in it. If not given, all but
            the output embeddings and layers whose weight is used elsewhere too.
        exclude: patterns of those to leave alone.
        num_tokens: parameter tokens of each layer, as a number or a function of path and layer. If not given, about
            as many parameters as the weight had, in * out / (in + out); 2 * in with `init="linear"`.
        bias: keep a layer's bias, values included (`BiasedPattention`); False drops it, as in the paper.
        init: `random` starts as a new layer; `linear` computes W x · √in / ‖x‖ (+ bias), which is the linear layer
            itself for rows of length √in: behind a LayerNorm or RMSNorm that has no weight, or one of ones.
        normalization: of the new layers: `l2_gelu`, `gelu_l2`, `gelu_l1` or `softmax`.
        activation: of the new layers, by name or as a callable.

    Returns:
        The paths of what was replaced, in the order of the model; a layer used in several places has its first.

    Raises:
        UserError: nothing to replace, a pattern that fits no layer, a chosen layer whose weight is used elsewhere too
            (tied embeddings) or that carries hooks, or what `Pattention` refuses. The model is then unchanged.
    """
    if init not in get_args(Init):
        raise UserError(f"unknown init '{init}': use one of {', '.join(get_args(Init))}")
    if init == "linear":
        _check_linear_possible(normalization, activation)
    places = _linear_layers(model)
    plan = {
        layer: _count(places[layer][0], layer, num_tokens, init) for layer in _choose(model, places, include, exclude)
    }
    options: dict[str, Any] = {"normalization": normalization, "activation": activation}
    for layer, count in plan.items():
        Pattention(*_features(layer), count, device="meta", **options)  # raises before anything is changed
    replaced = []
    for layer, count in plan.items():
        new = _pattention_for(layer, count, bias, init, options)
        for path in places[layer]:
            model.set_submodule(path, new)
        replaced.append(places[layer][0])
    _leave_fast_path(model)
    return replaced


# Which layers


def _linear_types() -> tuple[type[nn.Linear], ...]:
    # Where transformers' file was never imported, no layer of that type can exist. (It is no nn.Linear, but has the
    # weight and the bias of one.)
    transformers = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear,) if transformers is None else (nn.Linear, transformers.Conv1D)


def _linear_layers(model: nn.Module) -> dict[nn.Linear, list[str]]:
    """Every linear layer with all its paths.

    Subclasses are left out: they compute something else (quantised, parametrised), or their owner reads their weight.
    """
    places: dict[nn.Linear, list[str]] = {}
    types = _linear_types()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, types) and type(module) in types:
            places.setdefault(module, []).append(path)
    if model in places:
        raise UserError("the model is itself a linear layer: make a Pattention in its place")
    if not places:
        raise UserError("the model has no linear layers (nn.Linear): nothing to replace")
    return places


def _choose(
    model: nn.Module, places: dict[nn.Linear, list[str]], include: Choice | None, exclude: Patterns
) -> list[nn.Linear]:
    shared = _shared_weights(model, places)
    excluded = _matching(model, places, exclude, "exclude")
    if include is None:
        getters = (getattr(module, "get_output_embeddings", None) for module in model.modules())
        wanted = places.keys() - {getter() for getter in getters if getter is not None} - shared.keys()
    elif callable(include):
        wanted = {layer for layer, paths in places.items() if any(include(path, layer) for path in paths)}
    else:
        wanted = _matching(model, places, include, "include")
    chosen = [layer for layer in places if layer in wanted and layer not in excluded]
    if not chosen:
        raise UserError(f"none of the {len(places)} linear layers is chosen: nothing to replace")
    for layer in chosen:
        path = places[layer][0]
        if layer in shared:
            raise UserError(f"the weight of '{path}' is that of '{shared[layer]}' too: exclude '{path}', or untie them")
        if any(getattr(layer, hooks) for hooks in _HOOKS):
            raise UserError(f"'{path}' carries hooks, which would be lost: remove them, or exclude '{path}'")
    return chosen


def _matching(model: nn.Module, places: dict[nn.Linear, list[str]], patterns: Patterns, label: str) -> set[nn.Linear]:
    """The linear layers that patterns stand for; each has to stand for something, as it may be a slip of the pen."""
    found: set[nn.Linear] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        fitting = {layer for layer, paths in places.items() if any(_names(pattern, path) for path in paths)}
        named = [] if fitting else [(path, module) for path, module in model.named_modules() if _names(pattern, path)]
        found |= fitting
        if fitting or (named and label == "exclude"):
            continue
        for path, module in named:
            if isinstance(module, nn.Linear):
                kind = type(module).__name__
                raise UserError(f"'{path}' is a {kind}: nn.Linear itself is replaced, subclasses of it are not")
        paths = [path for of_layer in places.values() for path in of_layer]
        words = {word for path in paths for word in (path, *path.split(".")) if not word.isdigit()}
        near = get_close_matches(pattern, sorted(words), cutoff=0.5) or paths[:3]
        raise UserError(f"{label}: no linear layer fits '{pattern}'; there is {', '.join(near)}")
    return found


def _names(pattern: str, path: str) -> bool:
    """Whether a pattern names the module at `path`, or one that holds it, by the whole path or by its end."""
    parts = path.split(".")
    holders = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return any(fnmatchcase(holder, pattern) or fnmatchcase(holder, f"*.{pattern}") for holder in holders)


def _shared_weights(model: nn.Module, places: Iterable[nn.Linear]) -> dict[nn.Linear, str]:
    """The linear layers whose weight is a parameter of another module too, with its name there."""
    names: dict[torch.Tensor, dict[nn.Module, str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            names.setdefault(parameter, {})[module] = f"{path}.{name}".lstrip(".")
    others = {layer: [name for owner, name in names[layer.weight].items() if owner is not layer] for layer in places}
    return {layer: found[0] for layer, found in others.items() if found}


# What takes their place


def _features(layer: nn.Linear) -> tuple[int, int]:
    """Channels in and out; transformers' Conv1D stores its weight the other way round."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, nn.Linear) else (rows, columns)


def _check_linear_possible(normalization: str, activation: str | Activation) -> None:
    points = torch.linspace(-4, 4, 17, dtype=torch.float64)
    f = get_activation(activation)
    if normalization != "l2_gelu" or not torch.allclose(f(points) - f(-points), points):
        raise UserError("init 'linear' needs normalization 'l2_gelu' and f(a) - f(-a) = a: gelu, relu or silu")


def _count(path: str, layer: nn.Linear, num_tokens: Count | None, init: Init) -> int:
    in_features, out_features = _features(layer)
    if callable(num_tokens):
        count = num_tokens(path, layer)
    elif num_tokens is not None:
        count = num_tokens
    elif init == "linear":
        count = 2 * in_features
    else:
        count = max(1, round(in_features * out_features / (in_features + out_features)))
    if not isinstance(count, int) or count < 1:
        raise UserError(f"num_tokens of '{path}' must be a whole number of at least 1, got {count}")
    if init == "linear" and count < 2 * in_features:
        raise UserError(f"init 'linear' needs at least {2 * in_features} tokens, 2 per input channel, for '{path}'")
    return count


@torch.no_grad()
def _pattention_for(layer: nn.Linear, count: int, bias: bool, init: Init, options: dict[str, Any]) -> Pattention:
    in_features, out_features = _features(layer)
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
    keep_bias = bias and layer.bias is not None
    new = (BiasedPattention if keep_bias else Pattention)(
        in_features,
        out_features,
        count,
        scale=(2 * in_features) ** 0.5 if init == "linear" else None,
        device=weight.device,
        dtype=weight.dtype,
        **options,
    )
    if isinstance(new, BiasedPattention):
        new.bias = layer.bias
    if init == "linear":
        # Scores x and -x: their length is sqrt(2) ‖x‖, and f(a) - f(-a) = a undoes f. All other tokens score 0.
        base = cast(ParameterTokens, new.segments[BASE])
        base.key.zero_()
        for sign, rows in ((1, slice(in_features)), (-1, slice(in_features, 2 * in_features))):
            base.key[rows].fill_diagonal_(sign)
            base.value[rows] = sign * weight.T
    return new.train(layer.training)


def _leave_fast_path(model: nn.Module) -> None:
    """Keep torch's encoders, in evaluation, from a fused path that reads the weights of their linear layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _fast_path_broken(module):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and any(map(_fast_path_broken, module.layers.children())):
            module.use_nested_tensor = False


def _fast_path_broken(layer: nn.Module) -> bool:
    return any(isinstance(getattr(layer, name, None), Pattention) for name in ("linear1", "linear2"))
