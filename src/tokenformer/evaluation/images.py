"""Accuracy, cross-entropy and confusions of an image classifier on labelled images, and what it takes others for.

An image counts as right among the top k where fewer than k other classes have a logit at least as large as that of the
true class: a tie counts against the model, and so does a logit that is no number. A class that ties with the true one
for the first place is what the image was taken for, so the diagonal of the confusion matrix is exactly the top-1.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers.image_processing_backends import PilBackend

from tokenformer.errors import UserError
from tokenformer.evaluation.classes import class_names, match_classes
from tokenformer.evaluation.perplexity import evenly_spaced
from tokenformer.evaluation.progress import bar
from tokenformer.images import EvaluationImages, ImageSet, collate_images
from tokenformer.images.folders import SUFFIXES
from tokenformer.images.image_set import Files, OnBadImage
from tokenformer.models.loading import move_model

_ALL_UNREADABLE = "none of the {} images can be read: there is nothing to evaluate"


@dataclass(frozen=True)
class PixelImages:
    """Labelled images as a model reads them, kept in memory: B C H W float32 take 4 B C H W bytes.

    Attributes:
        pixel_values: (B, C, H, W).
        labels: (B,), indices of `classes`.
        classes: names.
        unreadable: images that were left out.
    """

    pixel_values: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    unreadable: int = 0

    def __len__(self) -> int:
        return len(self.labels)


def read_pixels(
    images: ImageSet, processor: PilBackend, *, limit: int | None = None, batch_size: int = 64, workers: int = 0
) -> PixelImages:
    """Decode and process images once, for a model that is evaluated on them many times.

    Args:
        images: labelled images.
        processor: of the model.
        limit: as for `evaluate_images`.
        batch_size: images at a time.
        workers: processes that decode and process; 0 does it here.

    Raises:
        UserError: as `evaluate_images`.
    """
    _check(workers, batch_size=batch_size, limit=limit)
    chosen = evenly_chosen(images, limit)
    batches = list(_batches(images, processor, chosen, batch_size, workers))
    if not batches:
        raise UserError(_ALL_UNREADABLE.format(len(chosen)))
    if len(shapes := {tuple(pixels.shape[1:]) for pixels, _ in batches}) > 1:
        raise _sizes_differ(shapes)
    pixels, labels = torch.cat([pixels for pixels, _ in batches]), torch.cat([labels for _, labels in batches])
    return PixelImages(pixels, labels, tuple(images.classes), len(chosen) - len(labels))


@torch.no_grad()
def evaluate_images(
    model: nn.Module,
    images: ImageSet | PixelImages,
    processor: PilBackend | None = None,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    top: int = 5,
    limit: int | None = None,
    workers: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Top-1, top-k, cross-entropy and confusions of a classifier; the head of this module defines a tie.

    Args:
        model: gives `.logits` (B, C) for `pixel_values` (B, 3, H, W) and has the names of its classes in
            `.config.id2label`; called as it is, in the precision around the call.
        images: labelled images, whose classes `match_classes` brings to those of the model; or `read_pixels` of them,
            where the same ones are evaluated again and again.
        processor: of the model; not needed for `PixelImages`.
        batch_size: images at a time.
        device: to compute on, where the model is put; where it is if not given.
        top: k of the top-k accuracy, at most the number of classes.
        limit: so many images only, evenly spaced over all when these are ordered by class, so that each class keeps its
            share; all if not given.
        workers: processes that decode and process; 0 does it between the batches.
        progress: show a bar where stderr is a terminal.

    Returns:
        `top1` and `top5` (by the name of `top`; shares of the images), `top` (the k that the number of classes allows),
        `loss` (nats per image, summed in float64), `classes` (names, in the order of the model), `confusion` (C rows of
        C counts: row the true class, column what it was taken for), `per_class` (`name`, `images`, `recall` or None
        without images, `precision` or None where nothing was taken for it), `images` (the number that was judged),
        `unreadable` (left out), `seconds` (reading included) and `images_per_second`.

    Raises:
        UserError: no images, or none that can be read; other classes than the model's; images of a size that the model
            does not take; an option out of range.
        BadImage: an image cannot be read and `images` does not skip it.
    """
    _check(workers, batch_size=batch_size, top=top, limit=limit)
    names, ids = match_classes(_id2label(model), images.classes)
    chosen = evenly_chosen(images, limit)
    if isinstance(images, PixelImages):
        batches = _sliced(images, chosen, batch_size)
    else:
        assert processor is not None, "labelled images need the image processor of the model"
        batches = _batches(images, processor, chosen, batch_size, workers)
    move_model(model, device)
    tally = _Tally(len(names), min(top, len(names)))
    start = time.perf_counter()
    with _evaluating(model), bar("evaluating", len(chosen), "images", progress) as advance:
        for pixels, labels in batches:
            tally.add(_logits(model, pixels), ids[labels])
            advance(len(labels))
    seconds = time.perf_counter() - start
    if not tally.images:
        raise UserError(_ALL_UNREADABLE.format(len(chosen)))
    before = images.unreadable if isinstance(images, PixelImages) else 0
    return {
        "top1": tally.confusion.diagonal().sum().item() / tally.images,
        f"top{top}": tally.hits / tally.images,
        "top": tally.top,
        "loss": tally.nats / tally.images,
        "classes": names,
        "confusion": tally.confusion.tolist(),
        "per_class": _per_class(names, tally.confusion),
        "images": tally.images,
        "unreadable": before + len(chosen) - tally.images,
        "seconds": seconds,
        "images_per_second": tally.images / seconds,
    }


