"""Tuning by adding tokens: adapters that are a segment of parameter tokens each, trained while all else is frozen.

They work on any model with Pattention layers: `add_adapter`, train, `save_adapter`; `load_adapter`, `set_adapter`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenformer.tuning.adapters import (
        Adapter,
        add_adapter,
        delete_adapter,
        disable_adapters,
        enable_adapters,
        list_adapters,
        merge_adapter,
        set_adapter,
        unmerge_adapter,
    )
    from tokenformer.tuning.checkpoints import AdapterCheckpoints
    from tokenformer.tuning.files import load_adapter, save_adapter
    from tokenformer.tuning.identity import base_hashes
    from tokenformer.tuning.peft_method import TokensConfig
    from tokenformer.tuning.training import tune

_LAZY = {
    "Adapter": "adapters",
    "AdapterCheckpoints": "checkpoints",
    "TokensConfig": "peft_method",
    "add_adapter": "adapters",
    "base_hashes": "identity",
    "delete_adapter": "adapters",
    "disable_adapters": "adapters",
    "enable_adapters": "adapters",
    "list_adapters": "adapters",
    "load_adapter": "files",
    "merge_adapter": "adapters",
    "save_adapter": "files",
    "set_adapter": "adapters",
    "tune": "training",
    "unmerge_adapter": "adapters",
}

__all__ = [
    "Adapter",
    "AdapterCheckpoints",
    "TokensConfig",
    "add_adapter",
    "base_hashes",
    "delete_adapter",
    "disable_adapters",
    "enable_adapters",
    "list_adapters",
    "load_adapter",
    "merge_adapter",
    "save_adapter",
    "set_adapter",
    "tune",
    "unmerge_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"tokenformer.tuning.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
