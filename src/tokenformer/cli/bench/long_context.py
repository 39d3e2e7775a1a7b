"""`tokenformer bench long-context`."""

from functools import partial
from typing import TYPE_CHECKING, Any

from tokenformer.cli.bench.running import carry_out, counts, names
from tokenformer.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


def run(
    *,
    lengths: str = "128,512,1024,2048,4096",
    tokens: int = 4096,
    dtypes: str = "float32,bfloat16",
    threads: int | None = None,
    repeats: int = 3,
    quick: bool = False,
    json: str | None = None,
    compare: str | None = None,
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
        compare: record of an earlier run; what became slower or faster since is shown.
        picture: PNG file for FLOPs and times over length.
        command: written into the record.
    """
    from pathlib import Path

    from tokenformer.benchmarks.long_context import measure, small_config
    from tokenformer.benchmarks.report import check_target
    from tokenformer.benchmarks.showing import machine
    from tokenformer.reports.long_context import draw, tables

    if picture is not None:
        if not picture.endswith(".png"):
            raise UserError(f"--picture {picture}: name a file that ends in .png")
        check_target(picture, "--picture")
    config, sizes = None, counts("lengths", lengths)
    if quick:
        config, sizes, tokens, repeats = small_config(), (64, 256), 256, min(repeats, 3)

    def show(record: dict[str, Any], console: "Console") -> None:
        console.print(f"long-context: {tokens} tokens a step; {machine(record)}\n", soft_wrap=True, markup=False)
        console.print(tables(record), soft_wrap=True, markup=False)

    measured = partial(
        measure, config, lengths=sizes, tokens=tokens, dtypes=names(dtypes), threads=threads, repeats=repeats
    )
    record = carry_out("long-context", measured, show, json=json, compare=compare, command=command)
    if picture is not None:
        draw(record, Path(picture))
