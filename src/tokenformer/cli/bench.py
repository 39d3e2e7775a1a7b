"""`tokenformer bench`: the speed of the operator against its peers."""

import shlex
import sys
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from tokenformer.cli.parser import Parser, add_signature
from tokenformer.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

BENCHMARKS = {
    "pattention": "one Pattention against the published order of operations, a GELU MLP and the bare products"
}

EXAMPLE = """\
  tokenformer bench pattention --quick
  tokenformer bench pattention --threads 2 --json benchmarks/results/
"""

HELP = f"""\
usage: tokenformer bench BENCHMARK [options]

Measure speed: all cases in one process, interleaved, results checked first.

benchmarks:
{"".join(f"  {name:<12} {summary}" for name, summary in BENCHMARKS.items())}

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
    parser = Parser("bench pattention", f"Measure {BENCHMARKS[name]}.", EXAMPLE)
    add_signature(parser, pattention, skip=("command",))
    pattention(**vars(parser.parse_args(rest)), command=shlex.join(["tokenformer", "bench", *argv]))


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
    from rich.console import Console

    from tokenformer.benchmarks import report
    from tokenformer.benchmarks.pattention import Shape, measure

    if quick:
        tokens, hidden_size, parameter_tokens = min(tokens, 256), min(hidden_size, 256), min(parameter_tokens, 1024)
        repeats = min(repeats, 3)
    if json is not None:
        report.check_target(json)
    shape = Shape(tokens, hidden_size, parameter_tokens)
    with Console(stderr=True).status("starting") as status:
        record = measure(
            shape,
            dtypes=tuple(dtypes.replace(" ", "").split(",")),
            threads=threads,
            repeats=repeats,
            progress=status.update,
        )
    record["command"] = command
    path = report.write(record, json) if json is not None else None
    if json != "-":
        _print(record)
    if path is not None:
        print(f"record: {path}")


def _print(record: dict[str, Any]) -> None:
    from rich.console import Console

    options, hardware = record["options"], record["hardware"]
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a file has no width: do not fold the tables
    console.print(
        f"Pattention, {options['tokens']} inputs of {options['hidden_size']} channels, {options['parameter_tokens']} "
        f"parameter tokens; {record['threads']} threads on {hardware['cpu']} ({' '.join(hardware['flags'])}), "
        f"torch {record['versions']['torch']}"
    )
    for dtype in options["dtypes"]:
        console.print(_table(record, dtype))
        for case, reason in record["checks"][dtype]["failed_to_compile"].items():
            console.print(f"{_LABELS[case]}: does not compile here ({reason})", markup=False)
    for ratio in record["ratios"]:
        sign, limit = ("<=", ratio["at_most"]) if ratio["at_most"] is not None else (">=", ratio["at_least"])
        mark = (
            "" if ratio["met"] is None else f"  target {sign} {limit}: {'met' if ratio['met'] else '[bold]MISSED[/]'}"
        )
        names = f"{_LABELS[ratio['numerator']]} / {_LABELS[ratio['denominator']]}"
        console.print(f"{ratio['dtype']:<9} {names:<62} {ratio['value']:6.3f}{mark}")
    console.print("Ratios: forward + backward, median over rounds.")


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
