"""What each parameter token contributes to a logit or a loss: directly, and to first order through all later layers.

**Direct.** With o_l the outputs of the `output` and `ffn` layers, the residual stream before the final norm is
r = embedding + sum_l o_l, and o_l = sum_i w_i v_i. The final norm is linear in r once its sigma(r) is taken as what it
was, so that a logit is exactly

    logit_y = <e, d> / sigma + sum_l sum_i w_i <v_i, d> / sigma + <b, E_y>,    <v, d> = <E_y, g * (v - mean v)>

with g and b the final norm's weight and bias, and E_y the row of the head (whose own bias joins the last term).

**Gradient.** w_i(s) <v_i, d logit / d o(s)>, summed over the positions s: the derivative of the logit with respect to
a factor on the token's value. Minus this is the first-order estimate of what removing the token does; that the norm of
the scores changes too when a token is removed is not in it.

Both are positive where the token raises the logit. Shapes: B rows, T positions, D channels, N parameter tokens of a
segment, V vocabulary (or classes).
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tokenformer.errors import UserError
from tokenformer.interpret.addresses import pattention_layers
from tokenformer.interpret.capture import LayerRecord, capture
from tokenformer.interpret.lens import WRITING, Readout, readout_of
from tokenformer.interpret.taps import Call, tapped

# By layer and segment.
Contributions = dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class DirectContributions:
    """The terms of one logit, which add up to it.

    Attributes:
        tokens: of each token of the `output` and `ffn` layers, by layer and segment, (N,) each.
        embedding: of what enters the first block.
        bias: of the final norm's bias, and of the head's if it has one.
        logit: as the model gives it.
    """

    tokens: Contributions
    embedding: float
    bias: float
    logit: float


@dataclass(frozen=True)
class LayerTrace:
    """One layer in a pass.

    Attributes:
        kind: `qkv`, `output` or `ffn`.
        weights: by segment, (B, T, N).
        values: by segment, (N, D).
        output: (B, T, D), part of the graph.
    """

    kind: str
    weights: dict[str, torch.Tensor]
    values: dict[str, torch.Tensor]
    output: torch.Tensor


@dataclass(frozen=True)
class Trace:
    """A forward pass with all that contributions are made of.

    Attributes:
        logits: (B, T, V), or (B, V) of a classifier; part of the graph.
        layers: by path, in the order in which they ran.
        start: what enters the first block, (B, T, D).
        residual: what enters the final norm, (B, T, D).
        readout: how it becomes logits.
        pooling: of a classifier, `cls` or `mean`; None of a language model.
    """

    logits: torch.Tensor
    layers: dict[str, LayerTrace]
    start: torch.Tensor
    residual: torch.Tensor
    readout: Readout
    pooling: str | None

    @property
    def sigma(self) -> torch.Tensor:
        """By what the final norm divides, (B, T, 1)."""
        return (self.residual.var(-1, correction=0, keepdim=True) + self.readout.norm.eps).sqrt()

    def direct(self, position: int | None, target_id: int) -> DirectContributions:
        """The terms of a logit of the first row; `position` is None for a classifier.

        Raises:
            UserError: no such position or id.
        """
        logit = self._logit(position, target_id)
        row, places = self.readout.head[target_id], torch.zeros_like(self.sigma)
        if self.pooling == "mean":
            places[0] = 1 / places.shape[1]
        else:
            places[0, 0 if position is None else position] = 1
        directions = self.readout.centred(row) * (places / self.sigma)
        bias = row @ self.readout.norm.bias
        if self.readout.bias is not None:
            bias = bias + self.readout.bias[target_id]
        tokens = {layer: {name: c[0] for name, c in found.items()} for layer, found in self.along(directions).items()}
        return DirectContributions(tokens, (self.start * directions).sum().item(), bias.item(), logit.item())

    def along(self, directions: torch.Tensor) -> Contributions:
        """w_i <v_i, d> summed over positions, (B, N), of `output` and `ffn` tokens; directions d are (B, T, D)."""
        found = {name: layer for name, layer in self.layers.items() if layer.kind in WRITING}
        return {name: _summed(layer, directions) for name, layer in found.items()}

    def direct_loss(self, losses: torch.Tensor) -> Contributions:
        """Direct contributions (B, N) to the loss of each row, to first order in the logits; losses are (B,)."""
        (slopes,) = torch.autograd.grad(losses.sum(), self.logits, retain_graph=True)
        return self.along(self.readout.direction(slopes) / self.sigma)

    def gradient(self, objective: torch.Tensor, *, by_position: bool = False) -> Contributions:
        """First-order contributions (B, N) of all tokens to a sum over rows; (B, T, N) of each source position.

        Rows do not see each other, so that each row has those to its own part of the sum. The graph is kept.
        """
        outputs = [layer.output for layer in self.layers.values()]
        slopes = torch.autograd.grad(objective.sum(), outputs, retain_graph=True, allow_unused=True)
        found = {}
        for (name, layer), slope in zip(self.layers.items(), slopes, strict=True):
            # Of the last position of the last block, say, nothing depends on query and key.
            slope = torch.zeros_like(layer.output) if slope is None else slope
            make = _at_positions if by_position else _summed
            found[name] = make(layer, slope)
        return found

    def _logit(self, position: int | None, target_id: int) -> torch.Tensor:
        if not 0 <= target_id < self.logits.shape[-1]:
            raise UserError(f"no id {target_id}: the model has 0 to {self.logits.shape[-1] - 1}")
        if self.pooling is not None:
            return self.logits[0, target_id]
        if position is None or not 0 <= position < self.logits.shape[1]:
            raise UserError(f"no position {position}: the text has 0 to {self.logits.shape[1] - 1}")
        return self.logits[0, position, target_id]


def trace(model: nn.Module, inputs: torch.Tensor) -> Trace:
    """Run a TokenFormer once and keep what contributions are made of.

    Changes by `intervene` and adapters are in it, for the values are those that the layers computed with.

    Args:
        model: in evaluation mode, of language or of vision.
        inputs: token ids (B, T), or the pixel values (B, channels, H, W) of a classifier.

    Raises:
        UserError: a model without final norm and head, without Pattention layers, or a sparse one.
    """
    layers, readout = pattention_layers(model), readout_of(model)
    backbone: Any = model.base_model
    is_text = not inputs.is_floating_point()
    outputs: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, torch.Tensor]] = {}
    stream: dict[str, torch.Tensor] = {}

    def see(name: str, call: Call, output: torch.Tensor) -> None:
        outputs[name] = output
        values[name] = {segment: value.detach() for segment, (_, value) in call.tokens.items() if len(value)}

    def keep(name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        stream[name] = args[0].detach()

    def begin(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        # The graph begins here, whether parameters are frozen or not.
        return output.detach().requires_grad_()

    embeddings = backbone.get_input_embeddings() if is_text else backbone.embeddings
    seeing = {layer: partial(see, name) for name, layer in layers.items()}
    with ExitStack() as stack:
        for handle in (
            embeddings.register_forward_hook(begin),
            backbone.layers[0].register_forward_pre_hook(partial(keep, "start")),
            backbone.norm.register_forward_pre_hook(partial(keep, "residual")),
        ):
            stack.callback(handle.remove)
        seen = stack.enter_context(capture(model))
        stack.enter_context(tapped(seeing=seeing))
        stack.enter_context(torch.enable_grad())
        logits = model(inputs, use_cache=False).logits if is_text else model(inputs).logits
    traced = {
        name: LayerTrace(
            record.kind,
            {segment: part.weights for segment, part in record.segments.items() if part.weights is not None},
            values[name],
            outputs[name],
        )
        for name, record in seen.items()
    }
    pooling = None if is_text else backbone.config.pooling
    return Trace(logits, traced, stream["start"], stream["residual"], readout, pooling)


def direct_contributions(
    model: nn.Module, input_ids: torch.Tensor, position: int | None, target_id: int
) -> DirectContributions:
    """The exact terms of a logit: tokens of `output` and `ffn` layers at that position, embedding and bias.

    Args:
        model: in evaluation mode.
        input_ids: (1, T); pixel values (1, channels, H, W) for a classifier.
        position: whose logit; None for a classifier.
        target_id: of the logit, or number of the class.

    Raises:
        UserError: no such position or id, more than one row, or a model that `trace` refuses.
    """
    _one_row(input_ids)
    return trace(model, input_ids).direct(position, target_id)


def gradient_contributions(
    model: nn.Module, input_ids: torch.Tensor, position: int | None, target_id: int, *, by_position: bool = False
) -> Contributions:
    """First-order contributions of every token to a logit, (N,) by layer and segment; arguments as above.

    With `by_position`, (T, N): of each source position by itself.

    Raises:
        UserError: as `direct_contributions`.
    """
    _one_row(input_ids)
    found = trace(model, input_ids)
    parts = found.gradient(found._logit(position, target_id), by_position=by_position)
    return {layer: {name: c[0] for name, c in segments.items()} for layer, segments in parts.items()}


def segment_shares(record: LayerRecord) -> dict[str, torch.Tensor]:
    """The share of each segment in a layer's output o, <o_s, o> / ||o||^2, as (...) by name.

    They add up to 1 and may be negative: of a segment that speaks against the rest. Of an output of zeros they are 0.

    Args:
        record: of `capture(model, outputs=True)`, with all segments.

    Raises:
        UserError: the record lacks the outputs of segments.
    """
    outputs = {name: segment.output for name, segment in record.segments.items()}
    if any(output is None for output in outputs.values()):
        raise UserError(f"{record.layer} was captured without outputs: use capture(model, outputs=True)")
    return shares_of({name: output for name, output in outputs.items() if output is not None})


def shares_of(outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`segment_shares` of the outputs (..., D) of all segments."""
    whole: torch.Tensor = sum(outputs.values())  # type: ignore[assignment]  # never empty: some segment takes part
    size = whole.square().sum(-1)
    size = torch.where(size > 0, size, torch.ones_like(size))
    return {name: (output * whole).sum(-1) / size for name, output in outputs.items()}


def token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Nats (B, T - 1) of each token of rows (B, T) but the first, given those before it, by logits (B, T, V)."""
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(wide.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1)


def row_losses(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss (B,) in nats of each row (B, T), part of the graph of the logits."""
    return token_losses(logits, input_ids).mean(-1)


def _at_positions(layer: LayerTrace, directions: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: w * (directions @ layer.values[name].T) for name, w in layer.weights.items()}


def _summed(layer: LayerTrace, directions: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: c.sum(1) for name, c in _at_positions(layer, directions).items()}


def _one_row(input_ids: torch.Tensor) -> None:
    if len(input_ids) != 1:
        raise UserError(f"give one row, (1, T), got shape {tuple(input_ids.shape)}")
