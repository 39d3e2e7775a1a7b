"""Adapters in a model: segments that can be switched on and off, weighted, merged and taken out again.

An inactive adapter has the limit 0 and is as if it were not there; a weight is the gain of its values. The keys of all
active tokens share one norm, so several adapters at once are not the sum of their effects.
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from tokenformer.errors import UserError
from tokenformer.growth import warn_if_function_changes
from tokenformer.modules import KINDS
from tokenformer.pattention import AdapterTokens, ParameterTokens, Pattention, check_segment_name
from tokenformer.sparse import refuse_sparse


@dataclass(frozen=True)
class Adapter:
    """What is known of an adapter in a model.

    Attributes:
        name: of its segments.
        tokens: by kind of layer (`qkv`, `output`, `ffn`; `tokens` for layers of no kind), how many each layer has.
        parameters: in all its keys and values.
        active: whether it takes part in what the model computes now.
        weight: factor of its values where it takes part.
        merged: it is an ordinary segment of the model now, until `unmerge_adapter`.
    """

    name: str
    tokens: dict[str, int]
    parameters: int
    active: bool
    weight: float
    merged: bool


class MergedTokens(ParameterTokens):
    """A segment that was an adapter's.

    Attributes:
        unmerged: the adapter's segment, in a tuple so that it is no submodule.
    """

    unmerged: tuple[AdapterTokens]


@torch.no_grad()
def add_adapter(
    model: nn.Module,
    name: str,
    *,
    qkv: int = 0,
    output: int = 0,
    ffn: int = 0,
    tokens: int = 0,
    freeze: bool = True,
) -> nn.Module:
    """Append an adapter of new tokens to the Pattention layers of `model`, in place, and make it the active one.

    Its keys are zero, so that the outputs of the model stay what they are until it is trained.

    Args:
        model: a TokenFormer, or any module that contains Pattention layers.
        name: of the adapter; letters, digits and underscores.
        qkv: new tokens of each query, key and value layer.
        output: likewise for the output projection of attention.
        ffn: likewise for the feed-forward.
        tokens: likewise for layers of no kind (`Pattention.kind` is None), as in a module of your own.
        freeze: train nothing but the adapter (`requires_grad`).

    Returns:
        `model`.

    Raises:
        UserError: no tokens, a count below 0 or for layers that the model does not have, or a name that is taken or not
            usable. The model is then unchanged.
    """
    counts = {"qkv": qkv, "output": output, "ffn": ffn, "tokens": tokens}
    check_adapter_name(model, name)
    layers = pattention_layers(model)
    for label, count in counts.items():
        if count < 0:
            raise UserError(f"{label} must be at least 0, got {count}")
        if count and not any(kind_of(layer) == label for layer in layers.values()):
            raise UserError(f"{label}={count}: the model has no layers of that kind")
    if not any(counts.values()):
        raise UserError("nothing to add: give the number of new tokens, as qkv=, output= or ffn=")
    warn_if_function_changes(layers.values())

    initializers = {layer: whole._init_weights for whole in _initializing(model) for layer in whole.modules()}
    for layer in layers.values():
        if count := counts[kind_of(layer)]:
            segment = layer.add_segment(name, count, adapter=True)
            if layer in initializers:
                initializers[layer](segment)
            segment.key.zero_()
    if freeze:
        train_only(model, name)
    set_adapter(model, name)
    return model


@torch.no_grad()
def insert_adapter(model: nn.Module, name: str, tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Put an adapter with given keys and values, by path of the layer, into `model`, where it is inactive and frozen.

    The caller has checked that everything fits.
    """
    layers = pattention_layers(model)
    for path, (key, value) in tensors.items():
        segment = layers[path].add_segment(name, len(key), adapter=True)
        segment.key.copy_(key)
        segment.value.copy_(value)
        segment.requires_grad_(False)
        segment.limit = 0


def train_only(model: nn.Module, name: str) -> None:
    """Freeze everything but an adapter.

    Raises:
        UserError: no such adapter.
    """
    segments = segments_of(model, name)
    model.requires_grad_(False)
    for segment in segments:
        segment.requires_grad_(True)


