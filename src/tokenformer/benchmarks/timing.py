"""Interleaved timing: what disturbs a machine for a second then falls on all cases alike."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Wall times of one case, in the order of the rounds.

    Attributes:
        seconds: one per round.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        """Shortest, in seconds."""
        return min(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, in seconds."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    def as_dict(self) -> dict[str, Any]:
        """The figures of a record, in seconds."""
        first, third = self.quartiles
        return {
            "median": self.median,
            "min": self.minimum,
            "first_quartile": first,
            "third_quartile": third,
            "rounds": list(self.seconds),
        }


def interleave(
    cases: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    before: Mapping[str, Callable[[], object]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time `cases` round-robin (A B C, A B C, ...), each once a round.

    Warm them up first: nothing is left out here.

    Args:
        cases: what to call, by name.
        repeats: rounds, at least 1.
        before: what to call before a case, every time, without the clock.
        clock: seconds.
    """
    assert repeats >= 1
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, call in cases.items():
                if before and name in before:
                    before[name]()
                start = clock()
                call()
                seconds[name].append(clock() - start)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def paired_ratio(numerator: Timing, denominator: Timing) -> float:
    """Median over rounds of the ratio of two cases: each pair was measured within one round, under the same load."""
    pairs = zip(numerator.seconds, denominator.seconds, strict=True)
    return statistics.median(above / below for above, below in pairs)
