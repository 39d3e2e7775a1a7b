"""Labelled images that are read when asked for, and what is done where one cannot be read."""

import os
from collections.abc import Sequence
from itertools import chain
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from tokenformer.images.decoding import BadImage, decode

OnBadImage = Literal["error", "skip"]
# Sets that take up less than this many bytes as pixels are decoded once and kept: CIFAR-10 takes 150 MB.
_KEPT = 500_000_000


class Pictures(Protocol):
    """Where encoded images lie."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes | str | Image.Image:
        """The bytes of a file, its path, or an image."""

    def name(self, index: int) -> str:
        """What to call it in errors."""


class Files:
    """Image files, by path."""

    def __init__(self, paths: Sequence[str]) -> None:
        # One array, where a list of a million strings would be copied page by page into each worker process.
        self._paths = np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._paths[index])

    def name(self, index: int) -> str:
        """The path."""
        return f"'{self[index]}'"


class Arrays:
    """Greyscale images (N, H, W) of eight bits in memory."""

    def __init__(self, pixels: np.ndarray, what: str) -> None:
        self._pixels = pixels
        self._what = what

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index])

    def name(self, index: int) -> str:
        """What they are, and a number."""
        return f"{self._what} {index}"


class ImageSet(Dataset[tuple[Image.Image, int]]):
    """Labelled images; `set[i]` is `(image, label)`: RGB, upright, of its own size.

    Small sets (below 500 MB of pixels) are decoded once and kept in memory, by each worker process for itself.

    Args:
        pictures: where the images lie.
        labels: their classes (N,), as positions in `classes`.
        classes: names.
        rows: which of the pictures, in which order; all if not given.
        on_bad_image: `error` ends the run at an image that cannot be read; `skip` leaves it out and counts it.

    Attributes:
        labels: (N,) of the rows, known without reading an image.
        classes: names of the classes.
        on_bad_image: as given.
    """

    def __init__(
        self,
        pictures: Pictures,
        labels: np.ndarray,
        classes: tuple[str, ...],
        *,
        rows: np.ndarray | None = None,
        on_bad_image: OnBadImage = "error",
    ) -> None:
        assert len(pictures) == len(labels)
        self._pictures = pictures
        self._rows = np.arange(len(pictures)) if rows is None else rows
        self._all_labels = labels
        self.labels = labels[self._rows]
        self.classes = classes
        self.on_bad_image = on_bad_image
        # Shared, because images are read in worker processes and counted here.
        self._bad = torch.zeros(len(self._rows), dtype=torch.bool).share_memory_()
        self._kept: dict[int, np.ndarray] = {}
        self._room: int | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels(index)), int(self.labels[index])

    def pixels(self, index: int) -> np.ndarray:
        """The image as uint8 (H, W, 3), not to be written to.

        Raises:
            BadImage: it cannot be read; it is then counted as unreadable.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")  # what ends a loop over the set
        if index in self._kept:
            return self._kept[index]
        row = int(self._rows[index])
        try:
            pixels = np.asarray(decode(self._pictures[row], name=self._pictures.name(row)))
        except BadImage:
            self._bad[index] = True
            raise
        if self._room is None:
            self._room = _KEPT if pixels.nbytes * len(self) <= _KEPT else 0
        if pixels.nbytes <= self._room:
            self._room -= pixels.nbytes
            self._kept[index] = pixels
        return pixels

    def readable(self, index: int) -> tuple[int, np.ndarray]:
        """Image `index`, or where bad images are skipped the next that can be read, from the end on to the beginning.

        Returns:
            Its index, and its pixels as uint8 (H, W, 3).

        Raises:
            BadImage: it cannot be read and is not to be skipped, or none can be read.
        """
        for candidate in chain(range(index, len(self)), range(index)):
            if self._bad[candidate] and self.on_bad_image == "skip":
                continue
            try:
                return candidate, self.pixels(candidate)
            except BadImage:
                if self.on_bad_image == "error":
                    raise
        raise BadImage(f"none of the {len(self)} images can be read: the first is {self.name(0)}")

    def name(self, index: int) -> str:
        """What to call an image: its path, or its row and where that lies."""
        return self._pictures.name(int(self._rows[index]))

    def fresh(self) -> "ImageSet":
        """The same images with nothing in memory and nothing counted yet."""
        return ImageSet(self._pictures, self._all_labels, self.classes, rows=self._rows, on_bad_image=self.on_bad_image)

    @property
    def unreadable(self) -> int:
        """How many images could not be read so far, in all worker processes."""
        return int(self._bad.sum())
