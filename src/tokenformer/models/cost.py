"""What a model costs: parameters, FLOPs and bytes, counted from its modules."""

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from tokenformer.pattention import BASE, Pattention
from tokenformer.sparse import SparsePattention


def count_tokens(model: nn.Module) -> dict[str, dict[str, int]]:
    """Parameters held in parameter tokens: `{segment: {kind: parameters}}`, for any module with Pattention layers."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for layer in model.modules():
        if isinstance(layer, Pattention):
            for name, segment in layer.segments.items():
                counts[name][layer.kind or "other"] += sum(p.numel() for p in segment.parameters())
        elif isinstance(layer, SparsePattention):
            counts[BASE][layer.kind or "other"] += layer.key.numel() + layer.value.numel()
    return {name: dict(kinds) for name, kinds in counts.items()}


def shares(model: nn.Module) -> dict[str, float]:
    """The share of all parameter tokens that an input computes, and the share of their memory that it reads.

    Both are 1 but for sparse layers, which read norm, router and remainder beside the tokens that they compute.
    """
    computed, read, tokens, memory = 0, 0, 0, 0
    for layer in model.modules():
        if not isinstance(layer, (Pattention, SparsePattention)):
            continue
        elements = layer.num_tokens * (layer.in_features + layer.out_features)
        if isinstance(layer, SparsePattention):
            computed += layer.active * layer.group_size
            read += sum(layer.elements_read().values())
        else:
            computed += layer.num_tokens
            read += elements
        tokens += layer.num_tokens
        memory += elements
    return {"computed": computed / tokens, "read": read / memory}


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


def trunk_parameters(model: Any) -> int:
    """Parameters of the blocks of an image classifier (a TokenFormer or transformers' ViT).

    Patch and position embeddings, class token, final norm and classifier are left out: they depend on the images and
    the classes, and are the same in both.
    """
    return sum(p.numel() for p in _blocks(model).parameters())


def tokens_per_image(config: Any, image_size: int | None = None) -> int:
    """Tokens that attend to one another in an image: patches and class token, of a TokenFormer or transformers' ViT."""
    return _patches(config, image_size) + getattr(config, "num_prefix_tokens", 1)  # a ViT always has its class token


def forward_flops_per_image(model: Any, image_size: int | None = None) -> int:
    """Floating-point operations to classify one image, for a TokenFormer or transformers' ViT; nothing runs.

    2 for each weight in a matrix product of a block and each of T tokens (patches and class token), 4 L D T^2 for
    token-token attention, 2 for each weight of the patch projection and each patch, 2 D for each class.

    Args:
        model: on any device, the meta device too.
        image_size: pixels along each side; the model's own if not given.
    """
    config = model.config
    patches, tokens = _patches(config, image_size), tokens_per_image(config, image_size)
    products = sum(p.numel() for p in _blocks(model).parameters() if p.dim() >= 2)
    attention = 4 * config.num_hidden_layers * config.hidden_size * tokens**2
    head = sum(p.numel() for p in model.classifier.parameters() if p.dim() >= 2)
    return 2 * (tokens * products + patches * _projection(config) + head) + attention


def training_flops_per_image(model: Any, image_size: int | None = None) -> int:
    """Floating-point operations to train on one image: forward, and backward without recomputation.

    The backward pass costs twice the forward, but for the patch projection, whose input needs no gradient.

    Args:
        model: as for `forward_flops_per_image`.
        image_size: pixels along each side; the model's own if not given.
    """
    config = model.config
    return 3 * forward_flops_per_image(model, image_size) - 2 * _patches(config, image_size) * _projection(config)


def _patches(config: Any, image_size: int | None) -> int:
    side: int = (config.image_size if image_size is None else image_size) // config.patch_size
    return side**2


def _projection(config: Any) -> int:
    weights: int = config.hidden_size * config.num_channels * config.patch_size**2
    return weights


def _blocks(model: Any) -> nn.ModuleList:
    layers: nn.ModuleList = model.base_model.layers
    return layers


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

        Every parameter token (of a sparse layer, what it reads instead), the output embedding and the final norm once;
        the keys and values of `context_length` cached positions; one row of the input embedding.

        Args:
            context_length: positions in the cache.
            dtype: of weights and cache; the model's own if not given.
        """
        config = self.config
        size = (dtype or self.dtype).itemsize
        tokens = self.num_token_parameters()
        for layer in self.modules():
            if isinstance(layer, SparsePattention):
                tokens += sum(layer.elements_read().values()) - layer.key.numel() - layer.value.numel()
        weights = tokens + config.vocab_size * config.hidden_size + 3 * config.hidden_size
        cache = 2 * config.num_hidden_layers * config.hidden_size * context_length
        return size * (weights + cache)
