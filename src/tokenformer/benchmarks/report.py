"""The record of a benchmark: a JSON file that says everything needed to judge and repeat it."""

import json
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tokenformer.benchmarks.timing import Timing
from tokenformer.errors import UserError
from tokenformer.hardware import hardware, versions

Timings = dict[str, dict[str, dict[str, Timing]]]  # by dtype, pass and case


def new_record(benchmark: str, options: dict[str, Any], threads: int) -> dict[str, Any]:
    """What every record begins with: benchmark, date (UTC), command, options, threads, hardware, versions."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": None,
        "options": options,
        "threads": threads,
        "hardware": hardware(),
        "versions": versions(),
    }


def as_seconds(timings: Timings) -> dict[str, dict[str, dict[str, Any]]]:
    """The times of a record, by dtype, pass and case."""
    return {
        dtype: {name: {case: timing.as_dict() for case, timing in cases.items()} for name, cases in passes.items()}
        for dtype, passes in timings.items()
    }


def file_name(record: dict[str, Any]) -> str:
    """`<what>_<hardware>_<torch>_<date>.json`, as benchmarks/README.md describes it."""
    cpu = re.sub(r"\((?:r|tm)\)|@.*|\b(?:cpu|processor)\b", " ", record["hardware"]["cpu"].lower())
    words = re.findall(r"[a-z0-9.]+", cpu) or ["cpu"]
    extra = ["amx"] if "amx_bf16" in record["hardware"]["flags"] else []
    slug = "-".join([*words, *extra, f"{record['threads']}t"])
    torch = record["versions"]["torch"].split("+")[0]
    return f"{record['benchmark']}_{slug}_{torch}_{record['date'][:10]}.json"


def check_target(target: str, option: str = "--json") -> None:
    """Say now, not after minutes of measuring, that a file cannot be written.

    Args:
        target: file or folder.
        option: that names it.

    Raises:
        UserError: its folder does not exist.
    """
    if target == "-":
        return
    folder = Path(target) if _is_folder(target) else Path(target).parent
    if not folder.is_dir():
        raise UserError(f"{option} {target}: there is no folder '{folder}': create it first")


def write(record: dict[str, Any], target: str) -> Path | None:
    """Write `record` to a file, into a folder under its conventional name, or (`-`) to standard output.

    Returns:
        Where it is, or None for standard output.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(record, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return None
    path = Path(target) / file_name(record) if _is_folder(target) else Path(target)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}") from error
    return path


def _is_folder(target: str) -> bool:
    return target.endswith("/") or Path(target).is_dir()
