"""What a sparse layer learns from calibration data: whom its router chooses, and what the rest would have said.

Both are regressions with a closed form. Shapes: M inputs, D_in and D_out channels, N tokens, G groups.
"""

from dataclasses import dataclass

import torch

_RIDGE = 1e-3
Router = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # down, up, bias


class Regression:
    """Ridge regression on directions (M, D_in) and a constant; the inputs are factored once for many targets.

    Args:
        directions: (M, D_in).
        ridge: added to the diagonal of the Gram matrix, as a share of its mean.
    """

    def __init__(self, directions: torch.Tensor, ridge: float = _RIDGE) -> None:
        self.inputs = directions.double()
        self.mean = self.inputs.mean(0)
        centred = self.inputs - self.mean
        self.gram = centred.T @ centred
        gram = self.gram.clone()
        gram.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(1e-12))
        self.centred, self.cholesky = centred, torch.linalg.cholesky(gram)

    def fit(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (T, D_in) and bias (T,) for targets (M, T), in float64."""
        mean = targets.double().mean(0)
        weight = torch.cholesky_solve(self.centred.T @ (targets.double() - mean), self.cholesky).T
        return weight, mean - weight @ self.mean

    def fit_low_rank(self, targets: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`down` (rank, D_in), `up` (D_out, rank) and bias (D_out,): the best map of that rank.

        Reduced-rank regression: the full map, projected on the directions in which its predictions vary most.
        """
        weight, _ = self.fit(targets)
        _, vectors = torch.linalg.eigh(weight @ self.gram @ weight.T)  # of the predictions
        up = vectors[:, vectors.shape[1] - rank :]
        down = up.T @ weight
        return down, up, targets.double().mean(0) - up @ (down @ self.mean)


@dataclass
class Activities:
    """What a layer does on calibration inputs.

    Attributes:
        directions: u = tau x / ||A||, (M, D_in).
        weights: f(u K^T), (M, N).
        value: (N, D_out).
    """

    directions: torch.Tensor
    weights: torch.Tensor
    value: torch.Tensor

    def part(self, which: torch.Tensor) -> "Activities":
        """Of the inputs where `which` (M,) is True."""
        return Activities(self.directions[which], self.weights[which], self.value)

    def loudness(self) -> torch.Tensor:
        """Weight times value norm of each token on each input, (M, N)."""
        return self.weights * self.value.norm(dim=1)

    def left_out(self, chosen: torch.Tensor, order: torch.Tensor, size: int) -> torch.Tensor:
        """What the groups say that are not `chosen` (M, G): (M, D_out)."""
        left = (~chosen).repeat_interleave(size, dim=1)
        return (self.weights[:, order] * left) @ self.value[order]

    def variance(self, which: torch.Tensor) -> float:
        """Squared distance of the outputs of inputs `which` (M,) from their mean, summed."""
        output = self.weights[which] @ self.value
        return (output - output.mean(0)).square().sum().clamp_min(1e-30).item()

    def energies(self, order: torch.Tensor, size: int) -> torch.Tensor:
        """How loudly each group of `order` speaks: (M, G), the root of its summed squared loudness."""
        said = self.loudness().square()[:, order]
        return said.view(len(said), -1, size).sum(-1).sqrt()


def centroid_router(key: torch.Tensor, order: torch.Tensor, size: int) -> Router:
    """A router that prefers the groups whose mean key points where the input does; nothing is learned."""
    centres = key[order].view(-1, size, key.shape[1]).mean(1).double()
    # Written as a router of full rank: the input as it is, then the centres.
    return torch.eye(key.shape[1], dtype=torch.float64), centres, torch.zeros(len(centres), dtype=torch.float64)


def choose(preferences: torch.Tensor, active: int) -> torch.Tensor:
    """Booleans (M, G): the `active` most preferred groups of each input."""
    chosen = torch.zeros_like(preferences, dtype=torch.bool)
    return chosen.scatter_(1, preferences.topk(active, dim=1).indices, True)


def recall(energies: torch.Tensor, chosen: torch.Tensor) -> float:
    """The share of squared energy (M, G) that is chosen, over the share that the best choice of as many would reach."""
    active = int(chosen[0].sum())
    squares = energies.square()
    best = squares.topk(active, dim=1).values.sum()
    return (squares[chosen].sum() / best.clamp_min(1e-30)).item()
