"""How far attributions and lenses can be believed: what they say, against what the model does without the tokens.

**Removal curves.** For each row of held-out text, tokens are ranked by their contribution to the loss of that very row.
The first k of a ranking are then switched off together, at all positions, and the loss of the row is measured again.
Rankings:

- `gradient`: those first that lower the loss most, by the first-order contribution;
- `lowest`: those first whose first-order contribution has the least magnitude;
- `random`: any order, one for each seed;
- `direct`, `lowest-direct`, `random-writing`: likewise among the tokens of `output` and `ffn` layers, which alone have
  direct contributions; the others come last, in random order.

A ranking that tells what a row needs loses much where random orders of the same tokens lose less and lowest ones least.

**Lens agreement.** One token is switched off, and the fall of all logits at a position is compared with what the value
lens says that its weight adds there.

**First order.** One token is switched off, and the change of the row's loss is compared with what its contributions
foretell (first_order.py).
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tokenformer.errors import UserError
from tokenformer.evaluation.perplexity import evenly_spaced
from tokenformer.evaluation.progress import bar
from tokenformer.folders import write_atomically
from tokenformer.interpret.addresses import TokenAddress, pattention_layers
from tokenformer.interpret.attribution import Contributions, row_losses, trace
from tokenformer.interpret.first_order import first_order_agreement
from tokenformer.interpret.intervention import hide, measured_ablation
from tokenformer.interpret.lens import WRITING, value_lens
from tokenformer.interpret.taps import tapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerFast

    from tokenformer.models.modeling_tokenformer import TokenFormerForCausalLM

# By ranking: the random order of the same tokens, which it is compared with.
RANKINGS = {
    "gradient": "random",
    "lowest": "random",
    "random": "random",
    "direct": "random-writing",
    "lowest-direct": "random-writing",
    "random-writing": "random-writing",
}
_RESAMPLES = 2000
_ROWS_AT_ONCE = 4


def log_counts(num_tokens: int, steps: int = 12) -> list[int]:
    """Numbers from 1 to half of `num_tokens`, evenly spaced on a logarithmic scale."""
    most = max(1, num_tokens // 2)
    return sorted({round(most ** (i / max(1, steps - 1))) for i in range(steps)})


def removal_curves(
    model: "TokenFormerForCausalLM",
    rows: torch.Tensor,
    *,
    counts: Sequence[int] | None = None,
    rankings: Sequence[str] = tuple(RANKINGS),
    random_orders: int = 3,
    seed: int = 0,
    on_row: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Loss of each row with the first k tokens of each ranking switched off.

    Args:
        model: in evaluation mode.
        rows: token ids (B, T), held out from training.
        counts: the numbers k; `log_counts` of all tokens if not given.
        rankings: some of those above.
        random_orders: of each row.
        seed: of random orders and of the bootstrap.
        on_row: called with 1 after each row.

    Returns:
        `counts`; `tokens` and `writing`, the number of all tokens and of those of `output` and `ffn` layers; `before`,
        the mean loss in nats per token with all tokens; `curves`: by ranking, `loss` (mean over rows for each count; of
        random ones over orders too), and of random ones the `spread`, the standard deviation over orders of the mean
        over rows; `areas`: by ranking, the mean over counts of its loss minus that of the random one beside it
        (`RANKINGS`), where that is there, with a 95 % bootstrap `interval` over rows.

    Raises:
        UserError: no rows or rows of one token, an unknown ranking, a count below 1 or beyond the tokens.
    """
    if rows.dim() != 2 or not len(rows) or rows.shape[1] < 2:
        raise UserError("nothing to predict: give rows of at least two tokens")
    if unknown := [name for name in rankings if name not in RANKINGS]:
        raise UserError(f"unknown ranking '{unknown[0]}': use some of {', '.join(RANKINGS)}")
    if random_orders < 1:
        raise UserError(f"random_orders must be at least 1, got {random_orders}")
    generator = torch.Generator().manual_seed(seed)
    before: list[float] = []
    losses: dict[str, list[list[list[float]]]] = {name: [] for name in rankings}
    for row in rows:
        ids = row[None].to(model.device)
        found = trace(model, ids)
        loss = row_losses(found.logits, ids)
        gradient, direct = found.gradient(loss), found.direct_loss(loss)
        places = _places(gradient)
        counts = log_counts(len(places)) if counts is None else counts
        if not all(1 <= count < len(places) for count in counts):
            raise UserError(f"counts must lie between 1 and {len(places) - 1}, below the tokens of the model")
        before.append(loss.item())
        for name in rankings:
            orders = [
                _order(name, gradient, direct, generator)
                for _ in range(random_orders if name.startswith("random") else 1)
            ]
            losses[name].append([_without(model, ids, places, order, counts) for order in orders])
        if on_row is not None:
            on_row(1)
    assert counts is not None
    writing = sum(found.shape[-1] for parts in direct.values() for found in parts.values())
    sizes = {"counts": list(counts), "tokens": len(places), "writing": writing}
    return {**sizes, "before": float(np.mean(before)), **_curves(losses, seed)}


