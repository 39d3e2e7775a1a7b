"""`tokenformer bench all`: the whole suite, each benchmark in a process of its own."""

import subprocess
import sys
from difflib import get_close_matches
from pathlib import Path

from tokenformer.errors import UserError


def run(*, only: str | None = None, threads: int | None = None, quick: bool = False, json: str | None = None) -> None:
    """Run all benchmarks, each with its own defaults.

    Args:
        only: names of those to run, separated by commas.
        threads: of torch; one per physical core if not given.
        quick: small shapes, to see that everything runs.
        json: folder for the records, under their usual names.
    """
    from tokenformer.cli.bench import BENCHMARKS

    chosen = list(BENCHMARKS) if only is None else only.replace(" ", "").split(",")
    for name in chosen:
        if name not in BENCHMARKS:
            near = get_close_matches(name, BENCHMARKS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"use {', '.join(BENCHMARKS)}"
            raise UserError(f"--only: unknown benchmark '{name}': {hint}")
    if json is not None and not Path(json).is_dir():
        raise UserError(f"--json {json}: there is no such folder: create it first")
    options = [*(["--quick"] if quick else []), *(["--threads", str(threads)] if threads is not None else [])]
    options += ["--json", json] if json is not None else []
    failed = []
    for name in chosen:
        print(f"== {name}", flush=True)
        # What one compiled, and the memory it took, must not be there for the next.
        if subprocess.run([sys.executable, "-m", "tokenformer", "bench", name, *options]).returncode:
            failed.append(name)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; their messages stand above")
