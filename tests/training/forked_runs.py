"""Runs of the command in processes of their own that start at once: one that has imported everything forks them.

As a program: a line of stdin that names a recipe starts `tokenformer train` on it and answers with the process id; an
empty line waits for its end and answers with its exit status, negative for a signal. Until then the id stays its own.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

# What a run imports on its way, as late as it can.
IMPORTED = ("tokenformer.training.run", "tokenformer.training.language", "transformers.models.auto.tokenization_auto")


class ForkedRuns:
    """Start runs one after another, each ended by `wait` before the next; use in a `with` statement.

    Args:
        log: file that takes what they print.
    """

    def __init__(self, log: Path) -> None:
        self.log = log

    def __enter__(self) -> "ForkedRuns":
        with self.log.open("ab") as log:
            command = [sys.executable, __file__]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.communicate(timeout=60)

    def start(self, recipe: str) -> int:
        """The process id of a new run."""
        return self._ask(recipe)

    def wait(self) -> int:
        """The exit status of the run, once it has one."""
        return self._ask("")

    def _ask(self, line: str) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


def _serve() -> None:
    from tokenformer.cli import main

    for name in IMPORTED:
        importlib.import_module(name)

    child = 0
    for line in sys.stdin:
        if recipe := line.strip():
            child = os.fork()
            if child == 0:
                os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # stdout is for answers
                code = main(["train", recipe])
                sys.stdout.flush()
                os._exit(code)
            print(child, flush=True)
        else:
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
