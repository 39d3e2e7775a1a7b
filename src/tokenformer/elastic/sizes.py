"""A model at another size: the first tokens of every layer take part, the others do not exist for the moment.

Nothing is copied or freed: `ParameterTokens.limit` says how many tokens take part. A model trained on prefixes
(`training.nested` of a recipe) works at each of the sizes that it was trained at, and in between.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from tokenformer.errors import UserError
from tokenformer.modules import KINDS
from tokenformer.pattention import AdapterTokens, ParameterTokens, Pattention
from tokenformer.sparse import refuse_sparse

# Tokens by kind of layer; None is for layers of no kind, as in a module of one's own.
Sizes = Mapping[str | None, int]


@contextmanager
def prefix(
    model: nn.Module,
    *,
    qkv: int | None = None,
    output: int | None = None,
    ffn: int | None = None,
    tokens: int | None = None,
) -> Iterator[None]:
    """Run `model` with the first tokens of its layers alone, as long as the context lasts.

    Tokens count in the order of the segments, of which one that takes part in part already (`limit`) counts with that
    part; adapters are not counted and stay as they are. The
    scale (tau) stays: as the norm is that of the tokens that take part, their weights grow as the others leave, so that
    a shorter prefix speaks about as loudly as the whole.

    Args:
        model: a TokenFormer, or any module that contains Pattention layers.
        qkv: tokens of each query, key and value layer that take part; all if None.
        output: likewise for the output projection of attention.
        ffn: likewise for the feed-forward.
        tokens: likewise for layers of no kind (`Pattention.kind` is None), as in a module of your own.

    Raises:
        UserError: a number below 1 or above that of the tokens there are, no layers of that kind, or a sparse model.
    """
    sizes = {"qkv": qkv, "output": output, "ffn": ffn, None: tokens}
    limits = _limits(model, {kind: size for kind, size in sizes.items() if size is not None})
    before = {segment: segment.limit for segment in limits}
    try:
        for segment, limit in limits.items():
            segment.limit = limit
        yield
    finally:
        for segment, old in before.items():
            segment.limit = old


def _limits(model: nn.Module, sizes: Sizes) -> dict[ParameterTokens, int | None]:
    """The limit of every segment at these sizes."""
    limits: dict[ParameterTokens, int | None] = {}
    refuse_sparse(model, "run at another size")
    layers = layers_of(model)
    if sizes and not layers:
        raise UserError("the model has no Pattention layers: it has one size only")
    check_sizes(layers, sizes)
    for layer in layers.values():
        left = sizes.get(layer.kind)
        if left is None:
            continue
        for segment in segments_of(layer).values():
            present = _present(segment)
            taken = min(left, present)
            left -= taken
            if taken < present:
                limits[segment] = taken
    return limits


def check_sizes(layers: Mapping[str, Pattention], sizes: Sizes) -> None:
    """Raise `UserError` on the first size that the layers cannot have.

    Args:
        layers: of a model, by path.
        sizes: tokens that are to be left.
    """
    for kind, size in sizes.items():
        label = kind or "tokens"
        counts = [num_present(layer) for layer in layers.values() if layer.kind == kind]
        if size < 1:
            raise UserError(f"{label} must be at least 1, got {size}")
        if not counts:
            raise UserError(f"{label}={size}: the model has no layers of that kind")
        if size > min(counts):
            raise UserError(
                f"{label}={size} is more than the {min(counts)} tokens there are: give at most {min(counts)}, or grow "
                "the model"
            )


def layers_of(model: nn.Module) -> dict[str, Pattention]:
    """The Pattention layers of a model by path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, Pattention)}


def segments_of(layer: Pattention) -> dict[str, ParameterTokens]:
    """The segments of a layer by name: no adapters, which are no part of the model, and no wrappers that PEFT adds."""
    bare = {
        name: next(module for module in segment.modules() if isinstance(module, ParameterTokens))
        for name, segment in layer.segments.items()
    }
    return {name: segment for name, segment in bare.items() if not isinstance(segment, AdapterTokens)}


def require_whole(layers: Mapping[str, Pattention]) -> None:
    """Raise `UserError` where tokens of a model cannot be told by what its parameters say."""
    if not layers:
        raise UserError("the model has no Pattention layers: there are no parameter tokens")
    for layer in layers.values():
        if adapters := layer.adapters:
            raise UserError(f"'{adapters[0]}' is an adapter, made for the model as it is: merge or delete it first")
        segments = segments_of(layer)
        if any(
            segment is not wrapped for segment, wrapped in zip(segments.values(), layer.segments.values(), strict=True)
        ):
            raise UserError("an adapter sits on a segment: merge it first (peft: merge_and_unload)")
        if any(segment.limit is not None or segment.gain != 1 for segment in segments.values()):
            raise UserError("a segment takes part in part: take away its limit and gain first")


def num_present(layer: Pattention) -> int:
    """Tokens of a layer that take part."""
    return sum(_present(segment) for segment in segments_of(layer).values())


def present_sizes(model: nn.Module) -> dict[str, int]:
    """Tokens of each kind of layer that take part: qkv, output, ffn."""
    counts = {layer.kind: num_present(layer) for layer in layers_of(model).values()}
    return {kind: counts[kind] for kind in KINDS if kind in counts}


def _present(segment: ParameterTokens) -> int:
    return segment.num_tokens if segment.limit is None else min(segment.limit, segment.num_tokens)
