"""Reading images beside training on them: the loader must not be what a run waits for.

A DataLoader gives random crops of some images, several times over and each time in another order, with 0, 1, 2, ...
worker processes. In the first pass images are decoded, in later ones small sets are in memory. The first batch of every
number of workers is compared with images that were read one by one. Beside it stands the training step of a model on
such a batch: augmentation, forward, backward and AdamW.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader

from tokenformer.benchmarks.conditions import check_options, warm_up
from tokenformer.benchmarks.report import new_record
from tokenformer.benchmarks.timing import interleave
from tokenformer.errors import UserError
from tokenformer.hardware import autocast_dtype, pick_device, pick_precision, set_threads
from tokenformer.images import ImageSet, TrainingImages, collate_images, open_images
from tokenformer.images.augmentation import Augment
from tokenformer.images.loading import Crop
from tokenformer.images.mixing import soft_cross_entropy
from tokenformer.images.processing import IMAGENET_MEAN, IMAGENET_STD
from tokenformer.models import TokenFormerForImageClassification, TokenFormerVisionConfig
from tokenformer.models.cost import trunk_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of the training images: the benchmark reads those alone, but a source may bring no others.
_HELD_OUT = 0.1


def measure(
    train: str = "digits",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    crop: Crop = "resized",
    image_size: int | None = None,
    workers: tuple[int, ...] = (0, 1, 2),
    images: int = 8192,
    batch: int = 128,
    passes: int = 3,
    model: str | None = None,
    preset: str | None = None,
    threads: int | None = None,
    repeats: int = 5,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Time the loader by its number of workers, and the training step of a model.

    Args:
        train: source of the images, as `open_images` takes it.
        image_column: of Parquet files and the Hub; found if not given.
        label_column: likewise.
        crop: resized, pad or none.
        image_size: pixels along each side of a crop; the model's, or the larger side of the first image if not given.
        workers: numbers of worker processes; 0 reads in this one.
        images: to read in each pass, at most; at random from all.
        batch: images of a batch.
        passes: over these images, each in another order.
        model: folder of an image classifier whose step is timed.
        preset: size of the paper whose step is timed, with random weights.
        threads: of torch in the training step; one per physical core if not given.
        repeats: rounds of the training step.
        progress: called with a line on what is being done.

    Returns:
        The record (see benchmarks/README.md).

    Raises:
        UserError: an option out of range, a source or model that cannot be opened, or a batch that is wrong; then no
            times are reported.
    """
    check_options(("float32",), images=images, batch=batch, passes=passes, repeats=repeats)
    if not workers or len(set(workers)) != len(workers) or min(workers) < 0:
        raise UserError(f"workers must be one or more numbers, each once, got '{','.join(map(str, workers))}'")
    if model is not None and preset is not None:
        raise UserError("give model or preset, not both")
    progress("opening the images")
    data = open_images(train, held_out=_HELD_OUT, image_column=image_column, label_column=label_column)
    classifier = _classifier(model, preset, len(data.classes), image_size)
    image_size = classifier.config.image_size if classifier is not None else image_size or max(data.image_size)
    threads = set_threads(threads)
    options = {
        "train": train,
        "crop": crop,
        "image_size": image_size,
        "workers": list(workers),
        "images": min(images, len(data.train)),
        "batch": batch,
        "passes": passes,
        "model": model,
        "preset": preset,
        "repeats": repeats,
    }
    record = new_record("images", options, threads)
    chosen = np.random.default_rng(0).permutation(len(data.train))[:images]
    if len(chosen) < batch:
        raise UserError(f"batch {batch} is more than the {len(chosen)} images there are to read")
    record["loader"] = {}
    for count in workers:
        progress(f"reading {passes} x {len(chosen)} images, {count} workers")
        record["loader"][str(count)] = _read(data.train, crop, image_size, chosen, batch, passes, count)
    if classifier is not None:
        progress(f"timing the training step, {repeats} rounds")
        record["model"] = _step(classifier, TrainingImages(data.train, crop, image_size), chosen[:batch], repeats)
    return record


def report(record: Mapping[str, Any]) -> str:
    """The figures as text: images a second by number of workers, and against the model's."""
    options, model = record["options"], record.get("model")
    lines = [
        f"{options['images']} images of {options['train']}, crop {options['crop']} to {options['image_size']} x "
        f"{options['image_size']}, batches of {options['batch']}",
        "",
        "images per second" + (" (and as a multiple of the model's)" if model else ""),
        f"{'workers':>8}  {'first pass':>18}  {'later passes':>18}",
    ]

    def cell(rate: float | None) -> str:
        if rate is None:
            return "-"
        return f"{rate:.0f}" + (f" ({rate / model['images_per_second']:.1f} x)" if model else "")

    lines += [
        f"{count:>8}  {cell(row['first_pass']):>18}  {cell(row['later_passes']):>18}"
        for count, row in record["loader"].items()
    ]
    if model:
        lines += [
            "",
            f"training step of {model['class']} ({model['trunk_parameters'] / 1e6:.1f} M parameters in its blocks), "
            f"{model['precision']} on {model['device']}: {model['images_per_second']:.0f} images per second "
            f"(its augmentation alone: {model['augmentation_images_per_second']:.0f})",
        ]
    return "\n".join(lines)


