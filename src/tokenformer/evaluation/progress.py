"""A bar on stderr while a model is judged, where somebody is looking at it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def bar(description: str, total: int, unit: str, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar over `total` units; yields the function to call with the number just done.

    Args:
        description: in front of the bar.
        total: units to do.
        unit: what is counted, in the plural.
        enabled: show it, if stderr is a terminal.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    disabled = not (enabled and sys.stderr.isatty())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=disabled) as bars:
        task = bars.add_task(description, total=total)
        yield lambda count: bars.advance(task, count)
