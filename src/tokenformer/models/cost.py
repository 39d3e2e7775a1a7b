"""What a model costs: parameters, FLOPs and bytes, counted from its modules."""

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from tokenformer.pattention import Pattention


def count_tokens(model: nn.Module) -> dict[str, dict[str, int]]:
    """Parameters held in parameter tokens: `{segment: {kind: parameters}}`, for any module with Pattention layers."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for layer in model.modules():
        if isinstance(layer, Pattention):
            for name, segment in layer.segments.items():
                counts[name][layer.kind or "other"] += sum(p.numel() for p in segment.parameters())
    return {name: dict(kinds) for name, kinds in counts.items()}


def non_embedding_parameters(model: Any) -> int:
    """Parameters without embeddings of a transformers language model; a tied embedding counts once."""
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    return sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in embeddings)


def training_flops_per_token(model: Any, sequence_length: int) -> int:
    """Floating-point operations to train on one token of a sequence, for any transformers language model.

    The paper's Table 3: 2 for each weight in a matrix product, the output embedding included, and 4 L D T for
    token-token attention, whose causal half is counted in full; the backward pass twice that, without recomputation.
    """
    config = model.config
    embedding = model.get_input_embeddings().weight
    products = sum(p.numel() for p in model.parameters() if p.dim() >= 2 and p is not embedding)
    if model.get_output_embeddings().weight is embedding:
        products += embedding.numel()
    return 3 * (2 * products + 4 * config.num_hidden_layers * config.hidden_size * sequence_length)


class CostMixin(nn.Module):
    """Cost methods of TokenFormer models. Nothing runs: a model on the meta device will do."""

    config: Any
    dtype: torch.dtype

    def num_token_parameters(self) -> int:
        """Parameters in parameter tokens: 2 L D (3 n_qkv + n_output + n_ffn), the paper's count without embeddings."""
        return sum(sum(kinds.values()) for kinds in count_tokens(self).values())

    def forward_flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations to process one token of a sequence, forward (paper Table 3).

        2 for each parameter in a matrix product (parameter tokens and output embedding), and 4 L D T for token-token
        attention, whose causal half is counted in full, as is customary.
        """
        config = self.config
        head = config.vocab_size * config.hidden_size if hasattr(self, "lm_head") else 0
        products = self.num_token_parameters() + head
        attention = 4 * config.num_hidden_layers * config.hidden_size * sequence_length
        return 2 * products + attention

    def training_flops_per_token(self, sequence_length: int) -> int:
        """Forward and backward: three times the forward count, without recomputation."""
        return 3 * self.forward_flops_per_token(sequence_length)

    def decode_bytes_per_token(self, context_length: int = 0, dtype: torch.dtype | None = None) -> int:
        """Bytes read from memory to generate one token at batch size 1.

        Every parameter token, the output embedding and the final norm once; the keys and values of `context_length`
        cached positions; one row of the input embedding.

        Args:
            context_length: positions in the cache.
            dtype: of weights and cache; the model's own if not given.
        """
        config = self.config
        size = (dtype or self.dtype).itemsize
        weights = self.num_token_parameters() + config.vocab_size * config.hidden_size + 3 * config.hidden_size
        cache = 2 * config.num_hidden_layers * config.hidden_size * context_length
        return size * (weights + cache)
