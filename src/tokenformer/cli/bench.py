"""`tokenformer bench`: the speed of the operator, and of whole models, against their peers."""

import shlex
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from tokenformer.cli.parser import Parser, add_signature
from tokenformer.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

BENCHMARKS = {
    "pattention": "one Pattention against the published order of operations, a GELU MLP and the bare products",
    "forward": "prefill of a TokenFormer against transformers' GPTNeoX of equal size",
    "decode": "generation by a TokenFormer against GPTNeoX of equal size, and against the memory's bandwidth",
    "sparse": "decoding by a sparse model against the same model with all its tokens",
    "images": "reading and cropping images by number of workers, against the training step of a classifier",
    "long-context": "training steps over sequence length: a grown TokenFormer against a wider GPTNeoX",
}

EXAMPLE = """\
  tokenformer bench pattention --quick
  tokenformer bench pattention --threads 2 --json benchmarks/results/
  tokenformer bench forward --quick
  tokenformer bench forward --threads 2 --json benchmarks/results/
  tokenformer bench decode --quick
  tokenformer bench decode --threads 2 --json benchmarks/results/
  tokenformer bench sparse --quick
  tokenformer bench images --quick
  tokenformer bench images --train cifar10/train.parquet --crop pad --model runs/cifar10
  tokenformer bench long-context --quick
  tokenformer bench long-context --threads 2 --json benchmarks/results/ --picture long-context.png
"""

HELP = f"""\
usage: tokenformer bench BENCHMARK [options]

Measure speed: all cases in one process, interleaved, results checked first.

benchmarks:
{chr(10).join(f"  {name:<12} {summary}" for name, summary in BENCHMARKS.items())}

example:
{EXAMPLE}
`tokenformer bench BENCHMARK --help` shows the options.
"""

_LABELS = {
    "reference_eager": "reference (published order), eager",
    "fused_eager": "fused, eager",
    "fused_compiled": "fused, compiled",
    "mlp_eager": "GELU MLP, eager",
    "mlp_compiled": "GELU MLP, compiled",
    "products_eager": "the two products alone",
    "tokenformer_eager": "TokenFormer, eager",
    "tokenformer_compiled": "TokenFormer, compiled",
    "gpt_neox_eager": "GPTNeoX, eager",
    "gpt_neox_compiled": "GPTNeoX, compiled",
    "dense_eager": "all tokens, eager",
    "dense_compiled": "all tokens, compiled",
    "sparse_eager": "sparse, eager",
    "sparse_compiled": "sparse, compiled",
}


