"""A model before and after it was grown or trained on: what does the work now, what changed, what got better.

Both models read the same rows. What is measured of each position is averaged over all positions.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tokenformer.elastic.sizes import require_whole, segments_of
from tokenformer.errors import UserError
from tokenformer.evaluation.progress import bar
from tokenformer.interpret.addresses import pattention_layers, require_language_model
from tokenformer.interpret.attribution import segment_shares
from tokenformer.interpret.building import empty_tallies, read_rows
from tokenformer.interpret.capture import LayerRecord, capture
from tokenformer.interpret.contexts import context, pieces
from tokenformer.interpret.tallies import Tally
from tokenformer.models.loading import load_tokenizer
from tokenformer.tuning.adapters import kind_of

FORMAT = 1
_POSITIONS = 2048
_CHANGED = 32
_SHOWN = 4
# Ranks by frequency at which the classes of tokens end.
_RANKS = (10, 100, 1000)
_NOTES = [
    "A share is the projection of a segment's output on the output of its layer: negative where a segment speaks "
    "against the others. It says how much of the output a segment makes, not how much the output matters.",
    "Use counts |weight| times the length of the value, and so also what cancels within a segment.",
    "Contexts are compared by row: a token keeps a context if its weight is among the highest in that row before and "
    "after. Tokens whose weights are small everywhere change contexts easily.",
    "Layers behind the first read what the layers before them changed: other contexts of a token do not mean that the "
    "token itself was changed.",
    "Loss by type of token describes these rows. It does not say which tokens of the model made the difference.",
]


class _Reading:
    """What one model does with the rows."""

    def __init__(self, model: PreTrainedModel, contexts: int) -> None:
        self.model = model
        self.tallies: dict[str, Tally] = empty_tallies(model, contexts)
        self.shares = dict.fromkeys(self.tallies, 0.0)
        self.use = dict.fromkeys(self.tallies, 0.0)
        self.losses: list[torch.Tensor] = []
        self.lengths = {
            f"{path}/{name}": torch.linalg.vector_norm(segment.value.detach().float(), dim=-1)
            for path, layer in pattention_layers(model).items()
            for name, segment in segments_of(layer).items()
        }

    @torch.no_grad()
    def add(self, rows: torch.Tensor, first: int) -> None:
        """Read rows (B, T) of which the first has number `first`."""
        shape = rows.shape

        def see(record: LayerRecord) -> None:
            uses = {}
            for name, segment in record.segments.items():
                address = f"{record.layer}/{name}"
                weights = cast(torch.Tensor, segment.weights).view(*shape, segment.num_tokens)
                if not weights.isfinite().all():
                    raise UserError(f"{record.layer}: weights are not finite: model damaged, or its dtype too narrow")
                self.tallies[address].add(weights, first)
                uses[address] = weights.float().abs() @ self.lengths[address]
            total = torch.stack(list(uses.values())).sum(0)
            total = total.where(total > 0, 1)
            for address, used in uses.items():
                self.use[address] += (used / total).double().sum().item()
            for name, share in segment_shares(record).items():
                self.shares[f"{record.layer}/{name}"] += share.double().sum().item()

        with capture(self.model, outputs=True, consume=see):
            ids = rows.long().to(self.model.device)
            logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nats = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        self.losses.append(nats.view(len(ids), -1).double().cpu())


def compare_lineage(
    before: PreTrainedModel,
    after: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: str | Path | Sequence[str | Path],
    *,
    num_rows: int = 256,
    contexts: int = 16,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Compare two language models of one lineage on the same text.

    Args:
        before: the model as it was.
        after: what became of it: grown, trained on, or both. Its layers begin with the segments of `before`.
        tokenizer: of both.
        data: a folder of `tokenformer data prepare`, of which held-out rows are read, evenly spaced; or text files and
            what else `read_sources` takes, laid end to end and cut into rows.
        num_rows: at most.
        contexts: rows of each parameter token that are compared, those in which its weight is highest; at most half of
            the rows.
        batch_size: rows at a time; as many as hold 2048 tokens if not given.
        progress: show a bar where stderr is a terminal.

    Returns:
        Numbers and texts that JSON can hold:

        `before`, `after`: `name`, `parameters`, `segments` and `loss` (nats per token) of each model.
        `data`: `name`, `rows`, `length`.
        `layers`: of each layer of `after` its `name`, `kind`, `block` and `segments`: `name`, `num_tokens`, `new`,
        `share` (mean of <o_s, o> / ||o||^2) and `use` (mean of the sum of |w| ||v|| over that of all segments).
        `overlaps`: of the old tokens, the share of contexts that stayed: the `values` it can have and the `counts` of
        tokens with each, `mean`, `layers` (`name`, `mean` each), `chance` (of two random choices of rows), `contexts`
        (compared).
        `changed`: the 32 old tokens with the smallest overlap: `address`, `overlap`, and contexts `before`, `after`.
        `loss`: by `group` and `type`, the number of `tokens` predicted, and nats per token `before` and `after`. The
        types of each group share out all tokens.
        `notes`: what the numbers do not show.

    Raises:
        UserError: models that are not of one lineage: other tokenizer, vocabulary, width, layers or normalisation, or
            segments of `before` that `after` does not begin with; models with adapters or limits; data that are
            missing, empty or of another tokenizer; a count below 1.
    """
    for name, value in (("num_rows", num_rows), ("contexts", contexts), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    _check_lineage(before, after, tokenizer)
    longest = min(before.config.max_position_embeddings, after.config.max_position_embeddings)
    rows, data_name = read_rows(tokenizer, data, num_rows=num_rows, longest=longest, held_out=True)
    if rows.shape[1] < 2:
        raise UserError(f"'{data_name}' has rows of one token: there is nothing to predict")
    contexts = min(contexts, max(1, len(rows) // 2))
    size = batch_size or max(1, _POSITIONS // rows.shape[1])
    readings = [_Reading(model, contexts) for model in (before, after)]
    with bar("comparing", 2 * rows.numel(), "tokens", progress) as advance:
        for reading in readings:
            training = reading.model.training
            reading.model.eval()
            try:
                for first in range(0, len(rows), size):
                    batch = rows[first : first + size]
                    reading.add(batch, first)
                    advance(batch.numel())
            finally:
                reading.model.train(training)
    old, new = readings
    texts = [pieces(tokenizer, row) for row in rows.tolist()]
    overlaps = _overlaps(old, new)
    names = _names(before, after)
    return {
        "format": FORMAT,
        "kind": "lineage",
        "before": {"name": names[0], **_described(old)},
        "after": {"name": names[1], **_described(new)},
        "data": {"name": data_name, "rows": len(rows), "length": rows.shape[1]},
        "layers": _layers(old, new, rows.numel()),
        "overlaps": _distribution(overlaps, contexts, len(rows)),
        "changed": _changed(overlaps, old, new, texts),
        "loss": _losses(old, new, rows, texts, tokenizer),
        "notes": list(_NOTES),
    }


def _check_lineage(before: PreTrainedModel, after: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    layers = [pattention_layers(model) for model in (before, after)]
    for model, found in zip((before, after), layers, strict=True):
        require_language_model(model)
        require_whole(found)
        folder = Path(str(model.name_or_path))
        if (folder / "tokenizer.json").is_file() and load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
            raise UserError(f"not of one lineage: '{folder.name}' has another tokenizer")
    old, new = layers
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        first, second = getattr(before.config, name, None), getattr(after.config, name, None)
        if first != second:
            raise UserError(f"not of one lineage: {name} is {first} before and {second} after")
    if list(old) != list(new):
        raise UserError(f"not of one lineage: {len(old)} and {len(new)} Pattention layers of other names")
    for path, layer in old.items():
        other = new[path]
        for name in ("in_features", "out_features", "normalization"):
            if getattr(layer, name) != getattr(other, name):
                raise UserError(
                    f"not of one lineage: {name} of {path} is {getattr(layer, name)} before and {getattr(other, name)} "
                    "after"
                )
        mine, others = (
            [(name, segment.num_tokens) for name, segment in segments_of(found).items()] for found in (layer, other)
        )
        if others[: len(mine)] != mine:
            hint = ": was before and after exchanged?" if mine[: len(others)] == others else ""
            shown = [" + ".join(f"{name} {count}" for name, count in found) for found in (mine, others)]
            raise UserError(f"not of one lineage: {path} has {shown[0]} before and {shown[1]} after{hint}")


def _names(before: PreTrainedModel, after: PreTrainedModel) -> list[str]:
    """Ends of the paths from where they differ: recipes give the folders of many runs one name."""
    paths = [Path(str(model.name_or_path or type(model).__name__)).parts for model in (before, after)]
    count = 1
    while paths[0][-count:] == paths[1][-count:] and count < max(map(len, paths)):
        count += 1
    return ["/".join(path[-count:]) for path in paths]


def _described(reading: _Reading) -> dict[str, Any]:
    model = reading.model
    segments = list(dict.fromkeys(address.rpartition("/")[2] for address in reading.tallies))
    loss = torch.cat(reading.losses).mean().item()
    return {"parameters": model.num_parameters(), "segments": segments, "loss": loss}


def _layers(old: _Reading, new: _Reading, positions: int) -> list[dict[str, Any]]:
    layers = []
    for path, layer in pattention_layers(new.model).items():
        block = next((int(part) for part in path.split(".") if part.isdecimal()), 0)
        segments = [
            {
                "name": name,
                "num_tokens": segment.num_tokens,
                "new": f"{path}/{name}" not in old.tallies,
                "share": new.shares[f"{path}/{name}"] / positions,
                "use": new.use[f"{path}/{name}"] / positions,
            }
            for name, segment in segments_of(layer).items()
        ]
        layers.append({"name": path, "kind": kind_of(layer), "block": block, "segments": segments})
    return layers


def _overlaps(old: _Reading, new: _Reading) -> dict[str, torch.Tensor]:
    """Of the tokens (N,) of each old segment, the share of rows with their highest weights that stayed."""
    found = {}
    for address, tally in old.tallies.items():
        rows, others = tally.tensors["row"], new.tallies[address].tensors["row"]
        same = (rows[:, :, None] == others[:, None, :]).any(2)
        found[address] = same.double().mean(1)
    return found


def _distribution(overlaps: dict[str, torch.Tensor], contexts: int, num_rows: int) -> dict[str, Any]:
    every = torch.cat(list(overlaps.values()))
    counts = torch.bincount((every * contexts).round().long(), minlength=contexts + 1)
    by_layer: dict[str, list[torch.Tensor]] = {}
    for address, values in overlaps.items():
        by_layer.setdefault(address.rpartition("/")[0], []).append(values)
    return {
        "values": [kept / contexts for kept in range(contexts + 1)],
        "counts": counts.tolist(),
        "mean": every.mean().item(),
        "layers": [{"name": name, "mean": torch.cat(values).mean().item()} for name, values in by_layer.items()],
        "chance": contexts / num_rows,
        "contexts": contexts,
    }


def _changed(
    overlaps: dict[str, torch.Tensor], old: _Reading, new: _Reading, texts: list[list[str]]
) -> list[dict[str, Any]]:
    # Of equally small overlaps, those of tokens that speak loudly come first: their contexts mean the most.
    order = sorted(
        (overlap, -highest, address, number)
        for address, values in overlaps.items()
        for number, (overlap, highest) in enumerate(
            zip(values.tolist(), new.tallies[address].tensors["highest"][:, 0].tolist(), strict=True)
        )
    )
    return [
        {
            "address": f"{address}/{number}",
            "overlap": overlap,
            "before": _contexts(old.tallies[address], number, texts),
            "after": _contexts(new.tallies[address], number, texts),
        }
        for overlap, _, address, number in order[:_CHANGED]
    ]


def _contexts(tally: Tally, number: int, texts: list[list[str]]) -> list[dict[str, Any]]:
    names = ("highest", "row", "position")
    highest, rows, positions = (tally.tensors[name][number, :_SHOWN].tolist() for name in names)
    return [
        {**context(texts[row], position), "weight": weight, "row": row, "position": position}
        for weight, row, position in zip(highest, rows, positions, strict=True)
        if row >= 0
    ]


def _losses(
    old: _Reading, new: _Reading, rows: torch.Tensor, texts: list[list[str]], tokenizer: PreTrainedTokenizerFast
) -> list[dict[str, Any]]:
    losses = [torch.cat(reading.losses).flatten() for reading in (old, new)]
    ids = rows.tolist()
    special = set(tokenizer.all_special_ids)
    counts = Counter(token for row in ids for token in row)
    ranks = {token: rank for rank, (token, _) in enumerate(sorted(counts.items(), key=lambda c: (-c[1], c[0])), 1)}
    groups: dict[str, list[str]] = {"kind of token": [], "in this row": [], "frequency": []}
    for row, text in zip(ids, texts, strict=True):
        met = {row[0]}
        for place in range(1, len(row)):
            token = row[place]
            before = "".join(text[max(0, place - 2) : place])
            kind = "special token" if token in special else kind_of_text(text[place], before)
            groups["kind of token"].append(kind)
            groups["in this row"].append("seen before" if token in met else "new")
            groups["frequency"].append(_rank_class(ranks[token]))
            met.add(token)
    found = [_row("all", "all tokens", losses, torch.ones(len(losses[0]), dtype=torch.bool))]
    for group, types in groups.items():
        masks = {kind: torch.tensor([one == kind for one in types]) for kind in _ORDER[group]}
        found += [_row(group, kind, losses, mask) for kind, mask in masks.items() if mask.any()]
    return found


def _row(group: str, kind: str, losses: list[torch.Tensor], mask: torch.Tensor) -> dict[str, Any]:
    before, after = (values[mask].mean().item() for values in losses)
    return {"group": group, "type": kind, "tokens": int(mask.sum()), "before": before, "after": after}


def kind_of_text(piece: str, before: str) -> str:
    """What sort of token a piece of text is, by its first sign that is not a space.

    Args:
        piece: of the token, as `pieces` gives it.
        before: text in front of it.

    Returns:
        `white space`, `digit`, `word start` (a letter behind what is neither letter nor apostrophe, or behind a space),
        `inside a word`, `punctuation` (whatever else can be seen), or `part of a character`.
    """
    if not piece or "\N{REPLACEMENT CHARACTER}" in piece:
        return "part of a character"
    bare = piece.lstrip()
    if not bare:
        return "white space"
    if bare[0].isdigit():
        return "digit"
    if bare[0].isalpha():
        inside = bare == piece and re.search(r"[^\W_]['’]?$", before)
        return "inside a word" if inside else "word start"
    return "punctuation"


def _rank_class(rank: int) -> str:
    for start, end in pairwise((0, *_RANKS)):
        if rank <= end:
            return f"rank {start + 1} to {end}"
    return f"rank above {_RANKS[-1]}"


_ORDER = {
    "kind of token": [
        "word start",
        "inside a word",
        "white space",
        "digit",
        "punctuation",
        "part of a character",
        "special token",
    ],
    "in this row": ["seen before", "new"],
    "frequency": [*(f"rank {a + 1} to {b}" for a, b in pairwise((0, *_RANKS))), f"rank above {_RANKS[-1]}"],
}
