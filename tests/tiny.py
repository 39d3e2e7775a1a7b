"""A language model small enough for every test, with parameters large enough that mistakes show in its logits."""

from typing import Any

import torch
from torch import nn

from tokenformer import ParameterTokens, TokenFormerConfig, TokenFormerForCausalLM

SEGMENTS = [{"name": "base", "qkv": 12, "output": 10, "ffn": 20}]
VOCABULARY = 31


def tiny_config(**fields: Any) -> TokenFormerConfig:
    """Two layers, two heads of 16 channels, 31 words."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
        "segments": [dict(segment) for segment in SEGMENTS],
    }
    return TokenFormerConfig(**{**sizes, **fields})


def tiny_model(*, attention: str = "sdpa", **fields: Any) -> TokenFormerForCausalLM:
    """A model in evaluation mode with random parameters that give scores and outputs of the order of one."""
    model = TokenFormerForCausalLM(tiny_config(**fields)).eval()
    for module in model.modules():
        if isinstance(module, ParameterTokens):
            nn.init.normal_(module.key, std=model.config.hidden_size**-0.5)
            nn.init.normal_(module.value, std=0.5)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    nn.init.normal_(model.model.norm.weight, mean=1, std=0.5)
    nn.init.normal_(model.model.norm.bias, std=0.5)
    model.set_attn_implementation(attention)
    return model


def tiny_ids(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Token ids (rows, length)."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
