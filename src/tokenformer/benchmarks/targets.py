"""Ratios of two cases and the values they should stay on one side of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenformer.benchmarks.timing import Timing, paired_ratio


@dataclass(frozen=True)
class Target:
    """A ratio of the times of two cases, and the value it should stay on one side of."""

    numerator: str
    denominator: str
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    at_most: float | None = None
    at_least: float | None = None

    def met(self, value: float) -> bool | None:
        """Whether `value` is good enough; None if there is no target."""
        if self.at_most is not None:
            return value <= self.at_most
        return value >= self.at_least if self.at_least is not None else None

    def row(self, dtype: str, value: float, *, judge: bool) -> dict[str, Any]:
        """What a record says of this ratio."""
        return {
            "numerator": self.numerator,
            "denominator": self.denominator,
            "dtype": dtype,
            "value": value,
            "at_most": self.at_most,
            "at_least": self.at_least,
            "met": self.met(value) if judge else None,
        }


def ratios(
    timings: Mapping[str, Mapping[str, Timing]], targets: Sequence[Target], *, judge: bool
) -> list[dict[str, Any]]:
    """The ratios of `targets`, medians over rounds, for `{dtype: {case: times}}`.

    `met` says whether the target is, and is None if there is none or `judge` is False.
    """
    rows = []
    for target in targets:
        for dtype in target.dtypes:
            cases = timings.get(dtype, {})
            if target.numerator not in cases or target.denominator not in cases:
                continue
            value = paired_ratio(cases[target.numerator], cases[target.denominator])
            rows.append(target.row(dtype, value, judge=judge))
    return rows
