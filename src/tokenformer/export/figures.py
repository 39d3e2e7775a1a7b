"""Figures for a model card, from the files that training and evaluating leave."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult

from tokenformer.errors import UserError
from tokenformer.evaluation.image_tables import image_table
from tokenformer.evaluation.tables import markdown, paper_table, perplexity_table

SUMMARY = "summary.json"

# field of summary.json -> how the card calls and writes it
_TRAINING = {
    "images": ("images", "{:,.0f}"),
    "epochs": ("epochs", "{:,.4g}"),
    "tokens": ("tokens", "{:,.0f}"),
    "steps": ("steps", "{:,.0f}"),
    "flops": ("FLOPs", "{:.3g}"),
    "learning_rate": ("peak learning rate", "{:g}"),
    "precision": ("precision", "{}"),
    "device": ("device", "{}"),
    "seconds": ("seconds", "{:,.0f}"),
    "eval_top1": ("held-out top-1 accuracy", "{:.2%}"),
    "eval_top5": ("held-out top-5 accuracy", "{:.2%}"),
    "eval_loss": ("held-out loss, nats per token or image", "{:.4f}"),
    "eval_perplexity": ("held-out perplexity", "{:.2f}"),
    "eval_bits_per_byte": ("held-out bits per byte", "{:.4f}"),
}


@dataclass(frozen=True)
class Evaluation:
    """One run of `tokenformer eval`, ready for a card.

    Attributes:
        text: Markdown.
        results: for the header that the Hub reads; empty where only a part of a task was run.
    """

    text: str
    results: list[EvalResult]


def read_training(folder: Path, parameters: int) -> list[tuple[str, str]]:
    """What `tokenformer train` says of its run, as names and figures; none where there is no such file.

    Raises:
        UserError: the file cannot be read, is not of a run, or is of a model of another size.
    """
    path = folder / SUMMARY
    if not path.is_file():
        return []
    summary = _read_object(path)
    _check_parameters(summary.get("parameters"), parameters, path)
    try:
        return [
            (label, style.format(summary[field]))
            for field, (label, style) in _TRAINING.items()
            if summary.get(field) is not None
        ]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is not a summary that `tokenformer train` wrote: remove it") from error


def read_evaluation(path: Path, model_type: str, parameters: int, name: str) -> Evaluation:
    """The figures that `tokenformer eval --out` wrote.

    Args:
        path: of the file.
        model_type: of the model that they should be of.
        parameters: of that model.
        name: of the model, for the table that has the paper's beside it.

    Raises:
        UserError: the file cannot be read, was not written by `tokenformer eval`, or is of another model.
    """
    record = _read_object(path)
    try:
        model = record["model"]
        if model["model_type"] != model_type:
            raise UserError(f"{path} is of a '{model['model_type']}' model: give evaluations of this model")
        _check_parameters(model["parameters"], parameters, path)
        readers: dict[str, Callable[[dict[str, Any]], Evaluation]]
        readers = {"perplexity": _perplexity, "tasks": partial(_tasks, name=name), "images": _images}
        return readers[record["kind"]](record)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a file that `tokenformer eval --out` wrote: give one that is") from error


def _perplexity(record: dict[str, Any]) -> Evaluation:
    results = record["results"]
    # A file is given by its path, which says more of the machine than of the text.
    sources = [{**source, "name": _file_name(source["name"])} for source in results["sources"]]
    text = perplexity_table({**results, "sources": sources})
    text += f"\nContext of {results['context']} tokens, moved on by {results['stride']}.\n"
    metrics = {"perplexity": "perplexity", "bits_per_byte": "bits per byte", "word_perplexity": "perplexity per word"}
    entries = [
        _entry(source["name"], metric, label, source[metric])
        for source in sources
        for metric, label in metrics.items()
        if source.get(metric) is not None
    ]
    return Evaluation(text, entries)


def _tasks(record: dict[str, Any], name: str) -> Evaluation:
    rows, entries = [], []
    for task, values in record["results"].items():
        shots = record["n-shot"].get(task)
        for key, value in values.items():
            metric, _, kind = key.partition(",")  # `acc,none`: the part after the comma is a filter of answers
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            spread = f"{error:.4f}" if isinstance(error, float) else "-"
            label = metric if kind == "none" else f"{metric} ({kind})"
            rows.append([task, label, f"{value:.4f}", spread, "-" if shots is None else str(shots)])
            entries.append(_entry(task, metric, label, value))
    text = markdown(["task", "figure", "value", "standard error", "shots"], rows)
    limit = record["config"]["limit"]
    if limit:
        text += f"\nOnly a part of each task (limit {limit:g}).\n"
    paper = paper_table(record, name)
    if paper:
        text += f"\nBeside the paper's rows, accuracies in per cent:\n\n{paper}"
    return Evaluation(text, [] if limit else entries)


def _images(record: dict[str, Any]) -> Evaluation:
    results, data = record["results"], record["data"]
    source = _file_name(data["source"])
    text = image_table(results, source)
    if data["limit"]:
        text += "\nOnly a part of the images.\n"
    metrics = {"top1": ("accuracy", "top-1 accuracy"), "top5": ("top_5_accuracy", "top-5 accuracy")}
    entries = [
        _entry(source, metric, label, results[key], task="image-classification")
        for key, (metric, label) in metrics.items()
        if key in results
    ]
    return Evaluation(text, [] if data["limit"] else entries)


def _entry(dataset: str, metric: str, label: str, value: float, task: str = "text-generation") -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type=dataset,
        dataset_name=dataset,
        metric_type=metric,
        metric_name=label,
        metric_value=value,
    )


def _file_name(source: str) -> str:
    path = PurePath(source)
    return path.name if path.is_absolute() or path.suffix else source


def _check_parameters(found: Any, parameters: int, path: Path) -> None:
    if found != parameters:
        raise UserError(
            f"{path} is of a model with {found} parameters, but this one has {parameters}: give the file that belongs "
            "to this model, or none"
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no file '{path}'") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({' '.join(str(error).split())})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value
