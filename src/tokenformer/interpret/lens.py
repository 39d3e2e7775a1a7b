"""What a parameter token holds, read from its value and its key alone.

The value of an `output` or `ffn` token is added to the residual stream, which the final norm and the output embedding
turn into logits. With v the value, g the final norm's weight and E the output embedding, a weight of 1 on the token
adds

    E (g * (v - mean v)) / sigma

to the logits directly, where sigma is the standard deviation of the residual stream before the final norm. sigma is
one positive number for each position: it changes no ranking and is left out here unless it is given. The final norm's
bias is the same whatever the token does and is left out too. What later layers make of the value is not seen at all.

Keys of `qkv` and `ffn` tokens meet layer-normalised states. In the first block these are the embeddings of the input,
so that the reading of its query, key and value layers is exact; deeper it is a guess.

Shapes: D channels, N parameter tokens of a segment, V vocabulary (or classes).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from tokenformer.errors import UserError
from tokenformer.interpret.addresses import TokenAddress, find_layer, find_token, pattention_layers, segment_modules
from tokenformer.pattention import Pattention
from tokenformer.tuning.adapters import kind_of

# The kinds of layers whose outputs are added to the residual stream, and those whose inputs are normalised states.
WRITING, READING = ("output", "ffn"), ("qkv", "ffn")
# Scores over the vocabulary of so many tokens exist at once.
_TOKENS_AT_ONCE = 256


@dataclass(frozen=True)
class Readout:
    """How a model turns its residual stream into logits: head(norm(r)).

    Attributes:
        norm: the final layer norm.
        head: (V, D), the output embedding or classifier.
        bias: (V,) of the head, or None.
    """

    norm: nn.LayerNorm
    head: torch.Tensor
    bias: torch.Tensor | None

    def direction(self, weights: torch.Tensor) -> torch.Tensor:
        """The d with <v, d> = <head^T weights, g * (v - mean v)> for every v; `weights` are (..., V), d is (..., D)."""
        return self.centred(weights @ self.head)

    def centred(self, rows: torch.Tensor) -> torch.Tensor:
        """As `direction`, given rows (..., D) of the head or sums of them."""
        scaled = rows * self.norm.weight
        return scaled - scaled.mean(-1, keepdim=True)


def readout_of(model: nn.Module) -> Readout:
    """The final norm and the head of a TokenFormer.

    Raises:
        UserError: another model, or one whose head is not a plain linear layer.
    """
    backbone: Any = getattr(model, "base_model", None)
    head: Any = getattr(model, "lm_head", None) or getattr(model, "classifier", None)
    norm = getattr(backbone, "norm", None)
    if not isinstance(norm, nn.LayerNorm) or not isinstance(head, nn.Linear):
        raise UserError(
            f"{type(model).__name__} has no final norm and head that a token could be read through: give a TokenFormer "
            "language model or image classifier"
        )
    return Readout(norm, head.weight.detach(), None if head.bias is None else head.bias.detach())


@torch.no_grad()
def value_lens(model: nn.Module, layer: str, segment: str | None = None, *, sigma: float | None = None) -> torch.Tensor:
    """What each value token of a layer adds to the logits directly, at a weight of 1, as (N, V).

    For a large layer and vocabulary this is much memory; `promoted` takes single tokens.

    Args:
        model: a TokenFormer.
        layer: name of an `output` or `ffn` layer, or an unambiguous end of it.
        segment: of the layer; all of them in their order if not given.
        sigma: standard deviation of the residual stream to divide by; 1 if not given.

    Raises:
        UserError: an unknown layer or segment, another kind of layer, another model.
    """
    layer = find_layer(model, layer)
    _check_kind(layer, pattention_layers(model)[layer], WRITING, "value")
    segments = segment_modules(model, layer)
    if segment is not None and segment not in segments:
        raise UserError(f"no segment '{segment}' in {layer}: it has {', '.join(segments)}")
    values = [pair[1] for name, pair in _tokens(model, layer).items() if segment in (None, name)]
    return _lens(readout_of(model), torch.cat(values), sigma)


def promoted(
    model: nn.Module, address: TokenAddress | str, k: int = 10
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """The ids whose logits a value token raises most, and those that it lowers most, with what it adds (sigma 1).

    Of a positive weight, that is: GeLU lets weights be slightly negative, and these turn the sign round.

    Raises:
        UserError: an unknown token, one of a `qkv` layer, another model.
    """
    up, down = promoted_by(model, [find_token(model, address)], k)[0]
    return up, down


@torch.no_grad()
def promoted_by(
    model: nn.Module, tokens: Sequence[TokenAddress], k: int = 10, num_ids: int | None = None
) -> list[tuple[list[tuple[int, float]], list[tuple[int, float]]]]:
    """`promoted` of many tokens at once.

    Args:
        model: a TokenFormer.
        tokens: of `output` and `ffn` layers, with whole addresses.
        k: ids of each list.
        num_ids: look at the first so many rows of the head only: those that the tokenizer has a text for.

    Raises:
        UserError: as `promoted`.
    """
    readout = readout_of(model)
    values = _gather(model, tokens, WRITING, "value")
    found = []
    for part in values.split(_TOKENS_AT_ONCE):
        scores = _lens(readout, part, None)[:, :num_ids].float()
        k = min(k, scores.shape[1])
        pairs = [scores.topk(k, largest=largest) for largest in (True, False)]
        found += list(zip(*(_rows(pair.indices, pair.values) for pair in pairs), strict=True))
    return found


def nearest_inputs(model: nn.Module, address: TokenAddress | str, k: int = 10) -> list[tuple[int, float]]:
    """The ids whose layer-normalised input embeddings point most nearly where a key does, with the cosines.

    Raises:
        UserError: an unknown token, one of an `output` layer, whose keys meet mixtures of values; a model without
            input embeddings.
    """
    return nearest_by(model, [find_token(model, address)], k)[0]


@torch.no_grad()
def nearest_by(
    model: nn.Module, tokens: Sequence[TokenAddress], k: int = 10, num_ids: int | None = None
) -> list[list[tuple[int, float]]]:
    """`nearest_inputs` of many tokens at once; arguments as for `promoted_by`.

    Raises:
        UserError: as `nearest_inputs`.
    """
    keys = _gather(model, tokens, READING, "key")
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding):
        raise UserError(f"{type(model).__name__} has no input embeddings that a key could be compared with")
    table = embedding.weight.detach()[:num_ids]
    # A layer norm without weight and bias is this up to one factor, and the cosine takes that away.
    inputs = nn.functional.normalize(table - table.mean(-1, keepdim=True), dim=-1)
    found = []
    for part in keys.split(_TOKENS_AT_ONCE):
        cosines = (nn.functional.normalize(part, dim=-1) @ inputs.T).float()
        best = cosines.topk(min(k, cosines.shape[1]))
        found += _rows(best.indices, best.values)
    return found


def _lens(readout: Readout, values: torch.Tensor, sigma: float | None) -> torch.Tensor:
    centred = (values - values.mean(-1, keepdim=True)) * readout.norm.weight
    logits = centred @ readout.head.T
    return logits if sigma is None else logits / sigma


def _tokens(model: nn.Module, layer: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of the tokens of a layer that take part, as it computes with them, by segment."""
    found = cast(Pattention, model.get_submodule(layer))
    # The segments are modules that are called with an input; none of ours looks at it.
    like = next(found.parameters())
    x = torch.zeros(1, found.in_features, dtype=like.dtype, device=like.device)
    return {name: cast(Any, segment)(x) for name, segment in segment_modules(model, layer).items()}


