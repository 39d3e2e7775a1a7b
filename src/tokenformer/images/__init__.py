"""Images and their classes: sources (`open_images`), decoding, crops for training, the processor of a model.

The names below are loaded on first use, so that importing this package stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenformer.images.augmentation import Augment
    from tokenformer.images.decoding import BadImage, decode
    from tokenformer.images.loading import EvaluationImages, TrainingImages, collate_images
    from tokenformer.images.mixing import soft_cross_entropy
    from tokenformer.images.processing import image_processor, load_processor
    from tokenformer.images.sources import ImageData, ImageSet, open_image_set, open_images

_LAZY = {
    "Augment": "tokenformer.images.augmentation",
    "BadImage": "tokenformer.images.decoding",
    "EvaluationImages": "tokenformer.images.loading",
    "ImageData": "tokenformer.images.sources",
    "ImageSet": "tokenformer.images.sources",
    "TrainingImages": "tokenformer.images.loading",
    "collate_images": "tokenformer.images.loading",
    "decode": "tokenformer.images.decoding",
    "image_processor": "tokenformer.images.processing",
    "load_processor": "tokenformer.images.processing",
    "open_image_set": "tokenformer.images.sources",
    "open_images": "tokenformer.images.sources",
    "soft_cross_entropy": "tokenformer.images.mixing",
}

__all__ = [
    "Augment",
    "BadImage",
    "EvaluationImages",
    "ImageData",
    "ImageSet",
    "TrainingImages",
    "collate_images",
    "decode",
    "image_processor",
    "load_processor",
    "open_image_set",
    "open_images",
    "soft_cross_entropy",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
