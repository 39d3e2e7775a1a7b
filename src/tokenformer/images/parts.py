"""A part of a source, opened: images, labels and classes; and how a part is held out."""

from dataclasses import dataclass

import numpy as np

from tokenformer.images.image_set import Pictures

# Names of what is held out, in the order in which they are looked for.
HELD_OUT_NAMES = ("validation", "valid", "val", "test")


@dataclass(frozen=True)
class Part:
    """Images of a source that belong together.

    Attributes:
        pictures: where the images lie.
        labels: (N,) positions in `classes`.
        classes: names.
        fingerprint: what tells them from others, found without reading all of them.
        where: what to call them in errors.
    """

    pictures: Pictures
    labels: np.ndarray
    classes: tuple[str, ...]
    fingerprint: str
    where: str


def stratified(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a fraction of each class, drawn by `seed`.

    Of a class with two images or more at least one is held out and one is kept; a single image is kept.

    Returns:
        Rows that are kept and rows that are held out, both ascending.
    """
    generator = np.random.default_rng(seed)
    out = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        out.append(generator.permutation(rows)[:count])
    held_out = np.sort(np.concatenate(out))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out