def _gather(model: nn.Module, tokens: Sequence[TokenAddress], kinds: Sequence[str], part: str) -> torch.Tensor:
    """Keys or values (len(tokens), D) of tokens of several layers."""
    layers = pattention_layers(model)
    held: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    rows = []
    for token in tokens:
        if token.layer not in held:
            _check_kind(token.layer, layers[token.layer], kinds, part)
            held[token.layer] = _tokens(model, token.layer)
        found = held[token.layer][token.segment][1 if part == "value" else 0]
        if token.index >= len(found):
            raise UserError(f"{token} takes no part (limit {len(found)}): switch its segment on first")
        rows.append(found[token.index])
    if not rows:
        return torch.zeros(0, next(model.parameters()).shape[-1])
    return torch.stack(rows)


def _check_kind(name: str, layer: Pattention, kinds: Sequence[str], part: str) -> None:
    kind = kind_of(layer)
    if kind not in kinds:
        reason = "do not enter the residual stream" if part == "value" else "do not meet normalised states"
        raise UserError(f"{name} is of kind '{kind}', whose {part}s {reason}: give a layer of {' or '.join(kinds)}")


def _rows(indices: torch.Tensor, values: torch.Tensor) -> list[list[tuple[int, float]]]:
    return [list(zip(ids, found, strict=True)) for ids, found in zip(indices.tolist(), values.tolist(), strict=True)]