@torch.no_grad()
def predict_images(
    model: nn.Module,
    paths: Sequence[str | Path],
    processor: PilBackend,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    top: int = 5,
    on_bad_image: OnBadImage = "error",
    workers: int = 0,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """What a classifier takes image files for that have no labels.

    Args:
        model: as for `evaluate_images`.
        paths: of the files.
        processor: of the model.
        batch_size: images at a time.
        device: to compute on, where the model is put; where it is if not given.
        top: so many classes for each image, at most all there are.
        on_bad_image: `error` ends at a file that cannot be read; `skip` leaves it out.
        workers: processes that decode and process; 0 does it between the batches.
        progress: show a bar where stderr is a terminal.

    Returns:
        For each file its `image` (the path) and its `classes`, best first, each with `name` and `probability`.

    Raises:
        UserError: as `evaluate_images`; the model gives something that is no finite number.
        BadImage: a file cannot be read and is not to be skipped.
    """
    _check(workers, batch_size=batch_size, top=top)
    names = class_names(model)
    # For a label each file has its own number, which then says which ones could be read.
    images = ImageSet(
        Files([str(path) for path in paths]), np.arange(len(paths)), tuple(names), on_bad_image=on_bad_image
    )
    move_model(model, device)
    found = []
    with _evaluating(model), bar("classifying", len(paths), "images", progress) as advance:
        for pixels, numbers in _batches(images, processor, range(len(paths)), batch_size, workers):
            logits = _logits(model, pixels).cpu().double()
            if not logits.isfinite().all():
                raise UserError(
                    "what the model gives is not finite: its weights are damaged, or their dtype is too narrow (try "
                    "float32)"
                )
            best = logits.softmax(1).topk(min(top, len(names)))
            for number, shares, classes in zip(
                numbers.tolist(), best.values.tolist(), best.indices.tolist(), strict=True
            ):
                guesses = [{"name": names[i], "probability": p} for i, p in zip(classes, shares, strict=True)]
                found.append({"image": str(paths[number]), "classes": guesses})
            advance(len(numbers))
    if not found:
        raise UserError(_ALL_UNREADABLE.format(len(paths)))
    return found


def unlabelled_files(sources: Sequence[str]) -> list[str] | None:
    """The files, where `sources` are image files or a folder of such without class folders; otherwise None.

    Raises:
        UserError: some are image files and others are not.
    """
    are_files = [not Path(source).is_dir() and source.lower().endswith(SUFFIXES) for source in sources]
    if all(are_files):
        return list(sources)
    if len(sources) > 1:
        other = sources[are_files.index(False)]
        raise UserError(f"'{other}' is no image file: give one source of labelled images, or image files only")
    folder = Path(sources[0])
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    if any(path.is_dir() for path in entries):
        return None
    return sorted(str(path) for path in entries if path.name.lower().endswith(SUFFIXES)) or None


def evenly_chosen(images: ImageSet | PixelImages, limit: int | None) -> list[int]:
    """Numbers of `limit` images in their order, evenly spaced over the classes; of all if None.

    Raises:
        UserError: there are no images.
    """
    if not len(images):
        raise UserError("there are no images")
    by_class = np.argsort(np.asarray(images.labels), kind="stable").tolist()
    return sorted(evenly_spaced(by_class, limit))


def part_of(count: int, limit: float | None) -> int | None:
    """`limit` as a number of images: itself, or such a fraction of `count`.

    Raises:
        UserError: it is neither.
    """
    if limit is None:
        return None
    if not (0 < limit < 1 or (limit >= 1 and limit % 1 == 0)):
        raise UserError(f"limit must be a number of images, or a fraction between 0 and 1, got {limit:g}")
    return int(limit) if limit >= 1 else max(1, round(limit * count))


def _check(workers: int, **options: int | None) -> None:
    if workers < 0:
        raise UserError(f"workers must be at least 0, got {workers}")
    for name, value in options.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")


class _Tally:
    """What is summed up over the batches."""

    def __init__(self, classes: int, top: int) -> None:
        self.confusion = torch.zeros(classes, classes, dtype=torch.long)
        self.top = top
        self.hits = 0
        self.nats = 0.0
        self.images = 0

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add (B, C) logits and (B,) true classes."""
        # On the CPU, as not every accelerator has float64.
        logits = logits.cpu().double()
        self.nats += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        true = labels[:, None]
        # What is not below the true class stands before it; written so that it holds for what is no number too.
        before = (~(logits < logits.gather(1, true))).sum(1) - 1
        strongest_other = logits.scatter(1, true, -math.inf).argmax(1)
        taken_for = torch.where(before == 0, labels, strongest_other)
        self.confusion.index_put_((labels, taken_for), torch.ones_like(labels), accumulate=True)
        self.hits += int((before < self.top).sum())
        self.images += len(labels)


def _per_class(names: list[str], confusion: torch.Tensor) -> list[dict[str, Any]]:
    rows = zip(names, confusion.diagonal().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist(), strict=True)
    return [
        {
            "name": name,
            "images": there,
            "recall": right / there if there else None,
            "precision": right / taken if taken else None,
        }
        for name, right, there, taken in rows
    ]


def _batches(
    images: ImageSet, processor: PilBackend, chosen: Sequence[int], batch_size: int, workers: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pixels and labels of the images that can be read."""
    loader = DataLoader(
        Subset(EvaluationImages(images, processor), chosen),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # otherwise it draws from the one that training goes on with
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        if batch:
            yield batch["pixel_values"], batch["labels"]


def _collate(items: list[Mapping[str, Any] | None]) -> dict[str, torch.Tensor] | UserError:
    """The batch, or what is wrong with it: what a worker process raises arrives with its traceback as the message."""
    shapes = {tuple(item["pixel_values"].shape) for item in items if item is not None}
    return _sizes_differ(shapes) if len(shapes) > 1 else collate_images(items)


def _sizes_differ(shapes: set[tuple[int, ...]]) -> UserError:
    (_, *first), (_, *second) = sorted(shapes)[:2]
    return UserError(
        f"the image processor gives images of different sizes ({_size(first)} and {_size(second)}): set do_center_crop "
        "and crop_size, or a size with height and width, in preprocessor_config.json"
    )


def _sliced(images: PixelImages, chosen: list[int], batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, len(chosen), batch_size):
        indices = torch.tensor(chosen[start : start + batch_size])
        yield images.pixel_values[indices], images.labels[indices]


def _logits(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    parameter = next(model.parameters())
    try:
        logits: torch.Tensor = model(pixel_values=pixels.to(parameter.device, parameter.dtype)).logits
    except (RuntimeError, ValueError) as error:
        if (size := _image_size(model)) and size != list(pixels.shape[-2:]):
            raise UserError(
                f"the model takes images of {_size(size)} pixels and its image processor gives "
                f"{_size(pixels.shape[-2:])}: correct size and crop_size in preprocessor_config.json"
            ) from error
        raise
    return logits


def _id2label(model: nn.Module) -> Mapping[int, str]:
    config: Any = model.config
    names: Mapping[int, str] = config.id2label
    return names


def _image_size(model: nn.Module) -> list[int] | None:
    """Height and width as the configuration names them, where it does."""
    size = getattr(model.config, "image_size", None)
    return [size, size] if isinstance(size, int) else list(size) if size else None


def _size(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
