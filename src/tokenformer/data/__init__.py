"""Text to rows of token ids, memory-mapped, with a held-out part: `prepare` writes the folder, `PreparedData` reads it.

The names below are loaded on first use, so that importing this package stays cheap and never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenformer.data.megatron import MegatronData
    from tokenformer.data.preparation import prepare
    from tokenformer.data.prepared import PreparedData
    from tokenformer.data.tokenised import TokenisedData, TrainingData, open_data
    from tokenformer.data.tokenizer import tokenizer_hash

_LAZY = {
    "MegatronData": "tokenformer.data.megatron",
    "PreparedData": "tokenformer.data.prepared",
    "TokenisedData": "tokenformer.data.tokenised",
    "TrainingData": "tokenformer.data.tokenised",
    "open_data": "tokenformer.data.tokenised",
    "prepare": "tokenformer.data.preparation",
    "tokenizer_hash": "tokenformer.data.tokenizer",
}

__all__ = ["MegatronData", "PreparedData", "TokenisedData", "TrainingData", "open_data", "prepare", "tokenizer_hash"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
