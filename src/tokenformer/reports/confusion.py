"""A confusion matrix as a picture."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenformer.errors import UserError
from tokenformer.evaluation.image_tables import FEW_CLASSES
from tokenformer.evaluation.record import check_target
from tokenformer.folders import PARTIAL, saving

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMATS = (".png", ".svg", ".pdf")
# Names of more classes than these cannot be read at the edges.
_NAMED_CLASSES = 100
_LONGEST_NAME = 24


def check_picture(path: str) -> None:
    """Say now that a picture cannot be written.

    Raises:
        UserError: `path` has no ending of a picture, is a folder, or its folder does not exist.
    """
    check_target(path, "picture", "confusion.png")
    if not path.lower().endswith(_FORMATS):
        raise UserError(f"picture: '{path}' ends in none of {', '.join(_FORMATS)}: give a name such as confusion.png")


def draw_confusion(results: dict[str, Any], title: str) -> "Figure":
    """Rows are the true classes, columns what their images were taken for, colours shares of the row.

    The colour goes with the root of the share, so that a confusion of one image in a hundred can be seen beside a
    diagonal of all the others. Up to 20 classes have their counts written in; a class without images is left white.

    Args:
        results: of `evaluate_images`.
        title: in front of the share of images that are right.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    names = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in results["classes"]]
    counts = np.array(results["confusion"])
    totals = counts.sum(1, keepdims=True)
    shares = np.where(totals > 0, counts / np.maximum(totals, 1), np.nan)
    few, named = len(names) <= FEW_CLASSES, len(names) <= _NAMED_CLASSES
    side = min(13.0, 3.6 + 0.52 * len(names)) if few else 11.0
    figure = Figure(figsize=(side + 1, side), dpi=130, layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    if few:
        for i, j in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[i, j] > 0.4 else "#222222"
            axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", fontsize=9, color=colour)
    if named:
        size = 10 if few else 6
        # A dollar sign in a name is no formula.
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(range(len(names)), names, fontsize=size, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="taken for", ylabel="true class")
    right = f"{100 * results['top1']:.2f} % of {results['images']:,} images right"
    axes.set_title(f"{title}: {right}", fontsize=11, parse_math=False)
    bar = figure.colorbar(picture, ax=axes, shrink=0.7, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1])
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    bar.outline.set_visible(False)
    bar.set_label("share of the class's images")
    return figure


def save_confusion(results: dict[str, Any], title: str, path: Path) -> None:
    """Write the picture, in the format that the ending of `path` names, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    with saving(path):
        try:
            draw_confusion(results, title).savefig(partial, format=path.suffix[1:].lower())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
