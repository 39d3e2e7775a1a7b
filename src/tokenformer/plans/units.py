"""Numbers as a dry run shows them."""

import math
from collections.abc import Mapping
from typing import Any

from tokenformer.plans.estimate import CPU


def count_text(number: float) -> str:
    """Three or four digits and a letter: 1.281M."""
    power = min(int(math.log10(max(number, 1)) // 3), 4)
    return f"{number / 1000**power:.4g}{' kMBT'[power].strip()}"


def flops_text(number: float) -> str:
    """Three digits and a power of ten: 1.05e11."""
    digits, power = f"{number:.2e}".split("e")
    return f"{digits}e{int(power)}"


def bytes_text(number: float) -> str:
    """Three digits and a unit of 1024: 5.3 GiB."""
    power = min(int(math.log2(max(number, 1)) // 10), 5)
    return f"{number / 1024**power:.3g} {' KMGTP'[power].strip()}{'i' if power else ''}B"


def hours_text(hours: float) -> str:
    """Three digits, or whole hours from a hundred on."""
    if hours < 0.01:
        return "<0.01"
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def rate_text(rate: Mapping[str, Any]) -> str:
    """Whose hours these are: what `assumed_rate` returned, as words."""
    device = "this CPU" if rate["device"] == CPU else f"one {rate['device']}"
    speed = f"{flops_text(rate['flops_per_second'])} FLOP/s"
    if rate["how"] == "assumed":
        return f"of {device} at {speed}, {rate['mfu']:g} of its peak (MFU), which is an assumption"
    return f"of {device} at {speed}, as {rate['how']}"
