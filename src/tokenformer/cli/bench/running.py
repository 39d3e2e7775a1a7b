"""What all benchmarks do on the command line: measure, write the record, show it, compare it with an old one."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from tokenformer.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

Show = Callable[[dict[str, Any], "Console"], None]


def carry_out(
    benchmark: str,
    measure: "partial[dict[str, Any]]",
    show: Show,
    *,
    json: str | None,
    compare: str | None,
    command: str | None,
    sizes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure, write the record where asked, and show it, unless the record itself goes to standard output.

    Args:
        benchmark: its name.
        measure: with all options but `progress`.
        show: prints a record.
        json: where to write it; see the options of the benchmarks.
        compare: file of an old record.
        command: written into the record.
        sizes: options that `measure` does not have by name.

    Raises:
        UserError: what `measure` raises; a file that cannot be written; an old record of something else.
    """
    from rich.console import Console

    from tokenformer.benchmarks import comparing, report

    if json is not None:
        report.check_target(json)
    old = None
    if compare is not None:
        old = comparing.read(compare)
        comparing.check_same(old, benchmark, {**measure.keywords, **(sizes or {})})
    with Console(stderr=True).status("starting") as status:
        record = measure(progress=status.update)
    record["command"] = command
    comparison = comparing.compare(old, record) if old is not None else None
    path = report.write(record, json) if json is not None else None
    console = a_console(stderr=json == "-")
    if json != "-":
        show(record, console)
    if comparison is not None:
        from tokenformer.benchmarks.showing import show_comparison

        show_comparison(comparison, console)
    if path is not None:
        print(f"record: {path}")
    return record


def a_console(*, stderr: bool = False) -> "Console":
    """Where tables are printed; a file has no width, and they are not folded there."""
    from rich.console import Console

    console = Console(highlight=False, stderr=stderr)
    if not console.is_terminal:
        console.width = 120
    return console


def names(option: str) -> tuple[str, ...]:
    """Words separated by commas."""
    return tuple(option.replace(" ", "").split(","))


def counts(name: str, option: str) -> tuple[int, ...]:
    """Whole numbers separated by commas.

    Raises:
        UserError: naming the option.
    """
    if not all(word.strip().isdecimal() for word in option.split(",")):
        raise UserError(f"--{name} must be whole numbers separated by commas, got '{option}'")
    return tuple(int(word) for word in option.split(","))
