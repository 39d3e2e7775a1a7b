"""Training and evaluation images as a DataLoader takes them.

What is random here depends on the seed and on the position in the order of training only, never on the number of
workers, so that a run that is resumed, with however many, sees the same crops.
"""

import math
from collections.abc import Mapping
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers.image_processing_backends import PilBackend

from tokenformer.errors import UserError
from tokenformer.images.decoding import BadImage
from tokenformer.images.sources import ImageSet

Crop = Literal["resized", "pad", "none"]
# The random resized crop of the recipe: share of the area, and width by height, log-uniform.
SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
_TRIES = 10
# A crop of kind pad shifts by up to this share of the side: 4 pixels of CIFAR's 32.
_PAD = 8


def resized_crop(width: int, height: int, random: Random) -> tuple[int, int, int, int]:
    """Draw the box (left, upper, right, lower) of a random resized crop.

    A share of the area and a shape are drawn up to ten times until they fit; then the largest centred box is taken
    whose shape lies within the range (Szegedy et al. 2015, as torchvision and timm do it).
    """
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for _ in range(_TRIES):
        area = width * height * random.uniform(*SCALE)
        ratio = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = random.randint(0, width - w), random.randint(0, height - h)
            return left, upper, left + w, upper + h
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


class TrainingImages(Dataset[dict[str, Any]]):
    """Images cut and mirrored at random, of one size.

    Item i is `{"image": uint8 (3, S, S), "label": int}`. Ask for `(index, position)` to say at which place of the order
    of training it stands; `index` alone stands for `(index, index)`, so that an image is always cut alike.

    Args:
        image_set: the images.
        crop: `resized` takes a part of random area (8 % to all) and shape (3:4 to 4:3) and scales it, bicubic; `pad`
            shifts by up to an eighth of the side, with black at the edges; `none` moves nothing. Before these two the
            shorter side is scaled to image_size and the centre cut out, as in evaluation.
        image_size: S, pixels along each side.
        seed: of all that is random.
        flip: probability of mirroring left and right.

    Raises:
        UserError: an unknown crop, or flip that is no probability.
        BadImage: from an item, where the images are not to be skipped.
    """

    def __init__(self, image_set: ImageSet, crop: Crop, image_size: int, seed: int = 0, *, flip: float = 0.5) -> None:
        if crop not in ("resized", "pad", "none"):
            raise UserError(f"unknown crop '{crop}': use resized, pad or none")
        if not 0 <= flip <= 1:
            raise UserError(f"flip must lie between 0 and 1, got {flip}")
        self.image_set = image_set
        self.crop = crop
        self.image_size = image_size
        self.seed = seed
        self.flip = flip

    def __len__(self) -> int:
        return len(self.image_set)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        index, position = item if isinstance(item, tuple) else (item, item)
        index, pixels = self.image_set.readable(index)
        random = Random((self.seed << 64) | int(position))
        cut = self._cut(pixels, random)
        if random.random() < self.flip:
            cut = cut[:, ::-1]
        image = torch.from_numpy(cut.transpose(2, 0, 1).copy())
        return {"image": image, "label": int(self.image_set.labels[index])}

    def _cut(self, pixels: np.ndarray, random: Random) -> np.ndarray:
        size = self.image_size
        if self.crop == "resized":
            height, width = pixels.shape[:2]
            box = resized_crop(width, height, random)
            return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box=box))
        pixels = fit(pixels, size)
        if self.crop == "none":
            return pixels
        pad = max(1, size // _PAD)
        down, right = random.randint(-pad, pad), random.randint(-pad, pad)
        shifted = np.zeros_like(pixels)
        shifted[max(0, down) : size + down, max(0, right) : size + right] = pixels[
            max(0, -down) : size - down, max(0, -right) : size - right
        ]
        return shifted


class EvaluationImages(Dataset[dict[str, Any] | None]):
    """Images as the processor of a model gives them.

    Item i is `{"pixel_values": float (3, S, S), "label": int}`, or None for an image that is skipped (`collate_images`
    leaves it out).

    Args:
        image_set: the images.
        processor: of the model.
    """

    def __init__(self, image_set: ImageSet, processor: PilBackend) -> None:
        self.image_set = image_set
        self.processor = processor

    def __len__(self) -> int:
        return len(self.image_set)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        try:
            image, label = self.image_set[index]
        except BadImage:
            if self.image_set.on_bad_image == "error":
                raise
            return None
        values = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": values, "label": label}


def collate_images(items: list[Mapping[str, Any] | None]) -> dict[str, torch.Tensor]:
    """Stack items of either dataset.

    Returns:
        `images` uint8 (B, 3, S, S) or `pixel_values` float (B, 3, S, S), and `labels` (B,); an empty dict if all images
        were skipped.
    """
    there = [item for item in items if item is not None]
    if not there:
        return {}
    name = "image" if "image" in there[0] else "pixel_values"
    return {
        "images" if name == "image" else name: torch.stack([item[name] for item in there]),
        "labels": torch.tensor([item["label"] for item in there]),
    }


def fit(pixels: np.ndarray, size: int) -> np.ndarray:
    """Scale the shorter side of (H, W, 3) to `size`, bicubic, and cut out the centre: (size, size, 3)."""
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    short = min(height, width)
    new_width, new_height = int(size * width / short), int(size * height / short)
    scaled = np.asarray(Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BICUBIC))
    upper, left = (new_height - size) // 2, (new_width - size) // 2
    return scaled[upper : upper + size, left : left + size]
