"""`tokenformer eval`: perplexity on text, and the tasks of lm-eval."""

import shlex
import sys
from typing import Any, Literal

from tokenformer.cli.parser import Parser, add_signature
from tokenformer.errors import UserError, require_extra

EXAMPLE = """\
  tokenformer eval runs/small --perplexity book.txt --stride 256
  tokenformer eval runs/small --tasks paper --out eval.json
  tokenformer eval runs/small --tasks arc_easy,piqa --limit 100 --num-fewshot 5
"""

# What would be passed over without a word in the other mode.
_ONLY = {
    "tasks": ("num_fewshot", "limit", "include_path"),
    "perplexity": ("stride", "word_level", "text_field", "split"),
}


def main(argv: list[str]) -> None:
    """Run `tokenformer eval`."""
    summary = "Judge a model: perplexity and bits per byte on text, or the tasks of lm-eval beside the paper's figures."
    parser = Parser("eval", summary, EXAMPLE)
    add_signature(parser, evaluate, skip=("command",))
    options = vars(parser.parse_args(argv))
    given = [mode for mode in _ONLY if options[mode] is not None]
    if len(given) != 1:
        which = "both --tasks and --perplexity were given" if given else "there is nothing to evaluate"
        raise UserError(f"{which}: give either --tasks NAMES or --perplexity FILES")
    (other,) = set(_ONLY) - set(given)
    for name in _ONLY[other]:
        if options[name] != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} belongs to --{other}, not to --{given[0]}")
    evaluate(**options, command=shlex.join(["tokenformer", "eval", *argv]))


def evaluate(
    model: str,
    *,
    tasks: list[str] | None = None,
    perplexity: list[str] | None = None,
    context: int | None = None,
    stride: int | None = None,
    word_level: bool = False,
    text_field: str = "text",
    split: str = "test",
    num_fewshot: int | None = None,
    limit: float | None = None,
    include_path: str | None = None,
    batch_size: Literal["auto"] | int = "auto",
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    out: str | None = None,
    command: str | None = None,
) -> None:
    """Evaluate a model and print Markdown tables.

    Args:
        model: folder with model and tokenizer, or a name on the Hub; any causal language model of transformers.
        tasks: tasks of lm-eval, separated by commas; paper for the six of the paper.
        perplexity: files (.txt, .jsonl, .parquet, ...), datasets on the Hub, folders of `tokenformer data prepare`, or
            .idx files of Megatron and GPT-NeoX.
        context: tokens the model reads at once; if not given, as many as it takes, for perplexity at most 2048.
        stride: tokens by which the window moves on, for perplexity; half of the context if not given.
        word_level: also the perplexity per word.
        text_field: the field (JSON) or column (Parquet, Hub) that holds the text.
        split: of datasets on the Hub.
        num_fewshot: solved examples before each question; as the task says if not given.
        limit: only so many documents of each task, or such a fraction, to see that it runs.
        include_path: folder with further tasks as YAML files; they need no network if their data is local.
        batch_size: sequences at a time; auto chooses by memory.
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
    tokenizer = load_any_tokenizer(model)
    results: dict[str, Any]
    # The model comes last: what is wrong with the rest is known sooner.
    if tasks is not None:
        check_options(num_fewshot, limit, rows)
        names = [name for word in tasks for name in word.split(",") if name]
        selection = select_tasks(names, include_path=include_path)
        loaded = load_any_model(model, dtype=dtype, device=place)
        record = new_record("tasks", loaded, model, command=command, threads=num_threads)
        results = run_tasks(
            loaded, tokenizer, selection, num_fewshot=num_fewshot, limit=limit, batch_size=rows, context=context
        )
        record |= results
        shown = [tables.task_table(results), tables.paper_table(results, record["model"]["name"])]
    else:
        sources = read_sources(perplexity or [], tokenizer, text_field=text_field, split=split, progress=True)
        loaded = load_any_model(model, dtype=dtype, device=place)
        record = new_record("perplexity", loaded, model, command=command, threads=num_threads)
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
    sys.stdout.write("\n".join(text for text in shown if text))
    if out is not None:
        write_record(record, out)
        sys.stdout.write(f"\nrecord: {out}\n")
