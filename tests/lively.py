"""A saved model whose likeliest continuations vary, as those of a trained one do; a plain random one repeats itself."""

from pathlib import Path
from typing import Any

from saved_model import save_model
from tokenformer import ParameterTokens, TokenFormerForCausalLM


def save_lively_model(folder: Path, **fields: Any) -> TokenFormerForCausalLM:
    """As `save_model`, with layers that outweigh the embedding of the last token."""
    model = save_model(folder, **fields)
    model.model.embed_tokens.weight.data *= 0.2
    for module in model.modules():
        if isinstance(module, ParameterTokens):
            module.value.data *= 10
    model.save_pretrained(folder)
    return model
