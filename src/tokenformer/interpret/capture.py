"""What a model's layers compute with their parameter tokens, seen while it runs.

    with capture(model, kinds=["ffn"], top_k=8) as seen:
        model(input_ids)
    seen["model.layers.0.ffn"].segments["base"].weights  # (B, T, 8), and .indices says of which tokens

The model computes what it always does, to the bit: a record is made beside it, from what the layer was given.

Shapes: ... the batch and positions of a layer's input, N parameter tokens of a segment, D_in and D_out channels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tokenformer.errors import UserError
from tokenformer.interpret.addresses import find_layer, pattention_layers, segment_sizes
from tokenformer.interpret.taps import Call, See, tapped
from tokenformer.ops import get_activation, get_normalization
from tokenformer.ops.products import linear
from tokenformer.pattention import Pattention
from tokenformer.tuning.adapters import kind_of


@dataclass(frozen=True)
class SegmentRecord:
    """One segment in one call of a layer; what was not asked for is None.

    Attributes:
        num_tokens: N, of the tokens that take part.
        weights: of the values, (..., N), in the dtype of the products; with `top_k`, (..., k) with the greatest
            magnitude first. 0 for a token that an input does not see.
        scores: x K^T, (..., N) or (..., k) of the same tokens, of those that an input does not see too.
        indices: which tokens these are, (..., k), with `top_k` only.
        output: the segment's share of the output, (..., D_out).
    """

    num_tokens: int
    weights: torch.Tensor | None
    scores: torch.Tensor | None
    indices: torch.Tensor | None
    output: torch.Tensor | None


@dataclass(frozen=True)
class LayerRecord:
    """One call of a layer.

    Attributes:
        layer: path of the layer.
        kind: what it is for: `qkv`, `output` or `ffn`; `tokens` of a layer of no kind.
        input: (..., D_in)
        output: (..., D_out), the sum over segments (without the bias of a layer that has one).
        segments: those that take part and were asked for, by name, in their order.
    """

    layer: str
    kind: str
    input: torch.Tensor
    output: torch.Tensor
    segments: dict[str, SegmentRecord]


@dataclass(frozen=True)
class Capture(Mapping[str, LayerRecord]):
    """What was seen: by path of the layer, its last call.

    Attributes:
        calls: all calls of each layer, in order: one for each forward pass, such as each token of `generate`.
    """

    calls: dict[str, list[LayerRecord]] = field(default_factory=dict)

    def __getitem__(self, layer: str) -> LayerRecord:
        """The last call of a layer, by its path."""
        return self.calls[layer][-1]

    def __iter__(self) -> Iterator[str]:
        """Layers that were called, in the order of their first call."""
        return iter(self.calls)

    def __len__(self) -> int:
        """How many layers were called."""
        return len(self.calls)

    def clear(self) -> None:
        """Forget what was seen."""
        self.calls.clear()


@dataclass(frozen=True)
class _Wanted:
    segments: frozenset[str] | None
    scores: bool
    weights: bool
    outputs: bool
    top_k: int | None


@contextmanager
def capture(
    model: nn.Module,
    *,
    layers: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    segments: Sequence[str] | None = None,
    scores: bool = False,
    weights: bool = True,
    outputs: bool = False,
    top_k: int | None = None,
    consume: Callable[[LayerRecord], None] | None = None,
) -> Iterator[Capture]:
    """Record what the Pattention layers of `model` compute, as long as the context lasts.

    Results and gradients of the model stay the same, bitwise; records are detached. What is kept is, for each call of
    each chosen layer, input and output, and the chosen quantities: choose layers, kinds, segments or `top_k` to bound
    the memory of long texts and large models, or `consume` to keep nothing. Limits, gains, hidden tokens, adapters,
    PEFT's LoRA on a segment and interventions are all in what is seen. A compiled model runs the chosen layers eagerly
    meanwhile, which rounds otherwise than its graph, and one compiled with `fullgraph` cannot be captured. Where
    gradient checkpointing computes layers again in the backward pass, they are recorded again.

    Args:
        model: a TokenFormer, or any module that contains Pattention layers.
        layers: paths of the layers to record, or unambiguous ends of them; all if not given.
        kinds: of the layers: `qkv`, `output`, `ffn`, and `tokens` for layers of no kind; all if not given.
        segments: names of the segments to record; all if not given. Weights are those under the norm of all segments.
        scores: keep x K^T.
        weights: keep the weights of the values.
        outputs: keep the share of each segment in the output, one more product.
        top_k: of each input and segment, keep only so many tokens, those with the weights of the greatest magnitude.
        consume: called with each record as soon as there is one; nothing is then kept.

    Yields:
        What was seen; empty until the model runs.

    Raises:
        UserError: no Pattention layers, or a sparse model; an unknown layer, kind or segment; a `top_k` below 1.
    """
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, got {top_k}")
    chosen = _choose(model, layers, kinds, segments)
    wanted = _Wanted(None if segments is None else frozenset(segments), scores, weights, outputs, top_k)
    seen = Capture()

    def see(name: str, layer: Pattention, call: Call, output: torch.Tensor) -> None:
        record = _record(name, layer, call, output, wanted)
        if consume is not None:
            consume(record)
        else:
            seen.calls.setdefault(name, []).append(record)

    seeing: dict[Pattention, See] = {layer: partial(see, name, layer) for name, layer in chosen.items()}
    with tapped(seeing=seeing):
        yield seen


def _choose(
    model: nn.Module, names: Sequence[str] | None, kinds: Sequence[str] | None, segments: Sequence[str] | None
) -> dict[str, Pattention]:
    """The layers that are asked for, by path."""
    for label, given in (("layers", names), ("kinds", kinds), ("segments", segments)):
        if isinstance(given, str):
            raise UserError(f"{label} must be a list of names: write {label}=['{given}']")
    layers = pattention_layers(model)
    if names is not None:
        paths = {find_layer(model, name) for name in names}
        layers = {path: layer for path, layer in layers.items() if path in paths}
    if kinds is not None:
        known = sorted({kind_of(layer) for layer in pattention_layers(model).values()})
        for kind in kinds:
            if kind not in known:
                raise UserError(f"unknown kind '{kind}': the layers of this model are {', '.join(known)}")
        layers = {path: layer for path, layer in layers.items() if kind_of(layer) in kinds}
    if segments is not None:
        sizes = {path: segment_sizes(model, path) for path in layers}
        known = list(dict.fromkeys(name for found in sizes.values() for name in found))
        for name in segments:
            if name not in known:
                raise UserError(f"unknown segment '{name}': the chosen layers have {', '.join(known) or 'none'}")
        layers = {path: layer for path, layer in layers.items() if set(segments) & set(sizes[path])}
    return layers


@torch.no_grad()
def _record(name: str, layer: Pattention, call: Call, output: torch.Tensor, wanted: _Wanted) -> LayerRecord:
    x = call.x.detach()
    tokens = {segment: (key.detach(), value.detach()) for segment, (key, value) in call.tokens.items() if len(key)}
    masks = {
        segment: None if call.visible is None or segment not in call.visible else call.visible[segment][..., : len(key)]
        for segment, (key, _) in tokens.items()
    }
    kind, activation = get_normalization(layer.normalization), get_activation(layer.activation)
    scores = {segment: linear(x, key) for segment, (key, _) in tokens.items()}
    activities = {segment: kind.activities(found, activation, masks[segment]) for segment, found in scores.items()}
    total = kind.combine([kind.statistic(found) for found in activities.values()])
    records = {}
    for segment, (_, value) in tokens.items():
        if wanted.segments is not None and segment not in wanted.segments:
            continue
        weights, mask = kind.weights(activities[segment], total, layer.scale, activation, layer.eps), masks[segment]
        if mask is not None:
            weights = weights.masked_fill(~mask, 0)
        weights = weights.to(scores[segment].dtype)
        records[segment] = _segment_record(scores[segment], weights, value, wanted)
    return LayerRecord(name, kind_of(layer), x, output.detach(), records)


def _segment_record(scores: torch.Tensor, weights: torch.Tensor, value: torch.Tensor, wanted: _Wanted) -> SegmentRecord:
    num_tokens, indices = len(value), None
    output = F.linear(weights, value.T) if wanted.outputs else None
    if wanted.top_k is not None:
        indices = weights.abs().topk(min(wanted.top_k, num_tokens), dim=-1).indices
        weights, scores = weights.gather(-1, indices), scores.gather(-1, indices)
    return SegmentRecord(
        num_tokens, weights if wanted.weights else None, scores if wanted.scores else None, indices, output
    )
