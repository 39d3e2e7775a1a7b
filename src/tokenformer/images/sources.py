"""Where images come from: class folders, Parquet files, the Hub, scikit-learn's digits. `open_images` reads all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tokenformer.errors import UserError
from tokenformer.images import folders, tables
from tokenformer.images.digits import open_digits
from tokenformer.images.image_set import ImageSet, OnBadImage
from tokenformer.images.parts import HELD_OUT_NAMES, Part, stratified

__all__ = ["ImageData", "ImageSet", "open_image_set", "open_images"]


@dataclass(frozen=True)
class ImageData:
    """Labelled images to train on and to measure with.

    Attributes:
        train: images to train on.
        held_out: images to measure with; labels count in the same classes.
        classes: names.
        fingerprints: what tells these images from others, by part.
        image_size: (H, W) in pixels of the first training image that can be read.
    """

    train: ImageSet
    held_out: ImageSet
    classes: tuple[str, ...]
    fingerprints: Mapping[str, str]
    image_size: tuple[int, int]


def open_images(
    train: str,
    *,
    held_out: float | str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    on_bad_image: OnBadImage = "error",
    seed: int = 0,
) -> ImageData:
    """Open images for training and for measuring; none is decoded but the first.

    A source is one of

    - `digits`: the 1797 handwritten digits of scikit-learn, 8 x 8. It holds out 20 % of each digit, always the same.
    - a folder with a folder for each class, named after it; or a folder with `train` in it, which is one, and another
      called `validation`, `valid`, `val` or `test` (the first there is), which is what it holds out.
    - a Parquet file, or several as a pattern (`'data/train-*.parquet'`), or a folder of them as the Hub has them.
    - the name of a dataset on the Hub; what it holds out is called as with folders.

    Classes are the names of the folders, those of the ClassLabel column, or the different labels, sorted.

    Args:
        train: the source of the training images.
        held_out: another source, whose own held-out part is taken if it has one; or the fraction of the training images
            to hold out, of each class alike, drawn by `seed`. What `train` holds out itself if not given.
        image_column: of Parquet files and the Hub. If not given: the one of type Image, or called image or img.
        label_column: likewise. If not given: the one of type ClassLabel, or called label, labels or fine_label.
        on_bad_image: what cannot be read ends the run with an error (`error`), or is passed over and counted (`skip`).
        seed: of the fraction.

    Raises:
        UserError: a source, column or class is missing, empty or does not fit; the message names it.
        BadImage: the first image cannot be read, and is not to be skipped.
    """
    if on_bad_image not in ("error", "skip"):
        raise UserError(f"on_bad_image must be error or skip, got '{on_bad_image}'")
    parts = _open(train, image_column, label_column, may_be_empty=False)
    part = parts.get("train")
    if part is None:
        raise UserError(f"{train} has no training images, only {', '.join(parts)}: give it as held_out")
    if len(part.classes) < 2:
        raise UserError(f"{part.where} has a single class, '{part.classes[0]}': a classifier needs two or more")
    fraction = _fraction(held_out)
    if fraction is not None:
        kept, out = stratified(part.labels, fraction, seed)
        if not len(out):
            raise UserError(f"held_out {fraction:g}: no class of {train} has the two images that this takes")
        other, drawn = part, f" {fraction:g} drawn by seed {seed}"
    else:
        other, drawn = _held_out(train, parts, held_out, image_column, label_column), ""
        kept, out = np.arange(len(part.labels)), np.arange(len(other.labels))
    labels = _translated(other, part.classes)
    train_set = ImageSet(part.pictures, part.labels, part.classes, rows=kept, on_bad_image=on_bad_image)
    held_out_set = ImageSet(other.pictures, labels, part.classes, rows=out, on_bad_image=on_bad_image)
    _, first = train_set.readable(0)
    return ImageData(
        train=train_set,
        held_out=held_out_set,
        classes=part.classes,
        fingerprints={"train": part.fingerprint, "held_out": other.fingerprint + drawn},
        image_size=(first.shape[0], first.shape[1]),
    )


def open_image_set(
    source: str,
    *,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    on_bad_image: OnBadImage = "error",
) -> tuple[ImageSet, str]:
    """Open the images of one source, to measure with; none is decoded.

    Args:
        source: as for `open_images`.
        split: `train`, or the name of what the source holds out. What it holds out if not given, and all of it where it
            holds nothing out.
        image_column: as for `open_images`.
        label_column: likewise.
        on_bad_image: likewise.

    Returns:
        The images, and their fingerprint.

    Raises:
        UserError: as `open_images`; there is no such split.
    """
    names = HELD_OUT_NAMES if split in (None, "train") else (split,)
    parts = _open(source, image_column, label_column, names)
    part = parts.get("train" if split == "train" else "held_out")
    if part is None and split is None:
        part = parts["train"]
    if part is None:
        raise UserError(f"'{source}' has no split '{split}': leave it out, or give one that it has")
    classes = parts["train"].classes if "train" in parts else part.classes
    return ImageSet(part.pictures, _translated(part, classes), classes, on_bad_image=on_bad_image), part.fingerprint


def _open(
    source: str,
    image_column: str | None,
    label_column: str | None,
    held_out: Sequence[str] = HELD_OUT_NAMES,
    *,
    may_be_empty: bool = True,
) -> dict[str, Part]:
    """The parts of a source: `train`, `held_out` (called one of these names), or both.

    `may_be_empty` says whether a class folder of the training part may hold no images.
    """
    if source == "digits":
        return open_digits(held_out)
    try:
        if folders.is_image_folder(source):
            return folders.open_folder(source, held_out, may_be_empty=may_be_empty)
        return tables.open_tables(source, image_column, label_column, held_out)
    except OSError as error:
        raise UserError(f"cannot read '{error.filename or source}': {error.strerror or error}") from error


def _fraction(held_out: float | str | None) -> float | None:
    """The fraction to hold out, if it is one."""
    try:
        fraction = float(held_out) if held_out is not None else None
    except ValueError:
        return None
    if fraction is not None and not 0 < fraction < 1:
        raise UserError(f"held_out must be a source or a fraction between 0 and 1, got {held_out}")
    return fraction


def _held_out(
    train: str,
    parts: Mapping[str, Part],
    held_out: float | str | None,
    image_column: str | None,
    label_column: str | None,
) -> Part:
    if held_out is None:
        if "held_out" not in parts:
            raise UserError(
                f"{train} brings no held-out images: give held_out, another source or the fraction to hold out"
            )
        return parts["held_out"]
    other = _open(str(held_out), image_column, label_column)
    chosen = other.get("held_out") or other["train"]
    if chosen.fingerprint == parts["train"].fingerprint:
        raise UserError(f"held_out {held_out} is what is trained on: give other images, or the fraction to hold out")
    return chosen


def _translated(part: Part, classes: tuple[str, ...]) -> np.ndarray:
    """The labels of a part as positions in `classes`."""
    if part.classes == classes:
        return part.labels
    positions = {name: position for position, name in enumerate(classes)}
    unknown = [part.classes[i] for i in np.unique(part.labels) if part.classes[i] not in positions]
    if unknown:
        shown = ", ".join(f"'{name}'" for name in unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise UserError(
            f"{part.where} has classes that the training images have not: {shown}; "
            "give images of the same classes, or the training images of these"
        )
    return np.array([positions.get(name, -1) for name in part.classes])[part.labels]
