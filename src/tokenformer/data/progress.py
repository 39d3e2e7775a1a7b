"""Progress bars on stderr, where somebody is looking at it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from tokenformer.data.documents import Advance


class Bars:
    """One bar for each pass over the data; silent if `enabled` is False or stderr is no terminal.

    Args:
        enabled: show bars at all.
    """

    def __init__(self, enabled: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (enabled and sys.stderr.isatty()),
        )

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    @contextmanager
    def bar(self, description: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Show a bar over `total` bytes; yields the function to call with the bytes just done."""
        task = self._progress.add_task(description, total=total, completed=done)
        yield lambda size: self._progress.advance(task, size)
        # What was counted is an estimate where a file is compressed or has columns that were not read.
        self._progress.update(task, completed=total)
