"""Results are compared with exact values before anything is timed: a speed of a wrong result is worth nothing."""

from typing import Any

import torch

from tokenformer.errors import UserError


def errors(result: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """How far `result` is from `exact`, in float64.

    `relative` is the root mean square of the error over that of the exact values; `worst` the largest error over the
    largest exact value, which shows a single wrong element.
    """
    difference = result.detach().double() - exact
    return {
        "relative": (difference.norm() / exact.norm()).item(),
        "worst": (difference.abs().max() / exact.abs().max()).item(),
    }


def check(
    result: torch.Tensor, exact: torch.Tensor, tolerance: tuple[float, float], case: str, name: str
) -> dict[str, float]:
    """The `errors` of a result.

    Args:
        result: of the case.
        exact: what it should be, in float64.
        tolerance: largest `relative` and `worst` error allowed.
        case: which case this is, for the message.
        name: which of its results.

    Raises:
        UserError: an error above the tolerance, or NaN.
    """
    found = errors(result, exact)
    relative, worst = found["relative"], found["worst"]
    if not (relative <= tolerance[0] and worst <= tolerance[1]):  # NaN fails
        raise UserError(
            f"{case} is wrong: {name} differs from float64 by {relative:.1e} (at most {tolerance[0]:.0e} allowed), at "
            f"worst {worst:.1e} (at most {tolerance[1]:.0e}): no speed is reported for a wrong result; check the "
            "installed torch and compiler"
        )
    return found


def summary(
    tolerance: tuple[float, float],
    found: dict[str, dict[str, dict[str, float]]],
    compile_seconds: dict[str, float],
    failed: dict[str, str],
) -> dict[str, Any]:
    """What a record says about the checks of one dtype; `found` holds the errors by case and result."""
    return {
        "tolerance": dict(zip(("relative", "worst"), tolerance, strict=True)),
        "errors": found,
        "compile_seconds": compile_seconds,
        "failed_to_compile": failed,
    }
