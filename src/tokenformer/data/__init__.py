"""Text to rows of token ids, memory-mapped, with a held-out part: `prepare` writes the folder, `PreparedData` reads it.

The names below are loaded on first use, so that importing this package stays cheap and never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenformer.data.preparation import prepare
    from tokenformer.data.prepared import PreparedData
    from tokenformer.data.tokenizer import tokenizer_hash

_LAZY = {
    "PreparedData": "tokenformer.data.prepared",
    "prepare": "tokenformer.data.preparation",
    "tokenizer_hash": "tokenformer.data.tokenizer",
}

__all__ = ["PreparedData", "prepare", "tokenizer_hash"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
