"""`tokenformer eval`: perplexity on text, the tasks of lm-eval, and the accuracy of image classifiers."""

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tokenformer.cli.parser import Parser, add_signature
from tokenformer.errors import UserError, require_extra

EXAMPLE = """\
  tokenformer eval runs/small --perplexity book.txt --stride 256
  tokenformer eval runs/small --tasks paper --out eval.json
  tokenformer eval runs/small --tasks arc_easy,piqa --limit 100 --num-fewshot 5
  tokenformer eval runs/digits --images digits --out eval.json --picture confusion.png
  tokenformer eval runs/cifar10 --images cat.png dog.png
  tokenformer eval runs/small --adapter runs/small-law --perplexity law.txt
"""

_MODES = {"tasks": "NAMES", "perplexity": "FILES", "images": "SOURCE"}
# What would be passed over without a word in the other modes.
_ONLY = {
    "context": ("tasks", "perplexity"),
    "stride": ("perplexity",),
    "word_level": ("perplexity",),
    "text_field": ("perplexity",),
    "split": ("perplexity", "images"),
    "num_fewshot": ("tasks",),
    "limit": ("tasks", "images"),
    "include_path": ("tasks",),
    "picture": ("images",),
    "image_column": ("images",),
    "label_column": ("images",),
    "bad_images": ("images",),
    "workers": ("images",),
}

_IMAGES_AT_A_TIME = 64


def main(argv: list[str]) -> None:
    """Run `tokenformer eval`."""
    summary = (
        "Judge a model: perplexity and bits per byte on text, the tasks of lm-eval beside the paper's figures, or "
        "accuracy and confusions on images."
    )
    parser = Parser("eval", summary, EXAMPLE)
    add_signature(parser, evaluate, skip=("command",))
    options = vars(parser.parse_args(argv))
    given = [mode for mode in _MODES if options[mode] is not None]
    if len(given) != 1:
        which = f"{_flags(given, 'and')} were given" if given else "there is nothing to evaluate"
        raise UserError(f"{which}: give one of {', '.join(f'--{mode} {what}' for mode, what in _MODES.items())}")
    for name, modes in _ONLY.items():
        if given[0] not in modes and options[name] != parser.get_default(name):
            raise UserError(f"{_flags([name])} belongs to {_flags(modes, 'and')}, not to --{given[0]}")
    evaluate(**options, command=shlex.join(["tokenformer", "eval", *argv]))


def _flags(names: list[str] | tuple[str, ...], between: str = "") -> str:
    return f" {between} ".join(f"--{name.replace('_', '-')}" for name in names)


def evaluate(
    model: str,
    *,
    tasks: list[str] | None = None,
    perplexity: list[str] | None = None,
    images: list[str] | None = None,
    adapter: list[str] | None = None,
    context: int | None = None,
    stride: int | None = None,
    word_level: bool = False,
    text_field: str = "text",
    split: str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    include_path: str | None = None,
    picture: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    bad_images: Literal["error", "skip"] = "error",
    workers: int = 0,
    batch_size: Literal["auto"] | int = "auto",
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    out: str | None = None,
    command: str | None = None,
) -> None:
    """Evaluate a model and print Markdown tables.

    Args:
        model: folder with model and tokenizer or image processor, or a name on the Hub; any causal language model or
            image classifier of transformers.
        tasks: tasks of lm-eval, separated by commas; paper for the six of the paper.
        perplexity: files (.txt, .jsonl, .parquet, ...), datasets on the Hub, folders of `tokenformer data prepare`, or
            .idx files of Megatron and GPT-NeoX.
        images: digits (of scikit-learn), a folder with a folder for each class, a Parquet file or a dataset on the Hub;
            or image files without labels, or a folder of such, to see what the model takes them for.
        adapter: folders of `tokenformer tune` for this model, active together; FOLDER=WEIGHT for another weight than 1.
        context: tokens the model reads at once; if not given, as many as it takes, for perplexity at most 2048.
        stride: tokens by which the window moves on, for perplexity; half of the context if not given.
        word_level: also the perplexity per word.
        text_field: the field (JSON) or column (Parquet, Hub) that holds the text.
        split: of datasets on the Hub, test if not given; of images that have parts, what they hold out if not given, or
            train for the others.
        num_fewshot: solved examples before each question; as the task says if not given.
        limit: only so many documents of each task, or so many images, or such a fraction, to see that it runs.
        include_path: folder with further tasks as YAML files; they need no network if their data is local.
        picture: file for the confusion matrix as a picture (.png, .svg or .pdf).
        image_column: of Parquet files and of the Hub; found if not given.
        label_column: likewise.
        bad_images: an image that cannot be read ends the evaluation with an error, or is left out and counted.
        workers: processes that read images; 0 does it between the batches.
        batch_size: sequences or images at a time; auto chooses by memory, for images 64.
        dtype: of the weights (float32, bfloat16, float16); as saved if not given.
        device: such as cpu or cuda:1; the accelerator if there is one and it is not given.
        threads: of torch; one per physical core if not given.
        out: file for the figures as JSON, with all that is needed to repeat them.
        command: written into that file.
    """
    if tasks is not None:
        require_extra("eval", "lm_eval")  # before anything is loaded
    from tokenformer.evaluation import evaluate_sources, load_any_model, load_any_tokenizer, read_sources, tables
    from tokenformer.evaluation.record import check_target, new_record, write_record
    from tokenformer.evaluation.tasks import check_options, run_tasks, select_tasks
    from tokenformer.hardware import pick_device, set_threads

    num_threads = set_threads(threads)
    if out is not None:
        check_target(out)
    rows = None if batch_size == "auto" else batch_size
    place = pick_device() if device is None else device
    results: dict[str, Any]
    shown: Sequence[str | None]
    # The model comes last: what is wrong with the rest is known sooner.
    if tasks is not None:
        tokenizer = load_any_tokenizer(model)
        check_options(num_fewshot, limit, rows)
        names = [name for word in tasks for name in word.split(",") if name]
        selection = select_tasks(names, include_path=include_path)
        loaded = load_any_model(model, dtype=dtype, device=place)
        record = new_record("tasks", loaded, model, command=command, threads=num_threads)
        _tune(loaded, adapter, record)
        results = run_tasks(
            loaded, tokenizer, selection, num_fewshot=num_fewshot, limit=limit, batch_size=rows, context=context
        )
        record |= results
        shown = [tables.task_table(results), tables.paper_table(results, record["model"]["name"])]
    elif perplexity is not None:
        tokenizer = load_any_tokenizer(model)
        sources = read_sources(perplexity, tokenizer, text_field=text_field, split=split or "test", progress=True)
        loaded = load_any_model(model, dtype=dtype, device=place)
        record = new_record("perplexity", loaded, model, command=command, threads=num_threads)
        _tune(loaded, adapter, record)
        results = evaluate_sources(
            loaded,
            tokenizer,
            sources,
            context=context,
            stride=stride,
            batch_size=rows,
            word_level=word_level,
            progress=True,
        )
        record["results"] = results
        shown = [tables.perplexity_table(results), f"context {results['context']}, stride {results['stride']}\n"]
    else:
        record, shown = _evaluate_images(
            model,
            images or [],
            adapter=adapter,
            split=split,
            image_column=image_column,
            label_column=label_column,
            limit=limit,
            picture=picture,
            bad_images=bad_images,
            workers=workers,
            batch_size=_IMAGES_AT_A_TIME if rows is None else rows,
            load={"dtype": dtype, "device": place},
            run={"command": command, "threads": num_threads},
        )
    sys.stdout.write("\n".join(text for text in shown if text))
    if out is not None:
        write_record(record, out)
        sys.stdout.write(f"\nrecord: {out}\n")


