"""Judging models: perplexity and bits per byte on rows, files and datasets; the tasks of lm-eval; accuracy on images.

The names below are loaded on first use: training needs only `evaluate_perplexity` or `evaluate_images`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenformer.evaluation.images import PixelImages, evaluate_images, predict_images, read_pixels
    from tokenformer.evaluation.loading import load_any_classifier, load_any_model, load_any_tokenizer
    from tokenformer.evaluation.perplexity import evaluate_perplexity
    from tokenformer.evaluation.tasks import run_tasks, select_tasks
    from tokenformer.evaluation.text import evaluate_sources, read_sources

_LAZY = {
    "PixelImages": "tokenformer.evaluation.images",
    "evaluate_images": "tokenformer.evaluation.images",
    "evaluate_perplexity": "tokenformer.evaluation.perplexity",
    "evaluate_sources": "tokenformer.evaluation.text",
    "load_any_classifier": "tokenformer.evaluation.loading",
    "load_any_model": "tokenformer.evaluation.loading",
    "load_any_tokenizer": "tokenformer.evaluation.loading",
    "predict_images": "tokenformer.evaluation.images",
    "read_pixels": "tokenformer.evaluation.images",
    "read_sources": "tokenformer.evaluation.text",
    "run_tasks": "tokenformer.evaluation.tasks",
    "select_tasks": "tokenformer.evaluation.tasks",
}

__all__ = [
    "PixelImages",
    "evaluate_images",
    "evaluate_perplexity",
    "evaluate_sources",
    "load_any_classifier",
    "load_any_model",
    "load_any_tokenizer",
    "predict_images",
    "read_pixels",
    "read_sources",
    "run_tasks",
    "select_tasks",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
