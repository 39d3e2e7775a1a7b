"""`tokenformer bench images`."""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from tokenformer.cli.bench.running import carry_out, counts

if TYPE_CHECKING:
    from rich.console import Console


def run(
    *,
    train: str = "digits",
    image_column: str | None = None,
    label_column: str | None = None,
    crop: Literal["resized", "pad", "none"] = "resized",
    image_size: int | None = None,
    workers: str = "0,1,2",
    images: int = 8192,
    batch: int = 128,
    passes: int = 3,
    model: str | None = None,
    preset: str | None = None,
    threads: int | None = None,
    repeats: int = 5,
    quick: bool = False,
    json: str | None = None,
    compare: str | None = None,
    command: str | None = None,
) -> None:
    """Measure how fast images are read, and a model learns from them.

    Args:
        train: digits, a folder of class folders, Parquet files or a dataset of the Hub.
        image_column: of Parquet files and the Hub; found if not given.
        label_column: likewise.
        crop: of a training image.
        image_size: pixels along each side of a crop; the model's, or the larger side of the first image if not given.
        workers: numbers of worker processes, separated by commas; 0 reads in the process that trains.
        images: to read in each pass, at most; at random from all.
        batch: images of a batch.
        passes: over these images; from the second on, small sets are in memory.
        model: folder of an image classifier whose training step is timed beside it.
        preset: size of the paper (base-matched, base, large-matched, large) in place of model.
        threads: of torch in the training step; one per physical core if not given.
        repeats: rounds of the training step.
        quick: at most 256 images, 0 and 1 workers and 2 passes, to see that it runs.
        json: file for the record, a folder to give it its usual name there, or - for standard output.
        compare: record of an earlier run; what became slower or faster since is shown.
        command: written into the record.
    """
    from tokenformer.benchmarks.images import measure, report
    from tokenformer.benchmarks.showing import machine

    numbers = counts("workers", workers)
    if quick:
        numbers, images, batch, passes, repeats = (0, 1), min(images, 256), min(batch, 64), 2, min(repeats, 3)
    measured = partial(
        measure,
        train,
        image_column=image_column,
        label_column=label_column,
        crop=crop,
        image_size=image_size,
        workers=numbers,
        images=images,
        batch=batch,
        passes=passes,
        model=model,
        preset=preset,
        threads=threads,
        repeats=repeats,
    )

    def show(record: dict[str, Any], console: "Console") -> None:
        console.print(f"{report(record)}\n\n{machine(record)}", soft_wrap=True, markup=False)

    # There may be fewer images than asked for, which the record then says.
    sizes = {"images": None}
    carry_out("images", measured, show, json=json, compare=compare, command=command, sizes=sizes)
