"""Tokens in groups of equal size, so that a router decides about few things and what it chooses lies together."""

import torch
import torch.nn.functional as F

_ROUNDS = 10


def group_tokens(features: torch.Tensor, size: int, *, seed: int = 0) -> torch.Tensor:
    """An order of N tokens whose consecutive `size` are alike: k-means on the directions of their features.

    Groups are of equal size, which plain k-means does not give: a group that more tokens want than fit keeps those that
    fit best, and the others ask the next.

    Args:
        features: (N, F), such as keys, or how strongly each token spoke on each of F inputs.
        size: tokens of a group; divides N.
        seed: of the first centres.

    Returns:
        (N,) indices; token `order[i]` comes to position i.
    """
    count = len(features)
    assert count % size == 0
    groups = count // size
    if groups == 1 or size == 1:
        return torch.arange(count)
    points = F.normalize(features.float(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(count, generator=generator)[:groups]]
    members = torch.zeros(count, dtype=torch.long)
    for _ in range(_ROUNDS):
        assigned = _assign(points @ centres.T, size)
        if torch.equal(assigned, members):
            break
        members = assigned
        sums = torch.zeros_like(centres).index_add_(0, members, points)
        centres = F.normalize(sums, dim=1)
    return members.argsort(stable=True)


def _assign(likeness: torch.Tensor, size: int) -> torch.Tensor:
    """A group (N,) for each token, `size` to each, by the likeness (N, G) of tokens and groups.

    Deferred acceptance: every free token asks the best group that has not refused it, and a group keeps the best who
    ask. So no token and group would both rather have each other.
    """
    likeness = likeness.clone()
    tokens, groups = likeness.shape
    member = torch.full((tokens,), -1)
    while (free := (member < 0).nonzero().squeeze(1)).numel():
        asked = likeness[free].argmax(1)
        member[free] = asked
        # Best first within each group: those behind the first `size` are refused, and do not ask there again.
        fit = likeness[torch.arange(tokens), member]
        order = fit.argsort(descending=True, stable=True)
        order = order[member[order].argsort(stable=True)]
        sizes = torch.bincount(member, minlength=groups)
        first = sizes.cumsum(0) - sizes
        place = torch.arange(tokens) - first[member[order]]
        refused = order[place >= size]
        likeness[refused, member[refused]] = -torch.inf
        member[refused] = -1
    return member


def group_sizes(num_tokens: int, wanted: int) -> int:
    """The largest divisor of `num_tokens` that is not above `wanted`."""
    return next(size for size in range(min(wanted, num_tokens), 0, -1) if num_tokens % size == 0)
