"""Single tokens: the change of a row's loss that a contribution foretells, against the one that is measured.

A contribution is the derivative of the loss by a factor on the token's value; without the token the loss should change
by minus that, if it were linear and the norm of the scores stayed.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tokenformer.interpret.addresses import TokenAddress
from tokenformer.interpret.attribution import row_losses, trace
from tokenformer.interpret.intervention import measured_ablation
from tokenformer.interpret.lens import WRITING

if TYPE_CHECKING:
    from tokenformer.models.modeling_tokenformer import TokenFormerForCausalLM

# First and last rank, by magnitude of the gradient contribution, of the bands that tokens are drawn from.
BANDS = ((1, 10), (11, 100), (101, 1000), (1001, None))
_RESAMPLES = 500
_COLUMNS = ("gradient", "direct", "measured")
_FIGURES = ("pearson", "spearman", "sign", "slope")


def first_order_agreement(
    model: "TokenFormerForCausalLM",
    rows: torch.Tensor,
    *,
    tokens_per_band: int = 10,
    seed: int = 0,
    on_row: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Switch single tokens off, and compare what happens to the row's loss with what contributions foretell.

    Args:
        model: in evaluation mode.
        rows: token ids (B, T).
        tokens_per_band: drawn for each row from each of `BANDS`, as far as there are so many.
        seed: of the draw and of the bootstrap.
        on_row: called with 1 after each row.

    Returns:
        `bands`, each with `ranks` (first, last or None), and `kinds`, by kind of layer: `tokens`, `measured` (mean
        magnitude of the change, in nats per token of the row), and of `gradient` and `direct` contributions (None
        where no token has one) `pearson`, `spearman`, `sign` (share with the sign that was foretold) and `slope`
        (measured over foretold, least squares), each with `mean` over all tokens and 95 % bootstrap `interval` over
        rows.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[int, int, str, float, float, float]] = []  # row, band, kind, gradient, direct, measured
    for number, row in enumerate(rows):
        ids = row[None].to(model.device)
        traced = trace(model, ids)
        loss = row_losses(traced.logits, ids)
        gradient, direct = traced.gradient(loss), traced.direct_loss(loss)
        places = [(n, s, i) for n, parts in gradient.items() for s, c in parts.items() for i in range(c.shape[-1])]
        order = torch.cat([c[0] for parts in gradient.values() for c in parts.values()]).abs().argsort(descending=True)
        chosen = []
        for band, (first, last) in enumerate(BANDS):
            members = order[first - 1 : last]
            draw = torch.randperm(len(members), generator=generator)[:tokens_per_band]
            chosen += [(band, *places[i]) for i in members.cpu()[draw].tolist()]
        logits = measured_ablation(model, ids, [TokenAddress(*place) for _, *place in chosen])
        losses = torch.cat([row_losses(one[None], ids) for one in logits])
        for (band, layer, segment, i), after in zip(chosen, losses.tolist(), strict=True):
            kind = traced.layers[layer].kind
            own = -direct[layer][segment][0, i].item() if kind in WRITING else np.nan
            found.append((number, band, kind, -gradient[layer][segment][0, i].item(), own, after - loss.item()))
        if on_row is not None:
            on_row(1)
    table = np.array(found, dtype=[("row", int), ("band", int), ("kind", "U8"), *((n, float) for n in _COLUMNS)])
    return {
        "bands": [
            {"ranks": list(ranks), **_compared(table[table["band"] == band], seed)}
            for band, ranks in enumerate(BANDS)
            if (table["band"] == band).any()
        ],
        "kinds": {str(kind): _compared(table[table["kind"] == kind], seed) for kind in np.unique(table["kind"])},
    }


def _compared(table: np.ndarray, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {"tokens": len(table), "measured": float(np.abs(table["measured"]).mean())}
    for name in ("gradient", "direct"):
        known = table[~np.isnan(table[name])]
        found[name] = None if len(known) < 2 else _figures(known["row"], known[name], known["measured"], seed)
    return found


def _figures(rows: np.ndarray, foretold: np.ndarray, measured: np.ndarray, seed: int) -> dict[str, Any]:
    """All figures over all tokens, with intervals for which whole rows are drawn."""
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(rows == row) for row in np.unique(rows)]
    draws = []
    for _ in range(_RESAMPLES):
        drawn = np.concatenate([members[i] for i in generator.integers(len(members), size=len(members))])
        draws.append(_agreement(foretold[drawn], measured[drawn]))
    whole = _agreement(foretold, measured)
    ends = np.percentile(np.array(draws), [2.5, 97.5], axis=0).T
    return {
        name: {"mean": float(value), "interval": [float(low), float(high)]}
        for name, value, (low, high) in zip(_FIGURES, whole, ends, strict=True)
    }


def _agreement(foretold: np.ndarray, measured: np.ndarray) -> tuple[float, float, float, float]:
    ranks = [x.argsort().argsort() for x in (foretold, measured)]
    size = (foretold**2).sum()
    return (
        _correlation(foretold, measured),
        _correlation(*ranks),
        float((np.sign(foretold) == np.sign(measured)).mean()),
        float((foretold * measured).sum() / size) if size else 0.0,
    )


def _correlation(some: np.ndarray, others: np.ndarray) -> float:
    """Pearson's; 0 where one of them is constant."""
    return float(np.corrcoef(some, others)[0, 1]) if some.std() and others.std() else 0.0