def main(argv: list[str]) -> None:
    """Run one benchmark; prints the list of them if none is given."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return
    name, rest = argv[0], argv[1:]
    if name not in BENCHMARKS:
        near = get_close_matches(name, BENCHMARKS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(BENCHMARKS)}"
        raise UserError(f"unknown benchmark '{name}': {hint}")
    functions: dict[str, Callable[..., None]] = {
        "pattention": pattention,
        "forward": forward,
        "decode": decode,
        "sparse": sparse,
        "images": images,
        "long-context": long_context,
    }
    function = functions[name]
    example = "".join(f"{line}\n" for line in EXAMPLE.splitlines() if f" {name} " in line)
    parser = Parser(f"bench {name}", f"Measure {BENCHMARKS[name]}.", example)
    add_signature(parser, function, skip=("command",))
    function(**vars(parser.parse_args(rest)), command=shlex.join(["tokenformer", "bench", *argv]))


def pattention(
    *,
    tokens: int = 2048,
    hidden_size: int = 768,
    parameter_tokens: int = 3072,
    dtypes: str = "float32,bfloat16",
    threads: int | None = None,
    repeats: int = 20,
    quick: bool = False,
    json: str | None = None,
    command: str | None = None,
) -> None:
    """Measure one Pattention and print the figures.

    Args:
        tokens: inputs (rows) given at once.
        hidden_size: channels of inputs and outputs.
        parameter_tokens: parameter tokens, and hidden channels of the MLP.
        dtypes: of inputs and weights, separated by commas.
        threads: of torch; one per physical core if not given.
        repeats: rounds; every case runs once in each.
        quick: at most 256 inputs, 256 channels, 1024 parameter tokens and 3 rounds, to see that it runs.
        json: file for the record, a folder to give it its usual name there, or - for standard output.
        command: written into the record.
    """
    from tokenformer.benchmarks.pattention import Shape, measure

    if quick:
        tokens, hidden_size, parameter_tokens = min(tokens, 256), min(hidden_size, 256), min(parameter_tokens, 1024)
        repeats = min(repeats, 3)
    shape = Shape(tokens, hidden_size, parameter_tokens)
    run = partial(measure, shape, dtypes=_names(dtypes), threads=threads, repeats=repeats)
    _run(run, json, command, _print)


def forward(
    *,
    batch: int = 1,
    length: int = 512,
    dtypes: str = "float32,bfloat16",
    threads: int | None = None,
    repeats: int = 10,
    quick: bool = False,
    json: str | None = None,
    command: str | None = None,
) -> None:
    """Measure the forward pass over a prompt and print the figures.

    Args:
        batch: prompts read at once.
        length: tokens of each prompt.
        dtypes: of the weights, separated by commas.
        threads: of torch; one per physical core if not given.
        repeats: rounds; every case runs once in each.
        quick: a small model, at most 64 tokens and 3 rounds, to see that it runs.
        json: file for the record, a folder to give it its usual name there, or - for standard output.
        command: written into the record.
    """
    from tokenformer.benchmarks.forward import measure
    from tokenformer.benchmarks.models import small_config

    config = small_config() if quick else None
    if quick:
        length, repeats = min(length, 64), min(repeats, 3)
    run = partial(measure, config, batch=batch, length=length, dtypes=_names(dtypes), threads=threads, repeats=repeats)
    _run(run, json, command, _print_models)


def decode(
    *,
    prompt: int = 128,
    tokens: int = 64,
    dtypes: str = "float32,bfloat16",
    threads: int | None = None,
    repeats: int = 5,
    quick: bool = False,
    json: str | None = None,
    command: str | None = None,
) -> None:
    """Measure generation and print the figures.

    Args:
        prompt: tokens of the prompt.
        tokens: tokens to generate, one at a time.
        dtypes: of weights and cache, separated by commas.
        threads: of torch; one per physical core if not given.
        repeats: rounds; every case runs once in each.
        quick: a small model, at most 16 tokens each and 3 rounds, to see that it runs.
        json: file for the record, a folder to give it its usual name there, or - for standard output.
        command: written into the record.
    """
    from tokenformer.benchmarks.decode import measure
    from tokenformer.benchmarks.models import small_config

    config = small_config() if quick else None
    if quick:
        prompt, tokens, repeats = min(prompt, 16), min(tokens, 16), min(repeats, 3)
    run = partial(
        measure, config, prompt=prompt, tokens=tokens, dtypes=_names(dtypes), threads=threads, repeats=repeats
    )
    _run(run, json, command, _print_models)


def sparse(
    *,
    preset: str = "1.5B",
    keep: float = 0.25,
    tokens: int = 16,
    dtypes: str = "bfloat16",
    threads: int | None = None,
    repeats: int = 5,
    quick: bool = False,
    json: str | None = None,
    command: str | None = None,
) -> None:
    """Measure generation by a sparse model and print the figures.

    Args:
        preset: size of the paper (150M, 450M, 900M, 1.5B); the target is for 1.5B.
        keep: share of the tokens of sparse layers that an input computes.
        tokens: tokens to generate, one at a time.
        dtypes: of weights and cache, separated by commas; float32 takes twice the memory.
        threads: of torch; one per physical core if not given.
        repeats: rounds; every case runs once in each.
        quick: a small model, at most 8 tokens and 3 rounds, to see that it runs.
        json: file for the record, a folder to give it its usual name there, or - for standard output.
        command: written into the record.
    """
    from tokenformer.benchmarks.models import small_config
    from tokenformer.benchmarks.sparse import measure
    from tokenformer.models import TokenFormerConfig

    config = small_config() if quick else None if preset == "1.5B" else TokenFormerConfig.preset(preset)
    if quick:
        tokens, repeats = min(tokens, 8), min(repeats, 3)
    run = partial(measure, config, keep=keep, tokens=tokens, dtypes=_names(dtypes), threads=threads, repeats=repeats)
    _run(run, json, command, _print_models)


def images(
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
        command: written into the record.
    """
    from tokenformer.benchmarks.images import measure, report

    if not all(word.strip().isdecimal() for word in workers.split(",")):
        raise UserError(f"--workers must be whole numbers separated by commas, got '{workers}'")
    counts = tuple(int(word) for word in workers.split(","))
    if quick:
        counts, images, batch, passes, repeats = (0, 1), min(images, 256), min(batch, 64), 2, min(repeats, 3)
    run = partial(
        measure,
        train,
        image_column=image_column,
        label_column=label_column,
        crop=crop,
        image_size=image_size,
        workers=counts,
        images=images,
        batch=batch,
        passes=passes,
        model=model,
        preset=preset,
        threads=threads,
        repeats=repeats,
    )

    def show(record: dict[str, Any], console: "Console") -> None:
        console.print(f"{report(record)}\n\n{_machine(record)}", soft_wrap=True, markup=False)

    _run(run, json, command, show)


