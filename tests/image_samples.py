"""Images and image classifiers small enough for every test."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from tokenformer.images import image_processor

CLASSES = ("ant", "bee", "cat")
SIZE = 8


def save_vit(folder: Path, classes: Sequence[str] | None = CLASSES, *, size: int = SIZE) -> ViTForImageClassification:
    """Save a random ViT and its image processor; without names for None (three classes); returns the model."""
    names = {} if classes is None else {"id2label": dict(enumerate(classes))}
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=size,
        patch_size=4,
        initializer_range=0.5,  # so that its answers differ
        **(names or {"num_labels": 3}),
    )
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    image_processor(size).save_pretrained(folder)
    return model


def random_image(seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    """Noise, width by height of `size`."""
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_class_folders(folder: Path, classes: Sequence[str] = CLASSES, *, each: int = 4) -> Path:
    """A folder of noise for each class."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            random_image(100 * label + i).save(folder / name / f"{i}.png")
    return folder
