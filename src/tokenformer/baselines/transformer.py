"""The Transformer to compare with: transformers' own GPTNeoX, with as many parameters as wanted.

It differs from a TokenFormer in its projections alone: the embedding is tied, rotary positions cover the same share of
each head, the activation is the same, and nothing is dropped out.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedConfig, PreTrainedModel

from tokenformer.errors import UserError
from tokenformer.models.cost import non_embedding_parameters

# Intermediate sizes that a match may have, in hidden sizes, and the one it is to be close to.
_LEAST_FFN, _USUAL_FFN, _MOST_FFN = 0.5, 4, 16
# Heads and intermediate sizes are multiples of this where there is a choice: odd ones multiply slowly.
_UNIT = 8


def transformer_config(
    *,
    vocab_size: int,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    intermediate_size: int,
    rotary_pct: float = 0.25,
    max_position_embeddings: int = 2048,
    tie_word_embeddings: bool = True,
    bos_token_id: int | None = 0,
    eos_token_id: int | None = 0,
) -> GPTNeoXConfig:
    """The configuration of a GPTNeoX, with the defaults of a `TokenFormerConfig`.

    Args:
        vocab_size: entries of the embedding.
        hidden_size: channels of the residual stream.
        num_hidden_layers: blocks.
        num_attention_heads: heads of attention; must divide `hidden_size`.
        intermediate_size: neurons of the feed-forward.
        rotary_pct: share of each head's channels that carries the rotary position embedding.
        max_position_embeddings: longest sequence seen in training.
        tie_word_embeddings: whether the embedding is the output embedding too.
        bos_token_id: begins a text.
        eos_token_id: ends a text.

    Raises:
        UserError: sizes that do not fit together, naming the field.
    """
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_position_embeddings,
    }
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name} must be at least 1, got {size}")
    if hidden_size % num_attention_heads:
        raise UserError(
            f"hidden_size {hidden_size} is not divisible by num_attention_heads {num_attention_heads}: "
            "change one of them"
        )
    if not 0 <= rotary_pct <= 1:
        raise UserError(f"rotary_pct must lie between 0 and 1, got {rotary_pct}")
    if (rotary := int(hidden_size // num_attention_heads * rotary_pct)) % 2:
        raise UserError(
            f"rotary size {rotary} (rotary_pct {rotary_pct} of head size {hidden_size // num_attention_heads}) is odd: "
            "it is rotated in pairs, so change rotary_pct or the number of heads"
        )
    return GPTNeoXConfig(
        **sizes,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary_pct},
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )


def num_parameters(model: PreTrainedModel | PreTrainedConfig) -> int:
    """Parameters without embeddings of a causal language model, or of one that a configuration describes.

    Neither a tied embedding nor a separate output embedding counts. This is how the paper states sizes.
    """
    if isinstance(model, PreTrainedConfig):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model)
    return non_embedding_parameters(model)


def matching_transformer(
    parameters: int,
    *,
    vocab_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    hidden_size: int | None = None,
    rotary_pct: float = 0.25,
    max_position_embeddings: int = 2048,
    tolerance: float = 0.02,
    **fields: Any,
) -> GPTNeoXConfig:
    """The GPTNeoX that has a given number of parameters, embeddings left out.

    Args:
        parameters: without embeddings, such as `num_parameters` of a TokenFormer.
        vocab_size: entries of the embedding.
        num_hidden_layers: blocks.
        num_attention_heads: heads of attention.
        hidden_size: channels of the residual stream. If not given: a multiple of 8 for each head, the one that leaves
            the feed-forward an intermediate size closest to 4 hidden sizes.
        rotary_pct: share of each head's channels that carries the rotary position embedding.
        max_position_embeddings: longest sequence seen in training.
        tolerance: share of `parameters` by which the result may be off. Within it the intermediate size is a multiple
            of 8 if one fits, otherwise the one that comes closest.
        fields: others of `transformer_config`.

    Raises:
        UserError: sizes that do not fit together; no model of these layers and heads, with an intermediate size of
            half to 16 hidden sizes, comes within the tolerance.
    """
    if parameters < 1:
        raise UserError(f"the number of parameters to match must be at least 1, got {parameters}")
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "rotary_pct": rotary_pct,
        "max_position_embeddings": max_position_embeddings,
        **fields,
    }
    narrowest = num_attention_heads * _least_head(rotary_pct) if hidden_size is None else hidden_size
    transformer_config(hidden_size=narrowest, intermediate_size=1, **common)  # what does not fit together, first
    if hidden_size is None:
        most = parameters * (1 + tolerance)
        widths = [narrowest, *_wider(narrowest, most, num_hidden_layers, num_attention_heads, rotary_pct)]
    else:
        widths = [hidden_size]
    shapes = [_nearest_shape(parameters, width, num_hidden_layers, tolerance) for width in widths]
    near = min(shapes, key=lambda shape: shape.error)
    if near.error > tolerance:
        raise UserError(
            f"no GPTNeoX of {num_hidden_layers} layers, {num_attention_heads} heads and "
            f"{'any' if hidden_size is None else 'this'} hidden_size comes within {tolerance:.2%} of {parameters} "
            f"parameters without embeddings: the nearest has {near.parameters} (hidden_size {near.hidden_size}, "
            f"intermediate_size {near.intermediate_size}), so change "
            f"{'layers or heads' if hidden_size is None else 'hidden_size or layers'}"
        )
    best = min((shape for shape in shapes if shape.error <= tolerance), key=lambda shape: shape.oddness)
    return transformer_config(hidden_size=best.hidden_size, intermediate_size=best.intermediate_size, **common)


@dataclass(frozen=True)
class _Shape:
    """Sizes of a GPTNeoX, and what comes of them.

    Attributes:
        hidden_size: channels.
        intermediate_size: neurons of the feed-forward.
        parameters: without embeddings.
        error: by which they miss what is wanted, as a share of it.
    """

    hidden_size: int
    intermediate_size: int
    parameters: int
    error: float

    @property
    def oddness(self) -> float:
        """How far the feed-forward is from its usual size: the absolute logarithm of the ratio."""
        return abs(math.log(self.intermediate_size / self.hidden_size / _USUAL_FFN))


def _count(hidden_size: int, intermediate_size: int, num_layers: int) -> int:
    """Parameters without embeddings: in each layer the weights, then biases and two norms; then the final norm."""
    d, f = hidden_size, intermediate_size
    return num_layers * (4 * d**2 + 2 * d * f + 9 * d + f) + 2 * d


def _least_head(rotary_pct: float) -> int:
    """The smallest usual size of a head of which a pair of channels is rotated, or none if none is to be."""
    if not 0 < rotary_pct <= 1:
        return _UNIT
    heads = itertools.count(_UNIT * math.ceil(2 / rotary_pct / _UNIT), _UNIT)
    return next(head for head in heads if int(head * rotary_pct) % 2 == 0)


def _least_ffn(hidden_size: int) -> int:
    return math.ceil(hidden_size * _LEAST_FFN)


def _wider(narrowest: int, most: float, num_layers: int, num_heads: int, rotary_pct: float) -> Iterator[int]:
    """Hidden sizes above `narrowest` of which a model can have `most` parameters or fewer."""
    width = narrowest
    while _count(width := width + _UNIT * num_heads, _least_ffn(width), num_layers) <= most:
        if int(width // num_heads * rotary_pct) % 2 == 0:
            yield width


def _nearest_shape(wanted: int, hidden_size: int, num_layers: int, tolerance: float) -> _Shape:
    """The intermediate size that comes closest; a multiple of 8 instead if it comes within the tolerance."""
    least, most = _least_ffn(hidden_size), _MOST_FFN * hidden_size
    without = _count(hidden_size, 0, num_layers)
    exact = (wanted - without) / (_count(hidden_size, 1, num_layers) - without)
    shapes = []
    for unit in (_UNIT, 1):
        size = min(max(unit * round(exact / unit), least), most)
        parameters = _count(hidden_size, size, num_layers)
        shapes.append(_Shape(hidden_size, size, parameters, abs(parameters / wanted - 1)))
    even, closest = shapes
    return even if even.error <= tolerance else closest
