"""Results as Markdown, beside those of the paper."""

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

_NONE = "-"


@cache
def paper() -> dict[str, Any]:
    """Rows of the paper and, for each of their columns, the lm-eval task and metric that it is.

    The authors evaluate with lm-eval on "the standard zero-shot benchmark described by Mamba", which is accuracy, but
    for HellaSwag and ARC-challenge accuracy normalised by the length of the answer (Mamba, appendix E.2.3): lm-eval's
    `acc` and `acc_norm`.
    """
    table: dict[str, Any] = json.loads((files(__package__) / "paper.json").read_text(encoding="utf-8"))
    return table


def paper_tasks() -> list[str]:
    """The six tasks of the paper, by their names in lm-eval."""
    return list(dict.fromkeys(column["task"] for column in paper()["columns"]))


def perplexity_table(results: dict[str, Any]) -> str:
    """Figures of `evaluate_sources`: a row for each source, and one for all of them if there are several."""
    rows = list(results["sources"])
    if len(rows) > 1:
        rows.append({**results, "name": "all"})
    heads = {"documents": "documents", "tokens": "tokens", "bytes": "bytes", "words": "words"}
    figures = {"loss": "nats/token", "perplexity": "perplexity", "bits_per_byte": "bits/byte"}
    if "word_perplexity" in results:
        figures["word_perplexity"] = "perplexity/word"
    return markdown(
        ["text", *heads.values(), *figures.values()],
        [
            [
                row["name"],
                *(_NONE if row[name] is None else f"{row[name]:,}" for name in heads),
                *(_NONE if row[name] is None else _digits(row[name]) for name in figures),
            ]
            for row in rows
        ],
    )


def task_table(results: dict[str, Any]) -> str:
    """All metrics of `run_tasks`, with the arrows of lm-eval: whether higher or lower is better."""
    rows = []
    for task, metrics in results["results"].items():
        better = results["higher_is_better"].get(task, {})
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            arrow = {True: " ↑", False: " ↓"}.get(better.get(metric), "")
            shown = metric + arrow + ("" if filtered == "none" else f" ({filtered})")
            error = metrics.get(f"{metric}_stderr,{filtered}")
            numbers = [_digits(number) if isinstance(number, float) else _NONE for number in (value, error)]
            rows.append([task, shown, *numbers, str(results["n-shot"].get(task, _NONE))])
    return markdown(["task", "metric", "value", "standard error", "examples"], rows, left=2)


def paper_table(results: dict[str, Any], name: str) -> str | None:
    """The model beside the rows of the paper, accuracies in per cent; None if no task of the paper was run.

    The average is over the six accuracies, and left out unless all of them are there.

    Args:
        results: of `run_tasks`.
        name: of the model.
    """
    columns = paper()["columns"]
    found = [results["results"].get(column["task"], {}).get(f"{column['metric']},none") for column in columns]
    if all(value is None for value in found):
        return None
    accuracies = [
        100 * value
        for column, value in zip(columns, found, strict=True)
        if column["metric"] != "perplexity" and value is not None
    ]
    complete = len(accuracies) == len(paper_tasks())
    own = [
        _NONE if value is None else f"{value:.4g}" if column["metric"] == "perplexity" else f"{100 * value:.1f}"
        for column, value in zip(columns, found, strict=True)
    ]
    rows = [[name, *own, f"{sum(accuracies) / len(accuracies):.1f}" if complete else _NONE]]
    for row in paper()["rows"]:
        values = [str(value) for value in row["values"] or []] or [_NONE] * len(columns)
        rows.append([row["model"], *values, str(row["average"])])
    table = markdown(["model", *(column["label"] for column in columns), "average"], rows)
    notes = "HellaSwag and Arc-C: accuracy normalised by length (acc_norm); the others: acc. Paper: zero-shot.\n"
    shots = {results["n-shot"].get(task, 0) for task in paper_tasks() if task in results["results"]}
    if shots != {0}:
        notes += f"This model: {', '.join(map(str, sorted(shots)))} examples before each question.\n"
    if results["config"]["limit"]:
        notes += f"This model: only a part of each task (limit {results['config']['limit']:g}), so not comparable.\n"
    return f"{table}\n{notes}"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table that can be read as it is: the first `left` columns to the left, the others to the right."""
    headings, rows = list(headings), [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in [headings, *rows])) for i in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(width) for cell, width in zip(cells[:left], widths, strict=False)]
        return " | ".join(padded + [cell.rjust(width) for cell, width in zip(cells[left:], widths[left:], strict=True)])

    rule = ["-" * width for width in widths[:left]] + ["-" * (width - 1) + ":" for width in widths[left:]]
    return "".join(f"| {line(cells)} |\n" for cells in [headings, rule, *rows])


def _digits(value: float) -> str:
    return f"{value:.4g}" if value >= 1e6 else f"{value:,.1f}" if value >= 1e3 else f"{value:.4f}"
