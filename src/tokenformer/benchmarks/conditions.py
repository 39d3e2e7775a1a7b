"""What all benchmarks agree on: the dtypes they know, options that make sense, a first call of everything."""

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import torch

from tokenformer.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_options(dtypes: tuple[str, ...], **counts: int) -> None:
    """Refuse what cannot be measured.

    Args:
        dtypes: of inputs and weights.
        counts: sizes and numbers of rounds by their option's name, each at least 1.

    Raises:
        UserError: naming the option.
    """
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise UserError(f"unknown dtype '{dtype}': use {' or '.join(DTYPES)}")
    if not dtypes or len(set(dtypes)) != len(dtypes):
        raise UserError(f"dtypes must be one or more of {', '.join(DTYPES)}, each once, got '{','.join(dtypes)}'")


def warm_up(
    calls: Mapping[str, Callable[[], object]], compiled: Collection[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Call everything once, with an empty compiler cache.

    Args:
        calls: by case.
        compiled: the cases that torch.compile is involved in.

    Returns:
        Seconds that the compiled cases took, and the cases that do not compile with the reason in one line.
    """
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    with _empty_compiler_cache():
        for name, call in calls.items():
            start = time.perf_counter()
            try:
                call()
            except Exception as error:
                # A missing or old C++ compiler, or a code generator at fault: the other cases are worth having.
                if name not in compiled:
                    raise
                failed[name] = " ".join(str(error).split())[:200]
                continue
            if name in compiled:
                seconds[name] = time.perf_counter() - start
    return seconds, failed


@contextmanager
def _empty_compiler_cache() -> Iterator[None]:
    """Compile as on the first day, so that the seconds mean something."""
    variable = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(variable)
    with TemporaryDirectory(prefix="tokenformer-bench-", ignore_cleanup_errors=True) as folder:
        os.environ[variable] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before
