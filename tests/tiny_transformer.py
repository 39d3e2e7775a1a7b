"""A GPTNeoX small enough for every test, with parameters large enough that mistakes show in its logits."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from saved_model import train_tokenizer
from tiny import VOCABULARY

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tiny_transformer(**fields: Any) -> GPTNeoXForCausalLM:
    """Two layers, two heads of 16 channels, 44 neurons, 31 words; in evaluation mode, every parameter random."""
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**SIZES, **fields})).eval()
    for name, parameter in model.named_parameters():
        norm = "layernorm" in name or "layer_norm" in name
        nn.init.normal_(parameter, mean=float(norm and name.endswith("weight")), std=0.5 if norm else 0.3)
    return model


def save_transformer(folder: Path, **fields: Any) -> GPTNeoXForCausalLM:
    """Save a tiny Transformer (vocabulary 320, so that a few rows are padding) and its tokenizer; returns the model."""
    model = tiny_transformer(**{"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0, **fields})
    model.save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return model
