"""Looking inside: which parameter tokens an input uses, what they hold, and what happens without them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenformer.interpret.addresses import TokenAddress, find_layer, find_segment, find_token, pattention_layers

# Not on first use: `tokenformer.interpret.capture` would then be the module, once it is imported.
from tokenformer.interpret.capture import Capture, LayerRecord, SegmentRecord, capture
from tokenformer.interpret.intervention import (
    Change,
    Off,
    Scale,
    Swap,
    intervene,
    measured_ablation,
    parse_change,
    perplexity_change,
)

if TYPE_CHECKING:
    from tokenformer.interpret.building import build_index
    from tokenformer.interpret.effects import change_effect
    from tokenformer.interpret.index import Index
    from tokenformer.interpret.lineage import compare_lineage

_LAZY = {
    "Index": "index",
    "build_index": "building",
    "compare_lineage": "lineage",
    "change_effect": "effects",
}

__all__ = [
    "Capture",
    "Change",
    "Index",
    "LayerRecord",
    "Off",
    "Scale",
    "SegmentRecord",
    "Swap",
    "TokenAddress",
    "build_index",
    "capture",
    "change_effect",
    "compare_lineage",
    "find_layer",
    "find_segment",
    "find_token",
    "intervene",
    "measured_ablation",
    "parse_change",
    "pattention_layers",
    "perplexity_change",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"tokenformer.interpret.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
