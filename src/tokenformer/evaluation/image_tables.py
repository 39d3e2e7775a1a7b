"""Figures of image classifiers as Markdown."""

import math
from typing import Any

from tokenformer.evaluation.tables import markdown

# The columns of so many classes can still be read side by side.
FEW_CLASSES = 20
_NONE = "-"


def image_table(results: dict[str, Any], name: str) -> str:
    """The figures of `evaluate_images` in one row, accuracies in per cent with the standard error of the top-1.

    Args:
        results: of `evaluate_images`.
        name: of the images.
    """
    top1, count = results["top1"], results["images"]
    cells = {
        "source": name,
        "images": f"{count:,}",
        "top-1 %": f"{100 * top1:.2f} ± {100 * math.sqrt(top1 * (1 - top1) / count):.2f}",
    }
    if 1 < results["top"] < len(results["classes"]):  # of two classes one is always among the best two
        cells[f"top-{results['top']} %"] = f"{100 * results[_top_key(results)]:.2f}"
    cells |= {"nats/image": f"{results['loss']:.4f}", "images/s": f"{results['images_per_second']:,.0f}"}
    if results["unreadable"]:
        cells["unreadable"] = f"{results['unreadable']:,}"
    return markdown(list(cells), [list(cells.values())])


def worst_classes(results: dict[str, Any], count: int = 10) -> str:
    """The classes with the least recall, at most `count` of them, with what their images were most often taken for."""
    names, rows = results["classes"], []
    classes = sorted(
        ((entry["recall"], i) for i, entry in enumerate(results["per_class"]) if entry["recall"] is not None),
    )
    for _, i in classes[:count]:
        entry = results["per_class"][i]
        mistakes = [(number, j) for j, number in enumerate(results["confusion"][i]) if number and j != i]
        number, taken_for = max(mistakes, key=lambda mistake: mistake[0], default=(0, i))
        rows.append(
            [
                entry["name"],
                f"{entry['images']:,}",
                _percent(entry["recall"]),
                _percent(entry["precision"]),
                f"{names[taken_for]} ({number:,})" if number else _NONE,
            ]
        )
    return markdown(["class, worst first", "images", "recall %", "precision %", "most often taken for"], rows)


def confusion_table(results: dict[str, Any], count: int = 20) -> str:
    """The confusion matrix for up to 20 classes, and for more the `count` most frequent confusions."""
    names, confusion = results["classes"], results["confusion"]
    if len(names) <= FEW_CLASSES:
        rows = [
            [name, *(f"{number:,}" if number else "." for number in row)]
            for name, row in zip(names, confusion, strict=True)
        ]
        return markdown(["true \\ taken for", *names], rows)
    mistakes = sorted(
        (-number, i, j) for i, row in enumerate(confusion) for j, number in enumerate(row) if number and i != j
    )
    rows = [
        [names[i], names[j], f"{-number:,}", _percent(-number / sum(confusion[i]))] for number, i, j in mistakes[:count]
    ]
    return markdown(["true", "taken for", "images", "% of the class"], rows, left=2)


def prediction_table(predictions: list[dict[str, Any]]) -> str:
    """The classes of `predict_images` with their probabilities in per cent, best first."""
    columns = max(len(entry["classes"]) for entry in predictions)
    heads = ["image", "best", *(f"{i}." for i in range(2, columns + 1))]
    rows = [
        [entry["image"], *(f"{guess['name']} {_percent(guess['probability'])}" for guess in entry["classes"])]
        for entry in predictions
    ]
    return markdown(heads, rows, left=len(heads))


def _top_key(results: dict[str, Any]) -> str:
    """The name of the top-k accuracy, after the k that was asked for."""
    return next(key for key in results if key.startswith("top") and key not in ("top1", "top"))


def _percent(share: float | None) -> str:
    return _NONE if share is None else f"{100 * share:.1f}"
