"""The Transformer to compare with: transformers' own GPTNeoX, with as many parameters as wanted.

It differs from a TokenFormer in its projections alone: the embedding is tied, rotary positions cover the same share of
each head, the activation is the same, and nothing is dropped out.
"""

import itertools
import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedConfig, PreTrainedModel

from tokenformer.baselines.matching import UNIT, block_parameters, check_sizes, matching_shape
from tokenformer.errors import UserError
from tokenformer.models.cost import non_embedding_parameters


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
    check_sizes(sizes)
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
    shape = matching_shape(
        parameters,
        count=lambda width, ffn: num_hidden_layers * block_parameters(width, ffn) + 2 * width,  # and the final norm
        hidden_size=hidden_size,
        narrowest=narrowest,
        step=UNIT * num_attention_heads,
        tolerance=tolerance,
        model=f"GPTNeoX of {num_hidden_layers} layers, {num_attention_heads} heads",
        counted="parameters without embeddings",
        usable=lambda width: int(width // num_attention_heads * rotary_pct) % 2 == 0,
    )
    return transformer_config(hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, **common)


def _least_head(rotary_pct: float) -> int:
    """The smallest usual size of a head of which a pair of channels is rotated, or none if none is to be."""
    if not 0 < rotary_pct <= 1:
        return UNIT
    heads = itertools.count(UNIT * math.ceil(2 / rotary_pct / UNIT), UNIT)
    return next(head for head in heads if int(head * rotary_pct) % 2 == 0)