def set_adapter(model: nn.Module, adapters: str | Mapping[str, float] | None) -> None:
    """Choose which adapters take part, and end `disable_adapters`.

    Args:
        model: with adapters.
        adapters: name of one, names with weights of several, or None for none. A weight multiplies the values of an
            adapter, while its keys take part in the norm in full; 0 leaves the adapter out altogether.

    Raises:
        UserError: no such adapter, one that is merged, or a weight that is not finite. Nothing is then changed.
    """
    weights = {} if adapters is None else {adapters: 1.0} if isinstance(adapters, str) else dict(adapters)
    for name, weight in weights.items():
        segments_of(model, name)
        if not math.isfinite(weight):
            raise UserError(f"the weight of adapter '{name}' must be finite, got {weight}")
    for name, segment in _adapter_segments(model):
        weight = weights.get(name, 0.0)
        segment.selected = weight != 0
        segment.gain = float(weight) if weight else segment.gain
        segment.limit = None if segment.selected else 0


def disable_adapters(model: nn.Module) -> AbstractContextManager[Any]:
    """Compute what the model computes without adapters, until `enable_adapters`, or to the end of a `with` block.

    Merged adapters are part of the model and stay.
    """
    limits = [(segment, segment.limit) for _, segment in _adapter_segments(model)]
    for segment, _ in limits:
        segment.limit = 0

    def restore() -> None:
        for segment, limit in limits:
            segment.limit = limit

    back = ExitStack()
    back.callback(restore)
    return back


def enable_adapters(model: nn.Module) -> None:
    """Let the adapters that `set_adapter` chose take part again."""
    for _, segment in _adapter_segments(model):
        segment.limit = None if segment.selected else 0


def list_adapters(model: nn.Module) -> list[Adapter]:
    """The adapters of `model`, in the order in which they were added."""
    found: dict[str, dict[str, ParameterTokens]] = {}
    layers = pattention_layers(model, required=False)
    for path, layer in layers.items():
        for name, segment in layer.segments.items():
            if isinstance(segment, AdapterTokens | MergedTokens):
                found.setdefault(name, {})[path] = segment
    return [
        Adapter(
            name,
            tokens={kind_of(layers[path]): segment.num_tokens for path, segment in segments.items()},
            parameters=sum(p.numel() for segment in segments.values() for p in segment.parameters()),
            active=all(segment.limit is None for segment in segments.values()),
            weight=next(_adapter_of(segment).gain for segment in segments.values()),
            merged=any(isinstance(segment, MergedTokens) for segment in segments.values()),
        )
        for name, segments in found.items()
    ]


def delete_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter out of `model`. What `add_adapter` froze stays frozen.

    Raises:
        UserError: no such adapter, or one that is merged.
    """
    segments_of(model, name)
    for layer in pattention_layers(model).values():
        if name in layer.segments:
            layer.remove_segment(name)


@torch.no_grad()
def merge_adapter(model: nn.Module, name: str) -> None:
    """Make an adapter, with the weight it has, an ordinary segment of `model`, which saves it from then on.

    The model computes bitwise what it computes with this adapter active. The configuration records the segment, so
    that `from_pretrained` rebuilds it; `model.merge_segments()` puts all segments into one.

    Raises:
        UserError: no such adapter, or one that is merged already.
    """
    segments_of(model, name)
    for layer in pattention_layers(model).values():
        if name in layer.segments:
            source = cast(AdapterTokens, layer.segments[name])
            merged = MergedTokens(1, 1, 1, device="meta")
            merged.key = source.key
            merged.value = source.value if source.gain == 1 else nn.Parameter(source.value * source.gain)
            merged.value.requires_grad_(source.value.requires_grad)
            merged.unmerged = (source,)
            layer.segments[name] = merged
    counts = next(adapter.tokens for adapter in list_adapters(model) if adapter.name == name)
    _record(model, {"name": name, **{kind: counts.get(kind, 0) for kind in KINDS}})


@torch.no_grad()
def unmerge_adapter(model: nn.Module, name: str) -> None:
    """Undo `merge_adapter`, exactly: the adapter is active with its weight, and the model saves what it saved before.

    Raises:
        UserError: no adapter of that name was merged, or `merge_segments` has put it into another segment.
    """
    places = [
        (layer, segment)
        for layer in pattention_layers(model).values()
        for found, segment in layer.segments.items()
        if found == name and isinstance(segment, MergedTokens)
    ]
    if not places:
        raise UserError(f"no adapter '{name}' is merged into this model: {_known(model)}")
    for layer, merged in places:
        (source,) = merged.unmerged
        # The model may have been moved since.
        source.key = merged.key
        source.value = merged.value if source.gain == 1 else nn.Parameter(source.value.to(merged.value))
        source.value.requires_grad_(merged.value.requires_grad)
        source.selected, source.limit = True, None
        layer.segments[name] = source
    for config in _configurations(model):
        config.segments = [segment for segment in config.segments if segment["name"] != name]


def pattention_layers(model: nn.Module, *, required: bool = True) -> dict[str, Pattention]:
    """The Pattention layers of a model by path.

    Raises:
        UserError: there are none, though they are required.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, Pattention)}
    if required and not layers:
        raise UserError("the model has no Pattention layers: it takes no adapters of tokens")
    return layers