def _places(contributions: Contributions) -> list[tuple[str, str, int]]:
    return [
        (layer, segment, i)
        for layer, segments in contributions.items()
        for segment, found in segments.items()
        for i in range(found.shape[-1])
    ]


def _order(name: str, gradient: Contributions, direct: Contributions, generator: torch.Generator) -> list[int]:
    whole = torch.cat([found[0] for segments in gradient.values() for found in segments.values()]).cpu()
    if name == "random":
        return torch.randperm(len(whole), generator=generator).tolist()
    if name == "lowest":
        return whole.abs().argsort().tolist()
    if name == "gradient":
        return whole.argsort().tolist()
    # Tokens without a direct contribution come last.
    own = torch.cat(
        [
            direct[layer][segment][0].cpu() if layer in direct else torch.full((found.shape[-1],), math.inf)
            for layer, segments in gradient.items()
            for segment, found in segments.items()
        ]
    )
    ranks = {"direct": own, "lowest-direct": own.abs(), "random-writing": own.isinf().int()}[name]
    # Shuffled first, and stable then, so that equal ones come in random order.
    shuffled = torch.randperm(len(whole), generator=generator)
    return shuffled[ranks[shuffled].argsort(stable=True)].tolist()


@torch.no_grad()
def _without(
    model: "TokenFormerForCausalLM",
    ids: torch.Tensor,
    places: list[tuple[str, str, int]],
    order: list[int],
    counts: Sequence[int],
) -> list[float]:
    """Loss of a row without the first tokens of an order; the counts are rows of a batch."""
    layers = pattention_layers(model)
    # By count and token: whether it exists.
    exists = torch.ones(len(counts), len(places), dtype=torch.bool)
    for i, count in enumerate(counts):
        exists[i, order[:count]] = False
    masks: dict[str, dict[str, torch.Tensor]] = {}
    start = 0
    for (layer, segment), group in groupby(places, key=lambda place: place[:2]):
        size = len(list(group))
        masks.setdefault(layer, {})[segment] = exists[:, None, start : start + size]
        start += size
    found: list[float] = []
    for first in range(0, len(counts), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        edits = {
            layers[layer]: partial(hide, {name: mask[part] for name, mask in segments.items()})
            for layer, segments in masks.items()
        }
        batch = ids.expand(len(counts[part]), -1)
        with tapped(edits=edits):
            found += row_losses(model(batch, use_cache=False).logits, batch).tolist()
    return found


def _curves(losses: dict[str, list[list[list[float]]]], seed: int) -> dict[str, Any]:
    tables = {name: np.array(found) for name, found in losses.items()}  # rows, orders, counts
    curves: dict[str, Any] = {name: {"loss": table.mean((0, 1)).tolist()} for name, table in tables.items()}
    areas: dict[str, Any] = {}
    for name, table in tables.items():
        if name == RANKINGS[name]:
            spread = table.mean(0).std(0, ddof=1) if table.shape[1] > 1 else np.zeros(table.shape[2])
            curves[name]["spread"] = spread.tolist()
        elif RANKINGS[name] in tables:
            areas[name] = _with_interval((table.mean(1) - tables[RANKINGS[name]].mean(1)).mean(-1), seed)
    return {"curves": curves, "areas": areas}


def _with_interval(numbers: np.ndarray, seed: int) -> dict[str, Any]:
    """Mean of one number for each row, with a 95 % bootstrap interval."""
    draws = np.random.default_rng(seed).integers(len(numbers), size=(_RESAMPLES, len(numbers)))
    low, high = np.percentile(numbers[draws].mean(1), [2.5, 97.5])
    return {"mean": float(numbers.mean()), "interval": [float(low), float(high)]}


@torch.no_grad()
def lens_agreement(
    model: "TokenFormerForCausalLM",
    rows: torch.Tensor,
    *,
    tokens_per_layer: int = 4,
    seed: int = 0,
    on_row: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """How well the value lens foretells the fall of the logits when a token is switched off.

    At the last position of each row, of each `output` and `ffn` layer, half of the tokens are the strongest there, by
    |weight| times length of the value, and half drawn at random.

    Args:
        model: in evaluation mode.
        rows: token ids (B, T).
        tokens_per_layer: for each row and layer.
        seed: of the draw and of the bootstrap.
        on_row: called with 1 after each row.

    Returns:
        By layer, and for `strongest` and `random` tokens: `spearman`, over the vocabulary, and `overlap`, the share of
        the ten logits that the lens says fall most that are among the ten that do, each with mean and interval over
        rows; `chance` is the overlap of two random lists.
    """
    generator = torch.Generator().manual_seed(seed)
    half = max(1, tokens_per_layer // 2)
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    vocabulary = model.config.vocab_size
    for row in rows:
        ids = row[None].to(model.device)
        traced = trace(model, ids)
        sigma, before = traced.sigma[0, -1].item(), traced.logits[0, -1].detach()
        for name, layer in traced.layers.items():
            if layer.kind not in WRITING:
                continue
            lens = value_lens(model, name, sigma=sigma)
            weights = torch.cat([w[0, -1] for w in layer.weights.values()])
            places = [(segment, i) for segment, v in layer.values.items() for i in range(len(v))]
            sizes = weights.abs() * torch.cat(list(layer.values.values())).norm(dim=-1)
            chosen = {
                "strongest": sizes.topk(min(half, len(sizes))).indices.tolist(),
                "random": torch.randperm(len(sizes), generator=generator)[:half].tolist(),
            }
            for group, members in chosen.items():
                after = measured_ablation(model, ids, [TokenAddress(name, *places[i]) for i in members])
                figures = found.setdefault(name, {}).setdefault(group, {"spearman": [], "overlap": []})
                pairs = [_compare(lens[i] * weights[i], before - after[n, -1]) for n, i in enumerate(members)]
                figures["spearman"].append(float(np.mean([pair[0] for pair in pairs])))
                figures["overlap"].append(float(np.mean([pair[1] for pair in pairs])))
        if on_row is not None:
            on_row(1)
    layers = {
        name: {
            group: {figure: _with_interval(np.array(numbers), seed) for figure, numbers in figures.items()}
            for group, figures in groups.items()
        }
        for name, groups in found.items()
    }
    return {"layers": layers, "chance": min(10, vocabulary) / vocabulary}


def _compare(foretold: torch.Tensor, measured: torch.Tensor) -> tuple[float, float]:
    """Spearman over the vocabulary, and the share of the ten greatest in common."""
    ranks = torch.stack([x.argsort().argsort() for x in (foretold, measured)]).double()
    k = min(10, len(foretold))
    best = [set(x.topk(k).indices.tolist()) for x in (foretold, measured)]
    return torch.corrcoef(ranks)[0, 1].item(), len(best[0] & best[1]) / k


def measure_faithfulness(
    model: "TokenFormerForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    data: str | Path,
    *,
    num_rows: int = 64,
    seed: int = 0,
    out: str | Path,
    progress: bool = True,
    command: str | None = None,
) -> dict[str, Any]:
    """Removal curves, lens agreement and first order on held-out rows, as a JSON record and a picture beside it.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        data: folder written by `tokenformer data prepare` with that tokenizer.
        num_rows: of its held-out rows, at equal distances.
        seed: of all draws.
        out: JSON file; the picture has the same name and ends in `.png`.
        progress: show a bar where stderr is a terminal.
        command: that was given, for the record.

    Raises:
        UserError: data of another tokenizer, or what `PreparedData.load` refuses; a file that cannot be written.
    """
    from tokenformer.data.prepared import PreparedData
    from tokenformer.evaluation.record import check_target, new_record

    check_target(str(out), "faithfulness", "faithfulness.json")
    if Path(out).suffix != ".json":
        raise UserError(f"faithfulness: '{out}' does not end in .json: the picture takes its name with .png")
    if num_rows < 1:
        raise UserError(f"num_rows must be at least 1, got {num_rows}")
    opened = PreparedData.load(data, verify=False)
    if opened.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"'{data}' was prepared with another tokenizer than the model's")
    rows = torch.tensor([row["input_ids"] for row in evenly_spaced(opened.held_out, num_rows)])
    rows = rows[:, : model.config.max_position_embeddings]
    record = new_record(
        "faithfulness", model, str(model.config.name_or_path), command=command, threads=torch.get_num_threads()
    )
    record["data"] = {"path": str(data), "fingerprint": opened.fingerprints["held_out"], "rows": len(rows)}
    record["seed"] = seed
    with bar("removing tokens", len(rows), "rows", progress) as advance:
        removal = removal_curves(model, rows, seed=seed, on_row=advance)
    with bar("reading values", len(rows), "rows", progress) as advance:
        agreement = lens_agreement(model, rows, seed=seed, on_row=advance)
    with bar("single tokens", len(rows), "rows", progress) as advance:
        single = first_order_agreement(model, rows, seed=seed, on_row=advance)
    record["results"] = {"removal": removal, "lens": agreement, "first_order": single}
    write_atomically(Path(out), json.dumps(record, indent=2, allow_nan=False) + "\n")
    draw_faithfulness(record["results"]).savefig(Path(out).with_suffix(".png"))
    return record


def draw_faithfulness(results: dict[str, Any]) -> "Figure":
    """Removal curves on the left, lens agreement by layer on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    removal = results["removal"]
    counts = np.array(removal["counts"])
    for name, curve in removal["curves"].items():
        # The same colour for what is compared with each other, within all tokens and within those that write.
        colour = f"C{list(RANKINGS).index(name) % 3}"
        style = "-" if RANKINGS[name] == "random" else ":"
        left.plot(counts, curve["loss"], style, color=colour, marker="o", markersize=3, label=name)
        if "spread" in curve:
            loss, spread = np.array(curve["loss"]), np.array(curve["spread"])
            left.fill_between(counts, loss - spread, loss + spread, alpha=0.2, color=left.lines[-1].get_color())
    left.axhline(removal["before"], color="grey", linewidth=1, linestyle="--", label="all tokens")
    left.set(xscale="log", xlabel="parameter tokens switched off", ylabel="loss of the row (nats per token)")
    left.legend()
    layers = results["lens"]["layers"]
    places = np.arange(len(layers))
    for shift, group in ((-0.2, "strongest"), (0.2, "random")):
        figures = [layer[group]["spearman"] for layer in layers.values()]
        means = np.array([f["mean"] for f in figures])
        ends = np.array([f["interval"] for f in figures])
        errors = np.abs(ends.T - means)
        right.bar(places + shift, means, 0.4, yerr=errors, capsize=2, label=f"{group} tokens")
    names = [name.removeprefix("model.layers.").replace("attention.", "") for name in layers]
    right.set_xticks(places, names, rotation=60, ha="right", fontsize=8)
    right.set_ylabel("Spearman: lens against measured fall of logits")
    right.axhline(0, color="grey", linewidth=1)
    right.legend()
    return figure
