"""One model at many sizes: run with the first tokens alone, or made smaller for good.

The names below are loaded on first use: training needs only `prefix`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenformer.elastic.folders import shrink_folder
    from tokenformer.elastic.measure import importance
    from tokenformer.elastic.shrinking import shrink
    from tokenformer.elastic.sizes import prefix

_LAZY = {
    "importance": "tokenformer.elastic.measure",
    "prefix": "tokenformer.elastic.sizes",
    "shrink": "tokenformer.elastic.shrinking",
    "shrink_folder": "tokenformer.elastic.folders",
}

__all__ = ["importance", "prefix", "shrink", "shrink_folder"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