def _tune(model: Any, adapters: list[str] | None, record: dict[str, Any]) -> None:
    """Put adapters into a model, and their weights into the record."""
    if adapters is not None:
        from tokenformer.tuning.files import load_adapters

        record["model"]["adapters"] = load_adapters(model, adapters)


def _evaluate_images(
    model: str,
    sources: list[str],
    *,
    adapter: list[str] | None,
    split: str | None,
    image_column: str | None,
    label_column: str | None,
    limit: float | None,
    picture: str | None,
    bad_images: Literal["error", "skip"],
    workers: int,
    batch_size: int,
    load: dict[str, Any],
    run: dict[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """The record, and what is shown."""
    from tokenformer.evaluation import image_tables
    from tokenformer.evaluation.images import evaluate_images, part_of, predict_images, unlabelled_files
    from tokenformer.evaluation.loading import load_any_classifier
    from tokenformer.evaluation.record import new_record
    from tokenformer.images import load_processor, open_image_set
    from tokenformer.models.loading import model_folder
    from tokenformer.reports.confusion import check_picture, save_confusion

    if picture is not None:
        check_picture(picture)
    processor = load_processor(model_folder(model))
    how: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "progress": True}
    columns = {"image_column": image_column, "label_column": label_column}
    if (files := unlabelled_files(sources)) is not None:
        needless = {"split": split, "limit": limit, "picture": picture, **columns}
        if given := [name for name, value in needless.items() if value is not None]:
            raise UserError(f"{_flags(given[:1])} needs images with labels, and these are files without")
        loaded = load_any_classifier(model, **load)
        record = new_record("predictions", loaded, model, **run)
        _tune(loaded, adapter, record)
        found = record["results"] = predict_images(loaded, files, processor, on_bad_image=bad_images, **how)
        missing = (
            f"{len(files) - len(found)} of {len(files)} images could not be read\n" if len(found) < len(files) else ""
        )
        return record, [image_tables.prediction_table(found), missing]
    (source,) = sources
    images, fingerprint = open_image_set(source, split=split, on_bad_image=bad_images, **columns)
    count = part_of(len(images), limit)
    loaded = load_any_classifier(model, **load)
    record = new_record("images", loaded, model, **run)
    _tune(loaded, adapter, record)
    record["data"] = {"source": source, "split": split, "fingerprint": fingerprint, "limit": count}
    results = record["results"] = evaluate_images(loaded, images, processor, limit=count, **how)
    if not math.isfinite(results["loss"]):
        raise UserError(
            f"the model's loss is not finite in {record['model']['dtype']}: its weights are damaged, or their dtype is "
            "too narrow (try float32)"
        )
    shown = [
        image_tables.image_table(results, source),
        image_tables.worst_classes(results),
        image_tables.confusion_table(results),
    ]
    if picture is not None:
        save_confusion(results, f"{record['model']['name']} on {Path(source).name}", Path(picture))
        shown.append(f"picture: {picture}\n")
    return record, shown