def long_context(
    *,
    lengths: str = "128,512,1024,2048,4096",
    tokens: int = 4096,
    dtypes: str = "float32,bfloat16",
    threads: int | None = None,
    repeats: int = 3,
    quick: bool = False,
    json: str | None = None,
    picture: str | None = None,
    command: str | None = None,
) -> None:
    """Measure training steps over sequence length and print the figures as Markdown.

    Args:
        lengths: of the sequences, separated by commas; each must divide tokens.
        tokens: of a step, at every length.
        dtypes: of the products, separated by commas; weights are float32, and bfloat16 is autocast.
        threads: of torch; one per physical core if not given.
        repeats: rounds; every model takes a step once in each.
        quick: small models, 256 tokens in sequences of 64 and 256, at most 3 rounds, to see that it runs.
        json: file for the record, a folder to give it its usual name there, or - for standard output.
        picture: PNG file for FLOPs and times over length.
        command: written into the record.
    """
    from pathlib import Path

    from tokenformer.benchmarks.long_context import measure, small_config
    from tokenformer.benchmarks.report import check_target
    from tokenformer.reports.long_context import draw, tables

    if picture is not None:
        if not picture.endswith(".png"):
            raise UserError(f"--picture {picture}: name a file that ends in .png")
        check_target(picture, "--picture")
    if not all(word.strip().isdecimal() for word in lengths.split(",")):
        raise UserError(f"--lengths must be whole numbers separated by commas, got '{lengths}'")
    config, sizes = None, tuple(int(word) for word in lengths.split(","))
    if quick:
        config, sizes, tokens, repeats = small_config(), (64, 256), 256, min(repeats, 3)

    def show(record: dict[str, Any], console: "Console") -> None:
        console.print(f"long-context: {tokens} tokens a step; {_machine(record)}\n", soft_wrap=True, markup=False)
        console.print(tables(record), soft_wrap=True, markup=False)

    def measured(progress: Callable[[str], None]) -> dict[str, Any]:
        return measure(
            config,
            lengths=sizes,
            tokens=tokens,
            dtypes=_names(dtypes),
            threads=threads,
            repeats=repeats,
            progress=progress,
        )

    record = _run(measured, json, command, show)
    if picture is not None:
        draw(record, Path(picture))


def _names(dtypes: str) -> tuple[str, ...]:
    return tuple(dtypes.replace(" ", "").split(","))


def _run(
    measure: Callable[..., dict[str, Any]], json: str | None, command: str | None, show: Callable[..., None]
) -> dict[str, Any]:
    """Measure, write the record where asked, and show it, unless the record itself goes to standard output."""
    from rich.console import Console

    from tokenformer.benchmarks import report

    if json is not None:
        report.check_target(json)
    with Console(stderr=True).status("starting") as status:
        record = measure(progress=status.update)
    record["command"] = command
    path = report.write(record, json) if json is not None else None
    if json != "-":
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 120  # a file has no width: do not fold the tables
        show(record, console)
    if path is not None:
        print(f"record: {path}")
    return record


