"""`tokenformer report`: what a plan has come to, as a page, figures and a table."""

import sys
from pathlib import Path
from typing import Any

from tokenformer.cli.parser import Parser, call
from tokenformer.errors import UserError

EXAMPLE = """\
  tokenformer report runs/books-small
  tokenformer report runs/books-small --markdown tables.md
  tokenformer report runs/digits-growth
"""


def main(argv: list[str]) -> None:
    """Run `tokenformer report`."""
    summary = "Report a plan: perplexity or error over cumulative cost and that of each stage, against every baseline."
    call(report, Parser("report", summary, EXAMPLE), argv)


def report(run: str, *, out: str | None = None, markdown: str | None = None) -> None:
    """Write report.html, report.json and figures, and print the answer. The plan may be half done.

    Args:
        run: folder that `tokenformer run` wrote.
        out: folder for the report; that of the plan if not given.
        markdown: file for all tables as Markdown as well, for a page of results.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f"there is no folder '{run}': give the one that `tokenformer run` wrote")
    target = folder if out is None else Path(out)
    if target.exists() and not target.is_dir():
        raise UserError(f"--out {target} is a file: give a folder")
    if markdown is not None and (Path(markdown).is_dir() or not Path(markdown).absolute().parent.is_dir()):
        raise UserError(f"--markdown {markdown}: give a file in a folder that exists")
    from tokenformer.plans.results import collect
    from tokenformer.reports.growth import markdown_table, write_growth_report

    results = collect(folder)
    written = write_growth_report(results, target)
    if markdown is not None:
        from tokenformer.folders import write_atomically

        write_atomically(Path(markdown), markdown_table(results))
        written.append(Path(markdown))
    _print(results)
    sys.stdout.write("".join(f"{path}\n" for path in written))


def _print(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tokenformer.reports.growth.findings import answer
    from tokenformer.reports.growth.tables import quality_table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file has no width: do not fold the table
    made = quality_table(results)
    table = Table(box=None)
    for i, heading in enumerate(made.header):
        table.add_column(heading, justify="right" if i else "left")
    for row in made.rows:
        table.add_row(*map(Text, row))  # as Text, a label cannot hold markup
    console.print(table)
    sys.stdout.write(f"\n{answer(results)}\n\n")
