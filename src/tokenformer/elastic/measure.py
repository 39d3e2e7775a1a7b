"""How much each parameter token matters on calibration data.

The output of a Pattention is a sum over tokens, weight times value. Leaving one token out, the other weights being
kept, changes a row of the output by w v, and the mean square of that is the energy of its weight times the square norm
of its value: E[w^2] ||v||^2. That is the importance of a token here.

Shapes: R rows (positions of all inputs), D channels, N parameter tokens of a layer.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tokenformer.elastic.sizes import layers_of, require_whole, segments_of
from tokenformer.errors import UserError
from tokenformer.ops import get_activation, get_normalization, segment_activities
from tokenformer.pattention import Pattention

# Inputs of a model: keyword arguments of its forward pass.
Batch = Mapping[str, Any]
_ROWS_AT_ONCE = 4096


@torch.no_grad()
def importance(model: nn.Module, batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
    """E[w^2] ||v||^2 of every token, in one pass over the data; (N,) in float64 for each layer, by path.

    Tokens of all segments in order. On a layer that several calls of the model share, all of them count.

    Args:
        model: a TokenFormer, or any module that contains Pattention layers.
        batches: arguments of the forward pass, such as `{"input_ids": ids}` (B, T) without padding.

    Raises:
        UserError: no Pattention layers, an adapter, or a segment with a limit or a gain; no batch, or a layer that none
            of them reaches.
    """
    energy: dict[Pattention, torch.Tensor] = {}

    def add(layer: Pattention, x: torch.Tensor) -> None:
        energy[layer] = energy.get(layer, 0) + weights_of(layer, x).double().square().sum(0)

    rows = observe(model, batches, add)
    found = {}
    for path, layer in layers_of(model).items():
        values = torch.cat([segment.value for segment in segments_of(layer).values()])
        found[path] = energy[layer] / rows[layer] * values.double().square().sum(-1)
    return found


@torch.no_grad()
def observe(
    model: nn.Module, batches: Iterable[Batch], see: Callable[[Pattention, torch.Tensor], None]
) -> dict[Pattention, int]:
    """Run the model in evaluation mode and call `see` with every layer's inputs, (R, D); returns R by layer.

    Raises:
        UserError: no Pattention layers, an adapter, or a segment with a limit or a gain; no batch, or a layer that none
            of them reaches.
    """
    layers = layers_of(model)
    require_whole(layers)
    rows = dict.fromkeys(layers.values(), 0)

    def hook(layer: nn.Module, arguments: tuple[torch.Tensor, ...], named: dict[str, Any]) -> None:
        assert isinstance(layer, Pattention)
        x = arguments[0] if arguments else named["x"]
        for some in x.flatten(0, -2).split(_ROWS_AT_ONCE):
            see(layer, some)
            rows[layer] += len(some)

    training = model.training
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers.values()]
    try:
        model.eval()
        for batch in batches:
            model(**batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    for path, layer in layers.items():
        if not rows[layer]:
            raise UserError(f"calibration: no input reaches {path}: give at least one batch that the whole model reads")
    return rows


def weights_of(layer: Pattention, x: torch.Tensor) -> torch.Tensor:
    """The weights (R, N) that inputs (R, D) give to the values of a layer, of all segments in order."""
    kind, activation = get_normalization(layer.normalization), get_activation(layer.activation)
    activities, total = activities_of(layer, x)
    return kind.weights(activities, total, layer.scale, activation, layer.eps)


def activities_of(layer: Pattention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activities (R, N) and row totals (R, 1) of a layer for inputs (R, D)."""
    key = torch.cat([segment.key for segment in segments_of(layer).values()])
    return segment_activities(x, key, normalization=layer.normalization, activation=layer.activation)
