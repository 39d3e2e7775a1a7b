"""What a model would do without a parameter token, or with it louder, or with two of them exchanged.

    with intervene(model, [Off("3.ffn/base/17"), Scale("3.ffn/grown", 0.5)]):
        model(input_ids)

No parameter is written: what the layers compute with is changed while the context lasts.

Shapes: B rows, T positions, V vocabulary, N parameter tokens of a segment, D_out channels.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tokenformer.errors import UserError
from tokenformer.evaluation.perplexity import evaluate_perplexity
from tokenformer.interpret.addresses import TokenAddress, find_segment, find_token, pattention_layers, segment_sizes
from tokenformer.interpret.taps import Call, Edit, tapped
from tokenformer.pattention import Pattention

Address = TokenAddress | str


@dataclass(frozen=True)
class Off:
    """A token, or all tokens of a segment, do not exist: they add nothing to norm or output, as if deleted.

    Attributes:
        address: of a token (`layer/segment/index`) or of a segment (`layer/segment`).
    """

    address: Address

    def __str__(self) -> str:
        """As `parse_change` reads it."""
        return f"off {self.address}"


@dataclass(frozen=True)
class Scale:
    """A token, or all tokens of a segment, say what they say so many times as loudly; the norm stays.

    Attributes:
        address: of a token or of a segment.
        factor: of the values.
    """

    address: Address
    factor: float

    def __str__(self) -> str:
        """As `parse_change` reads it."""
        return f"scale {self.address} {self.factor!r}"


@dataclass(frozen=True)
class Swap:
    """Two tokens of a layer exchange their values: each is used where it was, and says what the other one said.

    Attributes:
        first: address of a token.
        second: address of another one of the same layer, of any of its segments.
    """

    first: Address
    second: Address

    def __str__(self) -> str:
        """As `parse_change` reads it."""
        return f"swap {self.first} {self.second}"


Change = Off | Scale | Swap


def parse_change(text: str, model: nn.Module) -> Change:
    """The change that `off ADDRESS`, `scale ADDRESS FACTOR` or `swap ADDRESS ADDRESS` names, with whole addresses.

    Raises:
        UserError: none of these, an unknown address, a factor that is no finite number, tokens of two layers.
    """
    match text.split():
        case ["off", address]:
            change: Change = Off(address)
        case ["scale", address, factor]:
            try:
                change = Scale(address, float(factor))
            except ValueError as error:
                raise UserError(f"'{factor}' is no number: write scale ADDRESS FACTOR, such as 0.5") from error
        case ["swap", first, second]:
            change = Swap(first, second)
        case _:
            raise UserError(f"'{text}' is no change: write off ADDRESS, scale ADDRESS FACTOR or swap ADDRESS ADDRESS")
    return _resolve(change, model)


@contextmanager
def intervene(model: nn.Module, changes: Iterable[Change]) -> Iterator[None]:
    """Run `model` with `changes`, as long as the context lasts.

    They hold one after the other: what is scaled and then swapped is loud in its new place. Contexts can be nested; the
    changes of the inner one come behind those of the outer. Gradients flow through them, to parameters too. A token
    that takes no part (by a `limit`) is not there to be switched off or scaled, and cannot be swapped.

    Args:
        model: a TokenFormer, or any module that contains Pattention layers.
        changes: to make; none changes nothing.

    Raises:
        UserError: no Pattention layers, or a sparse model; an unknown address; a factor that is not finite; a swap of
            tokens of two layers.
    """
    layers = pattention_layers(model)
    by_layer: dict[str, list[Change]] = {}
    for change in changes:
        resolved = _resolve(change, model)
        layer, _, _ = _place(resolved.first if isinstance(resolved, Swap) else resolved.address)
        by_layer.setdefault(layer, []).append(resolved)
    edits: dict[Pattention, Edit] = {layers[path]: partial(_apply, found) for path, found in by_layer.items()}
    with tapped(edits=edits):
        yield


@torch.no_grad()
def measured_ablation(
    model: nn.Module, inputs: torch.Tensor, tokens: Sequence[Address], *, batch_size: int = 8
) -> torch.Tensor:
    """Logits (len(tokens), T, V) with each of the tokens switched off by itself, at all positions.

    As `Off`, one after the other; several at once are computed as rows of a batch. Of an image classifier they are
    (len(tokens), C).

    Args:
        model: gives `.logits`, in the mode it is in.
        inputs: token ids (1, T); pixel values (1, channels, H, W) for an image classifier.
        tokens: addresses.
        batch_size: rows at a time.

    Raises:
        UserError: more rows than one, a batch size below 1, no token, or an unknown one.
    """
    is_text = not inputs.is_floating_point()
    if inputs.dim() != (2 if is_text else 4) or len(inputs) != 1:
        wanted = "token ids (1, T)" if is_text else "pixel values (1, channels, H, W)"
        raise UserError(f"inputs must be one row of {wanted}, got shape {tuple(inputs.shape)}")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    if not tokens:
        raise UserError("no token to switch off: give at least one address")
    layers = pattention_layers(model)
    found = [find_token(model, token) for token in tokens]
    logits = []
    for start in range(0, len(found), batch_size):
        rows = found[start : start + batch_size]
        masks: dict[str, dict[str, torch.Tensor]] = {}
        for row, token in enumerate(rows):
            size = segment_sizes(model, token.layer)[token.segment]
            # One position, which stands for all.
            everywhere = torch.ones(len(rows), 1, size, dtype=torch.bool)
            mask = masks.setdefault(token.layer, {}).setdefault(token.segment, everywhere)
            mask[row, :, token.index] = False
        edits: dict[Pattention, Edit] = {layers[path]: partial(hide, hidden) for path, hidden in masks.items()}
        with tapped(edits=edits):
            batch = inputs.expand(len(rows), *inputs.shape[1:])
            outputs = model(input_ids=batch, use_cache=False) if is_text else model(pixel_values=batch)
            logits.append(outputs.logits)
    return torch.cat(logits)


def perplexity_change(
    model: nn.Module, changes: Iterable[Change], rows: Sequence[Mapping[str, Any]] | torch.Tensor, batch_size: int = 16
) -> dict[str, float]:
    """What changes do to the loss of a language model on rows of token ids.

    Args:
        model: gives `.logits`; its mode of training or evaluation is put back.
        changes: to make.
        rows: (B, T) ids, or `{"input_ids": T ids}` each, such as `PreparedData.held_out`.
        batch_size: rows at a time.

    Returns:
        `loss_before` and `loss_after` in nats per token, `perplexity_before` and `perplexity_after`, and `tokens`, the
        number of predicted tokens.

    Raises:
        UserError: as `intervene`; no rows, or rows of one token, in which there is nothing to predict.
    """
    if isinstance(rows, torch.Tensor):
        rows = [{"input_ids": row} for row in rows.tolist()]
    if len(rows) == 0 or len(rows[0]["input_ids"]) < 2:
        raise UserError("nothing to predict: give rows of at least two tokens")
    found = {}
    with intervene(model, changes):  # first, so that a wrong change is known at once
        found["after"] = evaluate_perplexity(model, rows, tokens_per_byte=1.0, batch_size=batch_size)  # type: ignore[arg-type]
    found["before"] = evaluate_perplexity(model, rows, tokens_per_byte=1.0, batch_size=batch_size)  # type: ignore[arg-type]
    figures = {f"{name}_{when}": found[when][name] for name in ("loss", "perplexity") for when in ("before", "after")}
    return {**figures, "tokens": found["before"]["tokens"]}


def _resolve(change: Change, model: nn.Module) -> Change:
    """The change with whole addresses."""
    if isinstance(change, Swap):
        first, second = find_token(model, change.first), find_token(model, change.second)
        if first.layer != second.layer:
            raise UserError(f"{first} and {second} are in two layers: swap tokens of one layer")
        return Swap(first, second)
    address: Address = change.address
    if isinstance(address, TokenAddress) or address.count("/") > 1:
        address = find_token(model, address)
    else:
        address = "/".join(find_segment(model, address))
    if isinstance(change, Off):
        return Off(address)
    if not math.isfinite(change.factor):
        raise UserError(f"the factor of {address} must be finite, got {change.factor}")
    return Scale(address, float(change.factor))


def _place(address: Address) -> tuple[str, str, int | None]:
    """Layer, segment and index of a whole address; no index for all tokens of the segment."""
    if isinstance(address, TokenAddress):
        return address.layer, address.segment, address.index
    layer, _, segment = address.rpartition("/")
    return layer, segment, None


def _apply(changes: Sequence[Change], call: Call) -> None:
    for change in changes:
        if isinstance(change, Swap):
            _swap(change, call)
            continue
        _, segment, index = _place(change.address)
        if segment not in call.tokens:
            continue  # an adapter that is switched off
        key, value = call.tokens[segment]
        if index is not None and index >= len(key):
            continue
        places = slice(None) if index is None else index
        if isinstance(change, Off):
            mask = torch.ones(len(key), dtype=torch.bool, device=key.device)
            mask[places] = False
            hide({segment: mask}, call)
        else:
            factors = torch.ones(len(value), 1, dtype=value.dtype, device=value.device)
            factors[places] = change.factor
            call.tokens[segment] = key, value * factors


def _swap(change: Swap, call: Call) -> None:
    places = [_place(address)[1:] for address in (change.first, change.second)]
    taking_part = [
        (segment, index)
        for segment, index in places
        if segment in call.tokens and index is not None and index < len(call.tokens[segment][0])
    ]
    if len(taking_part) < 2:
        raise UserError(f"'{change}' is not possible: one of the tokens takes no part (limit)")
    first, second = taking_part
    # Both before either is put in place.
    values = [call.tokens[segment][1][index] for segment, index in (second, first)]
    for (segment, index), value in zip((first, second), values, strict=True):
        key, old = call.tokens[segment]
        call.tokens[segment] = key, torch.cat((old[:index], value[None], old[index + 1 :]))


def hide(masks: Mapping[str, torch.Tensor], call: Call) -> None:
    """Make tokens invisible where a mask, broadcastable to (..., N), is False."""
    visible = dict(call.visible or {})
    for segment, mask in masks.items():
        if segment not in call.tokens:
            continue
        size = len(call.tokens[segment][0])
        mask = mask[..., :size].to(call.x.device)
        visible[segment] = mask & visible[segment][..., :size] if segment in visible else mask
    call.visible = visible