def _print(record: dict[str, Any], console: "Console") -> None:
    options = record["options"]
    console.print(
        f"Pattention, {options['tokens']} inputs of {options['hidden_size']} channels, {options['parameter_tokens']} "
        f"parameter tokens; {_machine(record)}"
    )
    for dtype in options["dtypes"]:
        console.print(_table(record, dtype))
        _print_failures(record, dtype, console)
    _print_ratios(record, console)
    console.print("Ratios: forward + backward, median over rounds.")


def _print_models(record: dict[str, Any], console: "Console") -> None:
    options = record["options"]
    sizes = ", ".join(f"{name} {options[name]}" for name in ("batch", "length", "prompt", "tokens") if name in options)
    console.print(f"{record['benchmark']}: {sizes}; {_machine(record)}")
    for model in record["models"].values():
        console.print(
            f"{model['class']}: {model['layers']} layers of {model['hidden_size']} channels, "
            f"{model['parameters_without_embeddings'] / 1e6:.1f} M parameters without embeddings"
        )
    for dtype in options["dtypes"]:
        console.print(_models_table(record, dtype))
        _print_failures(record, dtype, console)
        if "memory" in record:
            speeds = record["memory"][dtype]["bytes_per_second"]
            console.print(
                f"memory: copy {speeds['copy'] / 1e9:.1f} GB/s (read + write), read {speeds['read'] / 1e9:.1f}"
            )
    _print_ratios(record, console)
    console.print("Ratios of times, median over rounds.")


def _print_failures(record: dict[str, Any], dtype: str, console: "Console") -> None:
    for case, reason in record["checks"][dtype]["failed_to_compile"].items():
        console.print(f"{_LABELS[case]}: does not compile here ({reason})", markup=False)


def _print_ratios(record: dict[str, Any], console: "Console") -> None:
    for ratio in record["ratios"]:
        sign, limit = ("<=", ratio["at_most"]) if ratio["at_most"] is not None else (">=", ratio["at_least"])
        mark = (
            "" if ratio["met"] is None else f"  target {sign} {limit}: {'met' if ratio['met'] else '[bold]MISSED[/]'}"
        )
        names = f"{_LABELS[ratio['numerator']]} / {_LABELS[ratio['denominator']]}"
        console.print(f"{ratio['dtype']:<9} {names:<62} {ratio['value']:6.3f}{mark}")


def _machine(record: dict[str, Any]) -> str:
    hardware = record["hardware"]
    return (
        f"{record['threads']} threads on {hardware['cpu']} ({' '.join(hardware['flags'])}), "
        f"torch {record['versions']['torch']}"
    )


def _models_table(record: dict[str, Any], dtype: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=f"{dtype}, tokens per second", box=box.SIMPLE, title_justify="left")
    table.add_column("case")
    passes = record["tokens_per_second"][dtype]
    for name in passes:
        table.add_column(name, justify="right", style="bold")
        table.add_column("quartiles", justify="right")
    memory = record.get("memory", {}).get(dtype)
    if memory:
        table.add_column("of copy", justify="right")
        table.add_column("of read", justify="right")
    for case in next(iter(passes.values())):
        cells = []
        for name, cases in passes.items():
            seconds = record["seconds"][dtype][name][case]
            tokens = cases[case] * seconds["median"]
            low, high = tokens / seconds["third_quartile"], tokens / seconds["first_quartile"]
            cells += [f"{cases[case]:.1f}", f"{low:.1f}-{high:.1f}"]
        if memory:
            cells += [f"{100 * memory['fraction'][case][name]:.0f} %" for name in ("copy", "read")]
        table.add_row(_LABELS[case], *cells)
    return table


def _table(record: dict[str, Any], dtype: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=f"{dtype}, milliseconds", box=box.SIMPLE, title_justify="left")
    table.add_column("case")
    for direction in ("forward", "forward + backward"):
        table.add_column(direction, justify="right", style="bold")
        table.add_column("min", justify="right")
        table.add_column("quartiles", justify="right")
    seconds = record["seconds"][dtype]
    for case in seconds["forward"]:
        cells = []
        for direction in seconds.values():
            figures = direction[case]
            low, high = figures["first_quartile"], figures["third_quartile"]
            cells += [
                f"{1e3 * figures['median']:.2f}",
                f"{1e3 * figures['min']:.2f}",
                f"{1e3 * low:.2f}-{1e3 * high:.2f}",
            ]
        table.add_row(_LABELS[case], *cells)
    return table
