"""What is summed up of the weights of parameter tokens while a corpus goes by.

Shapes: B rows of a batch, T positions, N tokens of a segment, k contexts.
"""

from collections.abc import Mapping

import torch

# A token is active at a position where its weight is beyond this: scores have a mean square of 1 in a model that has
# not grown, so that the weights of speaking tokens are of the order of one.
ACTIVE = 0.1
# From this share of active positions on, a token is always on.
ALWAYS_ON = 0.99


class Tally:
    """Statistics of the tokens of one segment, and for each token the rows in which its weight is highest.

    Sums over the positions of a row are in the precision of the weights, sums over rows in float64 and in their order.

    Args:
        num_tokens: N.
        contexts: k.

    Attributes:
        tensors: `sum` and `squares` (N,) float64, `active` (N,) int64: positions with |weight| > 0.1; `highest` (N, k)
            float32 weights, highest first, with `row` and `position` (N, k) int32 of each. At most one position of a
            row is among them; of equal weights the earlier row, and within it the earlier position. Places that no row
            has taken yet hold minus infinity, -1 and -1.
    """

    def __init__(self, num_tokens: int, contexts: int) -> None:
        self.tensors = {
            "sum": torch.zeros(num_tokens, dtype=torch.float64),
            "squares": torch.zeros(num_tokens, dtype=torch.float64),
            "active": torch.zeros(num_tokens, dtype=torch.int64),
            "highest": torch.full((num_tokens, contexts), -torch.inf),
            "row": torch.full((num_tokens, contexts), -1, dtype=torch.int32),
            "position": torch.full((num_tokens, contexts), -1, dtype=torch.int32),
        }

    def add(self, weights: torch.Tensor, first_row: int) -> None:
        """Add weights (B, T, N) of rows that begin with number `first_row`."""
        weights = weights.float()
        tensors = self.tensors
        for row in weights:
            tensors["sum"] += row.sum(0).double().cpu()
            tensors["squares"] += torch.linalg.vector_norm(row, dim=0).double().square().cpu()
        tensors["active"] += (weights.abs() > ACTIVE).sum((0, 1)).cpu()
        best = weights.max(dim=1)
        self._merge(best.values.T.cpu(), best.indices.T.cpu(), first_row)

    def _merge(self, values: torch.Tensor, positions: torch.Tensor, first_row: int) -> None:
        """Take candidates (N, B) among the contexts."""
        highest = self.tensors["highest"]
        # After the first rows few tokens find a better context: sorting only these keeps the cost from growing with k.
        changed = (values > highest[:, -1:]).any(1).nonzero().squeeze(1)
        if not len(changed):
            return
        count = highest.shape[1]
        rows = torch.arange(first_row, first_row + values.shape[1], dtype=torch.int32).expand(len(changed), -1)
        candidates = {"highest": values[changed], "row": rows, "position": positions[changed].int()}
        joined = {name: torch.cat([self.tensors[name][changed], new], dim=1) for name, new in candidates.items()}
        # Those from earlier rows stand first, and stable sorting leaves them there.
        order = joined["highest"].sort(dim=1, descending=True, stable=True).indices[:, :count]
        for name, both in joined.items():
            self.tensors[name][changed] = both.gather(1, order)


def statistics(tensors: Mapping[str, torch.Tensor], positions: int) -> dict[str, torch.Tensor]:
    """Of each token (N,), in float64: `mean`, `rms` and `max` weight, `active`: share of |weight| > 0.1.

    Args:
        tensors: of a `Tally`.
        positions: that it has read.
    """
    return {
        "mean": tensors["sum"] / positions,
        "rms": (tensors["squares"] / positions).sqrt(),
        "max": tensors["highest"][:, 0].double(),
        "active": tensors["active"].double() / positions,
    }


def state(active: float) -> str | None:
    """`dead` of a token that is active nowhere, `always on` of one that is at 99 % of the positions or more."""
    return "dead" if active == 0 else "always on" if active >= ALWAYS_ON else None
