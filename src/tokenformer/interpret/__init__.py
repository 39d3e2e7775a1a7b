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
    from tokenformer.interpret.attribution import (
        DirectContributions,
        Trace,
        direct_contributions,
        gradient_contributions,
        segment_shares,
        trace,
    )
    from tokenformer.interpret.building import build_index
    from tokenformer.interpret.effects import change_effect
    from tokenformer.interpret.explain import explain_text, token_cards
    from tokenformer.interpret.faithfulness import measure_faithfulness
    from tokenformer.interpret.index import Index
    from tokenformer.interpret.lens import nearest_inputs, promoted, value_lens
    from tokenformer.interpret.lineage import compare_lineage
    from tokenformer.interpret.page import write_page
    from tokenformer.interpret.pictures import TopImages, top_images
    from tokenformer.interpret.vision import explain_image

_LAZY = {
    "DirectContributions": "attribution",
    "Index": "index",
    "TopImages": "pictures",
    "Trace": "attribution",
    "build_index": "building",
    "change_effect": "effects",
    "compare_lineage": "lineage",
    "direct_contributions": "attribution",
    "explain_image": "vision",
    "explain_text": "explain",
    "gradient_contributions": "attribution",
    "measure_faithfulness": "faithfulness",
    "nearest_inputs": "lens",
    "promoted": "lens",
    "segment_shares": "attribution",
    "token_cards": "explain",
    "top_images": "pictures",
    "trace": "attribution",
    "value_lens": "lens",
    "write_page": "page",
}

__all__ = [
    "Capture",
    "Change",
    "DirectContributions",
    "Index",
    "LayerRecord",
    "Off",
    "Scale",
    "SegmentRecord",
    "Swap",
    "TokenAddress",
    "TopImages",
    "Trace",
    "build_index",
    "capture",
    "change_effect",
    "compare_lineage",
    "direct_contributions",
    "explain_image",
    "explain_text",
    "find_layer",
    "find_segment",
    "find_token",
    "gradient_contributions",
    "intervene",
    "measure_faithfulness",
    "measured_ablation",
    "nearest_inputs",
    "parse_change",
    "pattention_layers",
    "perplexity_change",
    "promoted",
    "segment_shares",
    "token_cards",
    "top_images",
    "trace",
    "value_lens",
    "write_page",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"tokenformer.interpret.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
