"""How many groups each layer computes: equal errors, within a share of all tokens; and where sparsity cannot pay."""

from collections.abc import Mapping
from dataclasses import dataclass

from tokenformer.pattention import Pattention
from tokenformer.sparse import triangle_elements


@dataclass(frozen=True)
class Curve:
    """The error of a layer over the number of groups that it computes, measured on calibration data.

    Attributes:
        active: numbers of groups, ascending.
        errors: squared error of the output as a share of its variance, by these; made to fall.
        tokens: parameter tokens of a group.
        num_tokens: of the layer.
    """

    active: tuple[int, ...]
    errors: tuple[float, ...]
    tokens: int
    num_tokens: int

    def needed(self, error: float) -> int:
        """The fewest groups, of those measured or between them, at which the error is not above `error`."""
        if self.errors[0] <= error:
            return self.active[0]
        for i in range(1, len(self.active)):
            if self.errors[i] <= error:
                low, high = self.errors[i - 1], self.errors[i]
                share = (low - error) / (low - high)
                return min(
                    self.active[i], self.active[i - 1] + round(share * (self.active[i] - self.active[i - 1]) + 0.5)
                )
        return self.active[-1]


def equal_error(curves: Mapping[str, Curve], keep: float, step: Mapping[str, int]) -> dict[str, int]:
    """Groups by layer: the smallest common error at which all layers together compute at most `keep` of their tokens.

    Args:
        curves: by layer.
        keep: share of the tokens of these layers.
        step: by layer, the number of groups is a multiple of it.
    """
    allowed = keep * sum(curve.num_tokens for curve in curves.values())

    def budget(error: float) -> dict[str, int]:
        return {
            name: min(-(-curve.needed(error) // step[name]) * step[name], curve.active[-1])
            for name, curve in curves.items()
        }

    low, high = 0.0, max(error for curve in curves.values() for error in curve.errors)
    for _ in range(50):
        middle = (low + high) / 2
        counts = budget(middle)
        if sum(counts[name] * curve.tokens for name, curve in curves.items()) <= allowed:
            high = middle
        else:
            low = middle
    return budget(high)


def dense_elements(layer: Pattention) -> int:
    """Elements of weights that one input reads of a dense layer."""
    return layer.num_tokens * (layer.in_features + layer.out_features)


def sparse_elements(layer: Pattention, *, keep: float, group_size: int, rank: int, router_rank: int) -> float:
    """Elements of weights that one input would read of a sparse layer that computes a share `keep` of its tokens."""
    channels = layer.in_features + layer.out_features
    groups = layer.num_tokens // group_size
    router = router_rank * layer.in_features + groups * (router_rank + 1)
    remainder = rank * channels + layer.out_features
    return (
        keep * layer.num_tokens * channels + triangle_elements(layer.num_tokens, layer.in_features) + router + remainder
    )
