"""Sizes that give a Transformer a wanted number of parameters."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from tokenformer.errors import UserError

# Heads and intermediate sizes are multiples of this where there is a choice: odd ones multiply slowly.
UNIT = 8
# Intermediate sizes that a match may have, in hidden sizes, and the one it is to be close to.
_LEAST_FFN, _USUAL_FFN, _MOST_FFN = 0.5, 4, 16

# Parameters by hidden size and intermediate size; linear in the intermediate size.
Count = Callable[[int, int], int]


def block_parameters(hidden_size: int, intermediate_size: int) -> int:
    """Parameters of a block of GPTNeoX or ViT: the weights of its linear layers, their biases, and two norms."""
    d, f = hidden_size, intermediate_size
    return 4 * d**2 + 2 * d * f + 9 * d + f


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Raise `UserError` on the first size below 1, and on a hidden_size that num_attention_heads does not divide."""
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name} must be at least 1, got {size}")
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise UserError(
            f"hidden_size {sizes['hidden_size']} is not divisible by num_attention_heads "
            f"{sizes['num_attention_heads']}: change one of them"
        )


@dataclass(frozen=True)
class Shape:
    """Sizes of a Transformer, and what comes of them.

    Attributes:
        hidden_size: channels.
        intermediate_size: neurons of the feed-forward.
        parameters: those that are counted.
        error: by which they miss what is wanted, as a share of it.
    """

    hidden_size: int
    intermediate_size: int
    parameters: int
    error: float

    @property
    def oddness(self) -> float:
        """How far the feed-forward is from its usual size: the absolute logarithm of the ratio."""
        return abs(math.log(self.intermediate_size / self.hidden_size / _USUAL_FFN))


def matching_shape(
    wanted: int,
    *,
    count: Count,
    hidden_size: int | None,
    narrowest: int,
    step: int,
    tolerance: float,
    model: str,
    counted: str,
    usable: Callable[[int], bool] = lambda width: True,
) -> Shape:
    """The sizes with a wanted number of parameters whose feed-forward is closest to the usual one.

    Args:
        wanted: parameters.
        count: them, from hidden size and intermediate size.
        hidden_size: the one to keep to; any from `narrowest` on if not given.
        narrowest: the smallest hidden size that may be chosen.
        step: from one hidden size to the next.
        tolerance: share of `wanted` by which the result may be off. Within it the intermediate size is a multiple of 8
            if one fits, otherwise the one that comes closest.
        model: what has these sizes, for messages.
        counted: which parameters they are, for messages.
        usable: whether a hidden size may be chosen.

    Raises:
        UserError: nothing with an intermediate size of half to 16 hidden sizes comes within the tolerance.
    """
    if hidden_size is None:
        wider = _wider(narrowest, step, count, wanted * (1 + tolerance))
        widths = [narrowest, *(width for width in wider if usable(width))]
    else:
        widths = [hidden_size]
    shapes = [_nearest_shape(wanted, width, count, tolerance) for width in widths]
    near = min(shapes, key=lambda shape: shape.error)
    if near.error > tolerance:
        raise UserError(
            f"no {model} and {'any' if hidden_size is None else 'this'} hidden_size comes within {tolerance:.2%} of "
            f"{wanted} {counted}: the nearest has {near.parameters} (hidden_size {near.hidden_size}, "
            f"intermediate_size {near.intermediate_size}), so change "
            f"{'layers or heads' if hidden_size is None else 'hidden_size or layers'}"
        )
    return min((shape for shape in shapes if shape.error <= tolerance), key=lambda shape: shape.oddness)


def _wider(narrowest: int, step: int, count: Count, most: float) -> Iterator[int]:
    """Hidden sizes above `narrowest` of which a model can have `most` parameters or fewer."""
    width = narrowest
    while count(width := width + step, _least_ffn(width)) <= most:
        yield width


def _nearest_shape(wanted: int, hidden_size: int, count: Count, tolerance: float) -> Shape:
    """The intermediate size that comes closest; a multiple of 8 instead if it comes within the tolerance."""
    least, most = _least_ffn(hidden_size), _MOST_FFN * hidden_size
    without = count(hidden_size, 0)
    exact = (wanted - without) / (count(hidden_size, 1) - without)
    shapes = []
    for unit in (UNIT, 1):
        size = min(max(unit * round(exact / unit), least), most)
        parameters = count(hidden_size, size)
        shapes.append(Shape(hidden_size, size, parameters, abs(parameters - wanted) / wanted))
    even, closest = shapes
    return even if even.error <= tolerance else closest


def _least_ffn(hidden_size: int) -> int:
    return math.ceil(hidden_size * _LEAST_FFN)