def _classifier(
    model: str | None, preset: str | None, classes: int, image_size: int | None
) -> "PreTrainedModel | None":
    if model is not None:
        from tokenformer.evaluation.loading import load_any_classifier

        classifier = load_any_classifier(model, dtype="float32")
        own = classifier.config.image_size
        if image_size not in (None, own):
            raise UserError(f"image_size {image_size}: the model in '{model}' takes {own}")
        known = cast(int, classifier.config.num_labels)
        if known < classes:
            raise UserError(f"the images have {classes} classes, the model in '{model}' tells {known} apart")
        return classifier
    if preset is not None:
        size = {} if image_size is None else {"image_size": image_size}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return TokenFormerForImageClassification(TokenFormerVisionConfig.preset(preset, num_labels=classes, **size))
    return None


def _order(chosen: np.ndarray, passes: int) -> Iterator[tuple[int, int]]:
    """(index, position) of all passes, each in an order of its own."""
    generator = np.random.default_rng(0)
    order = np.concatenate([generator.permutation(chosen) for _ in range(passes)])
    return zip(order.tolist(), range(len(order)), strict=True)


def _read(
    images: ImageSet, crop: Crop, image_size: int, chosen: np.ndarray, batch: int, passes: int, workers: int
) -> dict[str, Any]:
    """Images per second of each pass, after the first batch, with which worker processes have started."""
    chosen = chosen[: len(chosen) // batch * batch]
    order = list(_order(chosen, passes))
    alone = TrainingImages(images, crop, image_size)
    expected = collate_images([alone[item] for item in order[:batch]])
    loader = DataLoader(
        TrainingImages(images.fresh(), crop, image_size),  # with nothing in memory yet
        batch_sampler=[order[start : start + batch] for start in range(0, len(order), batch)],
        num_workers=workers,
        collate_fn=collate_images,
    )
    per_pass = len(chosen) // batch
    batches = iter(loader)
    first = next(batches)
    if any(not torch.equal(first[name], expected[name]) for name in expected):
        raise UserError(f"{workers} workers give other images than reading them one by one: this is a bug, report it")
    rates = []
    start, since = time.perf_counter(), 1
    for number, _ in enumerate(batches, start=2):
        if number % per_pass == 0:
            now = time.perf_counter()
            rates.append((number - since) * batch / (now - start))
            start, since = now, number
    # With one batch to a pass, the first pass is over when the clock starts.
    first_pass = rates[0] if per_pass > 1 else None
    later = rates[1:] if per_pass > 1 else rates
    return {
        "first_pass": first_pass,
        "later_passes": float(np.median(later)) if later else None,
        "images_per_second": rates,
    }


def _step(model: "PreTrainedModel", rows: TrainingImages, chosen: np.ndarray, repeats: int) -> dict[str, Any]:
    """Seconds of the training step on one batch, the recipe's augmentation included."""
    device = pick_device()
    precision = pick_precision("auto", device)
    batch = collate_images([rows[int(index), position] for position, index in enumerate(chosen)])
    images, labels = batch["images"].to(device), batch["labels"].to(device)
    model = model.to(device).train()  # type: ignore[arg-type]  # transformers hides torch's signature
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    augment = Augment(cast(int, model.config.num_labels), IMAGENET_MEAN, IMAGENET_STD)
    generator = torch.Generator().manual_seed(0)
    dtype = autocast_dtype(precision)

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def augmentation() -> tuple[torch.Tensor, torch.Tensor]:
        augmented = augment(images, labels, generator)
        finish()
        return augmented

    def step() -> None:
        pixels, targets = augment(images, labels, generator)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(pixel_values=pixels).logits
        soft_cross_entropy(logits, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        finish()

    cases: dict[str, Callable[[], object]] = {"step": step, "augmentation": augmentation}
    warm_up(cases, ())
    timings = interleave(cases, repeats)
    return {
        "class": type(model).__name__,
        "trunk_parameters": trunk_parameters(model),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": precision,
        "seconds": {name: timing.as_dict() for name, timing in timings.items()},
        "images_per_second": len(labels) / timings["step"].median,
        "augmentation_images_per_second": len(labels) / timings["augmentation"].median,
    }
