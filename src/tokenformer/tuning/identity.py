"""Which model an adapter was made for: a hash of its parameters, and of the fields that decide what they compute."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from tokenformer.pattention import AdapterTokens

# Of the configuration. What is left out (names of classes, caches, attention functions) changes no output, or shows in
# the shapes of parameters.
_FIELDS = (
    "model_type",
    "num_attention_heads",
    "normalization",
    "activation",
    "pattention_eps",
    "layer_norm_eps",
    "rotary_pct",
    "rope_parameters",
    "patch_size",
    "pooling",
)
# PEFT puts a wrapper around each layer that carries an adapter; `tokenformer.tuning.peft_method` names its tokens so.
WRAPPED, WRAPPERS_TOKENS = ".base_layer", "tokens_adapter"
_DTYPES = (torch.bfloat16, torch.float16)


def base_hashes(model: nn.Module) -> dict[str, str]:
    """Hashes of a model without its adapters, by the dtype in which it may be loaded when they are compared.

    A model in float32 and the same one loaded in bfloat16 have the same hash `bfloat16`; that of `float16` is for those
    loaded in float16.
    """
    return {_name(dtype): base_hash(model, dtype) for dtype in _DTYPES}


def comparable(model: nn.Module) -> str:
    """Which of `base_hashes` a model can be compared by, in the dtype it has."""
    narrow = any(p.dtype == torch.float16 for p in model.parameters())
    return _name(torch.float16 if narrow else torch.bfloat16)


@torch.no_grad()
def base_hash(model: nn.Module, dtype: torch.dtype) -> str:
    """SHA-256 over names, shapes and values, rounded to `dtype`, of all parameters and buffers but the adapters'."""
    digest = hashlib.sha256(json.dumps(_fields(model), sort_keys=True).encode())
    adapters = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, AdapterTokens))
    for path, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: _plain(item[0])):
        if path.startswith(adapters) or f".{WRAPPERS_TOKENS}." in path:
            continue
        digest.update(f"{_plain(path)}{tuple(tensor.shape)}".encode())
        values = tensor.to(dtype) if tensor.is_floating_point() else tensor
        digest.update(values.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fields(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return {field: getattr(config, field) for field in _FIELDS if hasattr(config, field)}


def _plain(path: str) -> str:
    return path.replace(WRAPPED, "")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
