"""TokenFormer: Transformers whose parameters are tokens, grown by appending tokens instead of being retrained.

The names below are loaded on first use, so that ``import tokenformer`` stays cheap and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenformer import interpret, nn, ops
    from tokenformer.errors import UserError
    from tokenformer.growth import grow
    from tokenformer.models import (
        TokenFormerConfig,
        TokenFormerForCausalLM,
        TokenFormerForImageClassification,
        TokenFormerModel,
        TokenFormerVisionConfig,
        TokenFormerVisionModel,
    )
    from tokenformer.nn import replace_linear
    from tokenformer.pattention import ParameterTokens, Pattention

__version__ = "0.1.0"

_LAZY = {
    "nn": "tokenformer.nn",
    "ops": "tokenformer.ops",
    "UserError": "tokenformer.errors",
    "grow": "tokenformer.growth",
    "interpret": "tokenformer.interpret",
    "TokenFormerConfig": "tokenformer.models",
    "TokenFormerForCausalLM": "tokenformer.models",
    "TokenFormerForImageClassification": "tokenformer.models",
    "TokenFormerModel": "tokenformer.models",
    "TokenFormerVisionConfig": "tokenformer.models",
    "TokenFormerVisionModel": "tokenformer.models",
    "ParameterTokens": "tokenformer.pattention",
    "Pattention": "tokenformer.pattention",
    "replace_linear": "tokenformer.nn",
}

__all__ = [
    "ParameterTokens",
    "Pattention",
    "TokenFormerConfig",
    "TokenFormerForCausalLM",
    "TokenFormerForImageClassification",
    "TokenFormerModel",
    "TokenFormerVisionConfig",
    "TokenFormerVisionModel",
    "UserError",
    "__version__",
    "grow",
    "interpret",
    "nn",
    "ops",
    "replace_linear",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LAZY[name])
    return module if name in ("interpret", "nn", "ops") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
