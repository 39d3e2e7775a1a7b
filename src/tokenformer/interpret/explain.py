"""What a text uses of a model, as one JSON object: what the page shows, and what Python reads.

One forward pass with gradients gives weights, segment shares and both contributions; a second one, with a row for each
token that is switched off, what happens without it.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerFast

from tokenformer.errors import UserError
from tokenformer.interpret.addresses import TokenAddress, pattention_layers
from tokenformer.interpret.attribution import LayerTrace, Trace, shares_of, token_losses, trace
from tokenformer.interpret.intervention import Change, intervene, measured_ablation
from tokenformer.interpret.lens import READING, WRITING, nearest_by, promoted_by
from tokenformer.interpret.payload import (
    FORMAT,
    GRADIENT,
    LISTED,
    MEASURED,
    SHARES,
    STRONGEST,
    describe_model,
    layer_effects,
    own_address,
    ranked,
    short,
    target_of,
    use_of,
)
from tokenformer.interpret.text import piece, predictions, text_ids
from tokenformer.models.loading import num_entries
from tokenformer.models.modeling_tokenformer import TokenFormerForCausalLM
from tokenformer.tuning.adapters import kind_of

if TYPE_CHECKING:
    from tokenformer.interpret.index import Index

# Of a longer text fewer tokens are listed at each position, so that files of long texts stay readable by a browser.
_LISTED_TOKENS, _MANY_POSITIONS = 8, 128
# Text tokens of a batch of ablations, whose logits over the vocabulary exist at once.
_POSITIONS_AT_ONCE = 1024
# Tokens in the list at the focus.
_ATTRIBUTED = 200
# Tokens whose card is written: beyond, a long text and a large model would make a file of hundreds of megabytes.
_CARDS = 3000

NOTES = [
    STRONGEST,
    "Direct contributions add up to the logit exactly, with the embedding and a bias; they hold the final norm at what "
    "it was and count no effect through later layers.",
    GRADIENT,
    MEASURED,
    SHARES,
    "Promoted tokens are those of a positive weight; later layers and the final norm's division are left out.",
    "Nearest inputs are exact for the query, key and value layers of the first block, and a guess for deeper keys.",
]


def explain_text(
    model: TokenFormerForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    *,
    position: int | None = None,
    target: str | None = None,
    num_tokens: int | None = None,
    ablations: int = 12,
    index: "Index | None" = None,
    changes: Iterable[Change] = (),
) -> dict[str, Any]:
    """The parameter tokens that a text uses, and what each does to the prediction behind one of its positions.

    Args:
        model: a language model, in evaluation mode.
        tokenizer: of the model.
        text: to read.
        position: of the token behind which the prediction is explained, from 0; the last one if not given.
        target: the next token whose logit is explained: text that the tokenizer makes one token of; the likeliest one
            if not given.
        num_tokens: parameter tokens listed for each position and layer; if not given, 8 of a text of up to 128 tokens,
            and fewer of a longer one.
        ablations: tokens of the greatest gradient contribution to switch off, one at a time.
        index: of a corpus, for statistics and contexts.
        changes: to make; what the model predicts with them is given beside what it predicts without.

    Returns:
        Lists, dictionaries, strings and finite numbers only:

        `model`: `name`, `parameters`, `layers` with their `kind`, `block` and `segments`.
        `text`: of each token of it `pieces`, `ids` and `loss` in nats (None of the first); `loss`, the mean of these.
        `position`, `target` (`id`, `piece`, `probability`, `logit`): what is explained.
        `positions`: of each token of the text the `predictions` behind it and the `layers`, each with `shares` of the
        segments and the strongest `tokens` (`address`, `weight`, and `direct`, the contribution to the likeliest next
        token's logit, or None).
        `attribution`: the parameter tokens that move the target's logit most: `address`, `weight` at the position,
        `gradient`, `direct` or None, `measured` or None.
        `layers`: how much the tokens of each raise and lower it in all.
        `ablations`: by address of those that were measured, `loss` and `predictions` at all positions without them.
        `changes`: None, or the `changes` that were made, `predictions` and `loss` with them.
        `tokens`: the card of each token above, by address: what it `promotes`, `suppresses` and is `nearest` to, and
        by the index `statistics`, `state` and `contexts`.
        `notes`: what the numbers do not show.

    Raises:
        UserError: an empty or overlong text, a position outside of it, a target that is not one token, a count that
            cannot be, or what `intervene` refuses.
    """
    if num_tokens is not None and num_tokens < 1:
        raise UserError(f"num_tokens must be at least 1, got {num_tokens}")
    if ablations < 0:
        raise UserError(f"ablations must be at least 0, got {ablations}")
    if not isinstance(model, TokenFormerForCausalLM):
        pattention_layers(model)
        raise UserError(f"{type(model).__name__} is no TokenFormer language model: a text cannot be explained with it")
    ids = text_ids(model, tokenizer, text)
    focus = _focus(position, ids.shape[1])
    found = trace(model, ids)
    logits = found.logits.detach()
    if not bool(logits.isfinite().all()):
        raise UserError(
            "the model gives logits that are not finite: its weights are damaged, or its dtype is too narrow"
        )
    targets = logits[0].argmax(-1)
    targets[focus] = _target(tokenizer, target, targets[focus].item())
    attribution, layers = _attribution(found, focus, int(targets[focus]))
    with torch.no_grad():
        off, effects = _ablations(model, tokenizer, ids, attribution[:ablations], logits, focus, int(targets[focus]))
        for entry in attribution:
            entry["measured"] = effects.get(entry["address"])
        listed = num_tokens or max(1, min(_LISTED_TOKENS, _LISTED_TOKENS * _MANY_POSITIONS // ids.shape[1]))
        positions = _positions(found, tokenizer, targets, listed)
        altered = _changed(model, tokenizer, ids, list(changes), focus)
        shown = _shown(attribution, positions, focus)
        cards = token_cards(model, tokenizer, [own_address(text) for text in shown[:_CARDS]], index=index)
    losses = token_losses(logits, ids)[0]
    notes = list(NOTES)
    if num_tokens is None and listed < _LISTED_TOKENS:
        notes.append(f"The text is long: {listed} of each layer's tokens are listed at each position.")
    if len(shown) > _CARDS:
        notes.append(f"Of the {len(shown)} tokens listed, the {_CARDS} most important have a card.")
    return {
        "format": FORMAT,
        "kind": "language",
        "live": False,
        "model": describe_model(model),
        "text": {
            "pieces": [piece(tokenizer, token_id) for token_id in ids[0].tolist()],
            "ids": ids[0].tolist(),
            "loss": [None, *map(short, losses.tolist())],
        },
        "position": focus,
        "target": target_of(logits[0, focus], int(targets[focus]), partial(piece, tokenizer)),
        "positions": positions,
        "attribution": attribution,
        "layers": layers,
        "ablations": off,
        "loss": _mean(losses),
        "changes": altered,
        "tokens": cards,
        "notes": notes,
    }


def token_cards(
    model: TokenFormerForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tokens: Sequence[TokenAddress],
    *,
    index: "Index | None" = None,
) -> dict[str, dict[str, Any]]:
    """What is known of each of `tokens`, by address: what its value promotes, what its key is near to, its use.

    Args:
        model: a language model.
        tokenizer: of the model.
        tokens: with whole addresses.
        index: of a corpus, for statistics, state and contexts, which are None and empty without one.

    Raises:
        UserError: an unknown token, or one that takes no part.
    """
    layers, num_ids = pattention_layers(model), num_entries(tokenizer)
    cards: dict[str, dict[str, Any]] = {}
    use = partial(_use, index, {})
    for token in tokens:
        kind = kind_of(layers[token.layer])
        cards[str(token)] = {
            "address": str(token),
            "layer": token.layer,
            "kind": kind,
            "segment": token.segment,
            "index": token.index,
            "promotes": None,
            "suppresses": None,
            "nearest": None,
            **use(token),
        }
    pieces: dict[int, str] = {}

    def in_words(pairs: list[tuple[int, float]]) -> list[list[Any]]:
        for token_id, _ in pairs:
            if token_id not in pieces:
                pieces[token_id] = piece(tokenizer, token_id)
        return [[pieces[token_id], short(value)] for token_id, value in pairs]

    writing = [token for token in tokens if cards[str(token)]["kind"] in WRITING]
    for token, (up, down) in zip(writing, promoted_by(model, writing, LISTED, num_ids), strict=True):
        cards[str(token)] |= {"promotes": in_words(up), "suppresses": in_words(down)}
    reading = [token for token in tokens if cards[str(token)]["kind"] in READING]
    for token, near in zip(reading, nearest_by(model, reading, LISTED, num_ids), strict=True):
        cards[str(token)]["nearest"] = in_words(near)
    return cards


def _use(
    index: "Index | None", seen: dict[tuple[str, str], dict[str, torch.Tensor]], token: TokenAddress
) -> dict[str, Any]:
    if index is None:
        return {"statistics": None, "state": None, "contexts": []}
    place = token.layer, token.segment
    if place not in seen:
        seen[place] = index.statistics(*place)
    shown = ("before", "token", "after", "weight")
    return {
        **use_of(seen[place], token.index),
        "contexts": [{name: context[name] for name in shown} for context in index.contexts(token)],
    }


def _focus(position: int | None, length: int) -> int:
    place = length - 1 if position is None else position + length if position < 0 else position
    if not 0 <= place < length:
        raise UserError(f"position {position} is outside of the text: it has the tokens 0 to {length - 1}")
    return place


def _target(tokenizer: PreTrainedTokenizerFast, target: str | None, likeliest: float) -> int:
    if target is None:
        return int(likeliest)
    ids = tokenizer(target, add_special_tokens=False)["input_ids"] if target else []
    if len(ids) != 1:
        raise UserError(f"the target '{target}' is {len(ids)} tokens: give text that is one, such as ' the'")
    return int(ids[0])


def _attribution(found: Trace, focus: int, target_id: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the strongest tokens contribute to the target's logit, and what each layer does in all."""
    rows = found.gradient(found.logits[0, focus, target_id])
    gradient = {name: {segment: c[0] for segment, c in parts.items()} for name, parts in rows.items()}

    def weight(layer: str, segment: str, i: int) -> float:
        return found.layers[layer].weights[segment][0, focus, i].item()

    listed = ranked(gradient, found.direct(focus, target_id).tokens, weight, _ATTRIBUTED)
    return listed, layer_effects(gradient)


def _ablations(
    model: TokenFormerForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    ids: torch.Tensor,
    entries: Sequence[dict[str, Any]],
    logits: torch.Tensor,
    focus: int,
    target_id: int,
) -> tuple[dict[str, Any], dict[str, float]]:
    """What the model predicts without each token, and the change of the target's logit, by address."""
    if not entries:
        return {}, {}
    shown, effects = {}, {}
    at_once = max(1, _POSITIONS_AT_ONCE // ids.shape[1])
    for start in range(0, len(entries), at_once):
        addresses = [entry["address"] for entry in entries[start : start + at_once]]
        for address, row in zip(addresses, measured_ablation(model, ids, addresses), strict=True):
            places = [{"predictions": predictions(tokenizer, place, LISTED)} for place in row]
            shown[address] = {"loss": _mean(token_losses(row[None], ids)[0]), "positions": places}
            effects[address] = short((row[focus, target_id] - logits[0, focus, target_id]).item())
    return shown, effects


def _positions(
    found: Trace, tokenizer: PreTrainedTokenizerFast, targets: torch.Tensor, num_tokens: int
) -> list[dict[str, Any]]:
    # Of each position the contributions are to the logit of its own target.
    directions = found.readout.centred(found.readout.head[targets]) / found.sigma[0]
    layers = [_layer(name, layer, directions, num_tokens) for name, layer in found.layers.items()]
    return [
        {
            "predictions": predictions(tokenizer, logits, LISTED),
            "layers": [layer[place] for layer in layers],
        }
        for place, logits in enumerate(found.logits[0].detach())
    ]


def _layer(name: str, layer: LayerTrace, directions: torch.Tensor, num_tokens: int) -> list[dict[str, Any]]:
    """Of each position, the shares of the segments and the strongest tokens."""
    weights = torch.cat([w[0] for w in layer.weights.values()], dim=-1)
    values = torch.cat(list(layer.values.values()))
    addresses = [TokenAddress(name, segment, i) for segment, v in layer.values.items() for i in range(len(v))]
    strongest = (weights.abs() * values.norm(dim=-1)).topk(min(num_tokens, len(values))).indices
    chosen = weights.gather(-1, strongest)
    direct = None
    if layer.kind in WRITING:
        direct = (chosen * torch.einsum("tkd,td->tk", values[strongest], directions)).tolist()
    shares = shares_of({segment: w[0] @ layer.values[segment] for segment, w in layer.weights.items()})
    spread = {segment: share.tolist() for segment, share in shares.items()}
    return [
        {
            "shares": {segment: short(share[t]) for segment, share in spread.items()},
            "tokens": [
                {
                    "address": str(addresses[i]),
                    "weight": short(weight),
                    "direct": None if direct is None else short(direct[t][rank]),
                }
                for rank, (i, weight) in enumerate(zip(indices, row, strict=True))
            ],
        }
        for t, (indices, row) in enumerate(zip(strongest.tolist(), chosen.tolist(), strict=True))
    ]


def _changed(
    model: TokenFormerForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    ids: torch.Tensor,
    changes: list[Change],
    focus: int,
) -> dict[str, Any] | None:
    if not changes:
        return None
    with intervene(model, changes):
        logits = model(ids, use_cache=False).logits
    return {
        "changes": [str(change) for change in changes],
        "predictions": predictions(tokenizer, logits[0, focus], LISTED),
        "loss": _mean(token_losses(logits, ids)[0]),
    }


def _shown(attribution: list[dict[str, Any]], positions: list[dict[str, Any]], focus: int) -> list[str]:
    """All addresses in the payload, the most important first: those of the list, of the focus, then by rank."""
    found = dict.fromkeys(entry["address"] for entry in attribution)
    found |= dict.fromkeys(t["address"] for layer in positions[focus]["layers"] for t in layer["tokens"])
    ranked = [
        (rank, token["address"])
        for place in positions
        for layer in place["layers"]
        for rank, token in enumerate(layer["tokens"])
    ]
    found |= dict.fromkeys(address for _, address in sorted(ranked, key=lambda pair: pair[0]))
    return list(found)


def _mean(losses: torch.Tensor) -> float | None:
    """None of a text of one token, in which nothing is predicted."""
    return losses.mean().item() if len(losses) else None
