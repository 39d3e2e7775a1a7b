"""Make a model smaller by taking tokens out of it: the last ones, the least important ones, or a whole segment.

The weights of the tokens that stay depend on the others through the norm alone. With tau kept, a shorter norm makes
them larger; `scale` says what tau becomes, and `fit` moves the values that stay to make up for those that went.

Shapes: R rows, D channels, N tokens of a layer, n of them kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from tokenformer.elastic.measure import Batch, activities_of, importance, observe
from tokenformer.elastic.sizes import Sizes, check_sizes, layers_of, require_whole, segments_of
from tokenformer.errors import UserError
from tokenformer.modules import KINDS
from tokenformer.ops import get_activation, get_normalization
from tokenformer.pattention import BASE, Pattention
from tokenformer.sparse import refuse_sparse

By = Literal["prefix", "importance", "segment"]
ScaleRule = Literal["keep", "sqrt", "calibrated"]
# Places (n,) of the tokens that stay, among those of all segments in order.
Kept = Mapping[Pattention, torch.Tensor]
# Of the mean square of a weight, added to each: what the calibration data do not determine stays where it is.
_RIDGE = 1e-2


@torch.no_grad()
def shrink(
    model: nn.Module,
    *,
    qkv: int | None = None,
    output: int | None = None,
    ffn: int | None = None,
    tokens: int | None = None,
    by: By = "prefix",
    segment: str | None = None,
    scale: ScaleRule = "keep",
    fit: bool = False,
    calibration: Sequence[Batch] | None = None,
) -> nn.Module:
    """Take tokens out of the Pattention layers of `model`, in place.

    Args:
        model: a TokenFormer, or any module that contains Pattention layers.
        qkv: tokens that each query, key and value layer has *after* shrinking; None leaves them alone.
        output: likewise for the output projection of attention.
        ffn: likewise for the feed-forward.
        tokens: likewise for layers of no kind (`Pattention.kind` is None), as in a module of your own.
        by: which tokens stay. `prefix`: the first, in the order of the segments, as a nested model is trained for;
            `importance`: those of the highest `importance` on the calibration data, the highest first and all in one
            segment; `segment`: all that are not in `segment`.
        segment: that is taken out, with `by="segment"`; not the first one.
        scale: `keep` leaves tau, as nested training does; `sqrt` multiplies it by the root of the share of tokens that
            stay, as if it were derived from their number; `calibrated` by the root of their mean share of the row total
            on the calibration data, so that their weights stay about as they were.
        fit: move the values that stay, by least squares, to give the outputs that the layer had for the inputs that it
            had on the calibration data. Takes n^2 numbers of 8 bytes for each layer meanwhile.
        calibration: arguments of the forward pass, such as `{"input_ids": ids}` (B, T) without padding; gone through
            once for each of importance, scale and fit.

    Returns:
        `model`.

    Raises:
        UserError: nothing to shrink, a number below 1 or above that of the tokens there are, an unknown rule, no such
            segment, no calibration data where they are needed, an adapter on the model, a segment with a limit or a
            gain, or a sparse model. The model is then unchanged.
    """
    check_rules(by, scale)
    wanted = {"qkv": qkv, "output": output, "ffn": ffn, None: tokens}
    sizes: Sizes = {kind: size for kind, size in wanted.items() if size is not None}
    check_request(sizes, by, segment)
    if calibration is None and (reasons := needs_calibration(by, scale, fit)):
        raise UserError(f"{reasons[0]} needs calibration data: give calibration")
    refuse_sparse(model, "shrunk")
    layers = layers_of(model)
    require_whole(layers)
    if by == "segment":
        kept = _without(layers, str(segment))
    else:
        check_sizes(layers, sizes)
        kept = _first(layers, sizes) if by == "prefix" else _most_important(model, sizes, calibration or ())
    factors = _scale_factors(model, kept, scale, calibration or ())
    values = _fitted(model, kept, factors, calibration or ()) if fit else {}
    for layer, places in kept.items():
        if by == "importance":
            layer.merge_segments()
        _take(layer, places, values.get(layer))
        layer.scale.mul_(factors[layer])
    _record(model)
    return model


def check_rules(by: str, scale: str) -> None:
    """Raise `UserError` on an unknown rule."""
    for label, rule, known in (("by", by, get_args(By)), ("scale", scale, get_args(ScaleRule))):
        if rule not in known:
            raise UserError(f"unknown {label} '{rule}': use one of {', '.join(known)}")


def check_request(sizes: Sizes, by: str, segment: str | None) -> None:
    """Raise `UserError` on sizes and segment that do not belong together."""
    if by == "segment":
        if segment is None:
            raise UserError("by 'segment' needs the name of a segment: give segment")
        if sizes:
            raise UserError("by 'segment' takes out a whole segment: leave out qkv, output and ffn")
    elif segment is not None:
        raise UserError(f"segment '{segment}' goes with by 'segment': give that, or leave out segment")
    elif not sizes:
        raise UserError("nothing to shrink: give the number of tokens after shrinking, as qkv, output or ffn")


def needs_calibration(by: str, scale: str, fit: bool) -> list[str]:
    """What of a request needs calibration data, in words; empty if nothing does."""
    reasons = {"by 'importance'": by == "importance", "scale 'calibrated'": scale == "calibrated", "fit": fit}
    return [reason for reason, given in reasons.items() if given]


def _first(layers: Mapping[str, Pattention], sizes: Sizes) -> Kept:
    kept = {
        layer: torch.arange(size)
        for layer in layers.values()
        if (size := sizes.get(layer.kind)) is not None and size < layer.num_tokens
    }
    if not kept:
        raise UserError("nothing to shrink: every layer already has the number of tokens asked for")
    return kept


def _most_important(model: nn.Module, sizes: Sizes, calibration: Sequence[Batch]) -> Kept:
    measured = importance(model, calibration)
    return {
        # Stable: where tokens are alike, the first ones stay.
        layer: measured[path].sort(descending=True, stable=True).indices[: sizes[layer.kind]].cpu()
        for path, layer in layers_of(model).items()
        if layer.kind in sizes
    }


def _without(layers: Mapping[str, Pattention], name: str) -> Kept:
    names = dict.fromkeys(segment for layer in layers.values() for segment in layer.segments)
    if name not in names:
        raise UserError(f"no segment '{name}': the model has {', '.join(names)}")
    if name == BASE or any(list(layer.segments) == [name] for layer in layers.values()):
        raise UserError(f"segment '{name}' cannot be taken out: every layer needs it as its first")
    kept = {}
    for layer in layers.values():
        if name in layer.segments:
            stays = [torch.full((s.num_tokens,), own != name) for own, s in segments_of(layer).items()]
            kept[layer] = torch.cat(stays).nonzero().flatten()
    return kept


def _scale_factors(
    model: nn.Module, kept: Kept, rule: ScaleRule, calibration: Sequence[Batch]
) -> dict[Pattention, float]:
    """What tau of each layer is multiplied by."""
    if rule == "keep":
        return dict.fromkeys(kept, 1.0)
    if rule == "sqrt":
        return {layer: (len(places) / layer.num_tokens) ** 0.5 for layer, places in kept.items()}
    shares = dict.fromkeys(kept, 0.0)

    def add(layer: Pattention, x: torch.Tensor) -> None:
        if layer in kept:
            kind = get_normalization(layer.normalization)
            activities, total = activities_of(layer, x)
            part = kind.statistic(activities[..., kept[layer].to(x.device)])
            # The statistic of softmax is a logarithm. A row without any score has no share to speak of.
            share = (part - total).exp() if layer.normalization == "softmax" else part / (total + layer.eps)
            shares[layer] += share.double().sum().item()

    rows = observe(model, calibration, add)
    # Weights go with tau over the root of the total, or with its square over the total: the same root for all.
    return {layer: (share / rows[layer]) ** 0.5 for layer, share in shares.items()}


def _fitted(
    model: nn.Module, kept: Kept, factors: Mapping[Pattention, float], calibration: Sequence[Batch]
) -> dict[Pattention, torch.Tensor]:
    """Values (n, D) that, with the new weights, come closest to the outputs that each layer had."""
    grams: dict[Pattention, torch.Tensor] = {}
    products: dict[Pattention, torch.Tensor] = {}

    def add(layer: Pattention, x: torch.Tensor) -> None:
        if layer not in kept:
            return
        kind, activation = get_normalization(layer.normalization), get_activation(layer.activation)
        places = kept[layer].to(x.device)
        activities, total = activities_of(layer, x)
        part, value = activities[..., places], _values(layer).double()
        weights = kind.weights(activities, total, layer.scale, activation, layer.eps).double()
        fewer = kind.weights(part, kind.statistic(part), layer.scale * factors[layer], activation, layer.eps).double()
        grams[layer] = grams.get(layer, 0) + fewer.T @ fewer
        products[layer] = products.get(layer, 0) + fewer.T @ (weights @ value - fewer @ value[places])

    observe(model, calibration, add)
    fitted = {}
    for layer, gram in grams.items():
        value = _values(layer)[kept[layer].to(gram.device)]
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        fitted[layer] = (value.double() + torch.linalg.solve(gram + ridge, products[layer])).to(value.dtype)
    return fitted


def _values(layer: Pattention) -> torch.Tensor:
    return torch.cat([segment.value for segment in segments_of(layer).values()])


def _take(layer: Pattention, places: torch.Tensor, values: torch.Tensor | None) -> None:
    """Keep the tokens at `places` alone, with other values (n, D) where they are given."""
    first = 0
    for name, segment in segments_of(layer).items():
        ours = (places >= first) & (places < first + segment.num_tokens)
        within = (places[ours] - first).to(segment.key.device)
        first += segment.num_tokens
        if not len(within):
            layer.remove_segment(name)
            continue
        value = segment.value[within] if values is None else values[ours.to(values.device)]
        # Indexing copies, so the memory of the tokens that go is freed.
        segment.key = nn.Parameter(segment.key[within], requires_grad=segment.key.requires_grad)
        segment.value = nn.Parameter(value, requires_grad=segment.value.requires_grad)


def _record(model: nn.Module) -> None:
    """Write the segments into the configuration, from which from_pretrained rebuilds the shapes."""
    for whole in model.modules():
        config: Any = getattr(whole, "config", None)
        if not hasattr(whole, "_init_weights") or not hasattr(config, "segments"):
            continue
        segments = {
            segment["name"]: {"name": segment["name"], **dict.fromkeys(KINDS, 0)} for segment in config.segments
        }
        for layer in layers_of(whole).values():
            if layer.kind in KINDS:
                for name, segment in segments_of(layer).items():
                    segments[name][layer.kind] = segment.num_tokens
        config.segments = [segment for segment in segments.values() if any(segment[kind] for kind in KINDS)]