def kind_of(layer: Pattention) -> str:
    """`qkv`, `output` or `ffn`; `tokens` of a layer of no kind."""
    return layer.kind or "tokens"


def segments_of(model: nn.Module, name: str) -> list[AdapterTokens]:
    """The segments of an adapter that is not merged.

    Raises:
        UserError: there is none of that name, or it is merged.
    """
    segments = [segment for found, segment in _adapter_segments(model) if found == name]
    if not segments:
        if any(adapter.name == name for adapter in list_adapters(model)):
            raise UserError(f"adapter '{name}' is merged into the model: unmerge it first")
        raise UserError(f"no adapter '{name}': {_known(model)}")
    return segments


def check_adapter_name(model: nn.Module, name: str) -> None:
    """Refuse a name that is taken or cannot name a segment, and a model that takes no adapters.

    Raises:
        UserError: so it is, the model has no Pattention layers, or it is sparse.
    """
    check_segment_name(name)
    refuse_sparse(model, "tuned")
    for layer in pattention_layers(model).values():
        if name in layer.segments:
            what = "an adapter" if name in layer.adapters else "a segment"
            raise UserError(f"the model has {what} '{name}' already: choose another name")


def _known(model: nn.Module) -> str:
    names = [adapter.name for adapter in list_adapters(model)]
    return f"this model has {', '.join(names)}" if names else "this model has no adapters"


def _adapter_segments(model: nn.Module) -> list[tuple[str, AdapterTokens]]:
    return [
        (name, segment)
        for layer in pattention_layers(model, required=False).values()
        for name, segment in layer.segments.items()
        if isinstance(segment, AdapterTokens)
    ]


def _adapter_of(segment: ParameterTokens) -> ParameterTokens:
    return segment.unmerged[0] if isinstance(segment, MergedTokens) else segment


def _initializing(model: nn.Module) -> list[Any]:
    """The transformers models in `model`, itself included: what initialises parameters."""
    return [module for module in model.modules() if hasattr(module, "_init_weights")]


def _configurations(model: nn.Module) -> Iterable[Any]:
    """The configurations that list segments, each once."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return {id(config): config for config in configs if hasattr(config, "segments")}.values()


def _record(model: nn.Module, entry: dict[str, Any]) -> None:
    """Write a merged segment into the configuration, in the order of the layers, on which rounding depends."""
    orders = [list(layer.segments) for layer in pattention_layers(model).values() if entry["name"] in layer.segments]
    for config in _configurations(model):
        after = {name for order in orders for name in order[order.index(entry["name"]) + 1 :]}
        place = next((i for i, segment in enumerate(config.segments) if segment["name"] in after), len(config.segments))
        config.segments = [*config.segments[:place], entry, *config.segments[place:]]
