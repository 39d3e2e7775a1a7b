"""The normalisations of scores, each split in two so that segments can be evaluated apart.

Phase one turns a segment's scores into activities and one number per row; the numbers of all segments combine into the
row's total. Phase two turns activities and the total into weights. Nothing in phase two looks at another segment, so a
segment may live in another parameter, on another device, or not be computed at all if its number is known
otherwise (`tokenformer.ops.gram`).

Shapes: scores and activities (..., N), statistics and totals (..., 1), in float32 or better.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce

import torch

from tokenformer.errors import UserError
from tokenformer.ops.activations import Activation


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _sum_of_squares(scores: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling():
        # Fused, the float32 copy never exists, and the gradient is 2 A: that of a norm divides every element by it.
        return scores.to(_at_least_float32(scores.dtype)).square().sum(-1, keepdim=True)
    # vector_norm accumulates low-precision scores in float32 without a float32 copy of them.
    norm: torch.Tensor = torch.linalg.vector_norm(scores, dim=-1, keepdim=True, dtype=_at_least_float32(scores.dtype))
    return norm.square()


def _factor(scale: torch.Tensor | float, total: torch.Tensor, eps: float) -> torch.Tensor:
    # Not rsqrt: its derivative holds the cube, which underflows in float32 where the norm passes 1e13.
    return scale / torch.sqrt(total + eps)


class Normalization(ABC):
    """One way to turn the scores of a row into weights over parameter tokens."""

    @abstractmethod
    def activities(self, scores: torch.Tensor, activation: Activation, visible: torch.Tensor | None) -> torch.Tensor:
        """What phase two needs of the scores; a token that is not visible gets the value that adds nothing."""

    @abstractmethod
    def statistic(self, activities: torch.Tensor) -> torch.Tensor:
        """One number per row, in float32 or better."""

    def combine(self, statistics: Sequence[torch.Tensor]) -> torch.Tensor:
        """The statistic of the union of segments."""
        return reduce(torch.add, statistics)

    @abstractmethod
    def weights(
        self,
        activities: torch.Tensor,
        total: torch.Tensor,
        scale: torch.Tensor | float,
        activation: Activation,
        eps: float,
    ) -> torch.Tensor:
        """The weights of the value tokens, given the row's total over all segments."""


class L2GeLU(Normalization):
    """f(tau A / ||A||_2): the paper's, published as `l2_norm_gelu` (Eq. 4)."""

    def activities(self, scores: torch.Tensor, activation: Activation, visible: torch.Tensor | None) -> torch.Tensor:
        return scores if visible is None else scores.masked_fill(~visible, 0)

    def statistic(self, activities: torch.Tensor) -> torch.Tensor:
        return _sum_of_squares(activities)

    def weights(
        self,
        activities: torch.Tensor,
        total: torch.Tensor,
        scale: torch.Tensor | float,
        activation: Activation,
        eps: float,
    ) -> torch.Tensor:
        return activation(activities * _factor(scale, total, eps))


class GeLUL2(Normalization):
    """tau f(A) / ||f(A)||_2, published as `gelu_l2_norm`."""

    def activities(self, scores: torch.Tensor, activation: Activation, visible: torch.Tensor | None) -> torch.Tensor:
        activated = activation(scores)
        return activated if visible is None else activated.masked_fill(~visible, 0)

    def statistic(self, activities: torch.Tensor) -> torch.Tensor:
        return _sum_of_squares(activities)

    def weights(
        self,
        activities: torch.Tensor,
        total: torch.Tensor,
        scale: torch.Tensor | float,
        activation: Activation,
        eps: float,
    ) -> torch.Tensor:
        return activities * _factor(scale, total, eps)


class GeLUL1(GeLUL2):
    """tau^2 f(A) / ||f(A)||_1: `softmax` with f in place of exp, the middle row of the paper's Table 4.

    Activities are those of `gelu_l2`; the norm is another.
    """

    def statistic(self, activities: torch.Tensor) -> torch.Tensor:
        norm: torch.Tensor = torch.linalg.vector_norm(
            activities, ord=1, dim=-1, keepdim=True, dtype=_at_least_float32(activities.dtype)
        )
        return norm

    def weights(
        self,
        activities: torch.Tensor,
        total: torch.Tensor,
        scale: torch.Tensor | float,
        activation: Activation,
        eps: float,
    ) -> torch.Tensor:
        return activities * (scale**2 / (total + eps))


class Softmax(Normalization):
    """tau^2 exp(A) / ||exp(A)||_1; the total is the logarithm of the sum, and a missing token scores minus infinity."""

    def activities(self, scores: torch.Tensor, activation: Activation, visible: torch.Tensor | None) -> torch.Tensor:
        return scores if visible is None else scores.masked_fill(~visible, -torch.inf)

    def statistic(self, activities: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(activities.to(_at_least_float32(activities.dtype)), dim=-1, keepdim=True)

    def combine(self, statistics: Sequence[torch.Tensor]) -> torch.Tensor:
        return reduce(torch.logaddexp, statistics)

    def weights(
        self,
        activities: torch.Tensor,
        total: torch.Tensor,
        scale: torch.Tensor | float,
        activation: Activation,
        eps: float,
    ) -> torch.Tensor:
        # A row that sees no token at all has a total of minus infinity: its weights are 0, not exp(-inf + inf).
        return torch.exp(activities - total.masked_fill(total == -torch.inf, 0)) * scale**2


NORMALIZATIONS: dict[str, Normalization] = {
    "l2_gelu": L2GeLU(),
    "gelu_l2": GeLUL2(),
    "gelu_l1": GeLUL1(),
    "softmax": Softmax(),
}


def get_normalization(name: str) -> Normalization:
    """The normalisation called `name`.

    Raises:
        UserError: no such name.
    """
    if name not in NORMALIZATIONS:
        raise UserError(f"unknown normalization '{name}': use one of {', '.join(NORMALIZATIONS)}")
    return NORMALIZATIONS[name]
