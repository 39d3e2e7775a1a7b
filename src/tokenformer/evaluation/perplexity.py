"""Perplexity of a causal language model on packed rows of token ids."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def evaluate_perplexity(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    *,
    tokens_per_byte: float,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Mean next-token loss over rows, each read from its first token on.

    Args:
        model: gives `.logits` (B, T, V) for `input_ids` (B, T); called as it is, in the precision around the call.
        rows: `{"input_ids": T ids}` each, all of one length, such as `PreparedData.held_out`.
        tokens_per_byte: of the text behind the rows, end-of-text tokens counted.
        batch_size: rows at a time.
        on_batch: called with the number of rows done after each batch.

    Returns:
        `loss` in nats per token (summed in float64), `perplexity` exp(loss), `bits_per_byte`
        loss / ln 2 * tokens_per_byte, and `tokens`, the number of predicted tokens.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    try:
        for start in range(0, len(rows), batch_size):
            batch = [rows[i]["input_ids"] for i in range(start, min(start + batch_size, len(rows)))]
            ids = torch.tensor(batch, dtype=torch.long, device=device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            total += losses.double().sum().item()
            count += losses.numel()
            if on_batch is not None:
                on_batch(min(start + batch_size, len(rows)))
    finally:
        model.train(was_training)
    return perplexity_figures(total, count, tokens_per_byte)


def perplexity_figures(total: float, count: int, tokens_per_byte: float) -> dict[str, float]:
    """What `evaluate_perplexity` returns, from the summed loss in nats of `count` predicted tokens."""
    loss = total / count
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) * tokens_per_byte,
        "tokens": count,
    }


def evenly_spaced(rows: Sequence[Any], count: int | None) -> Sequence[Any]:
    """`count` of the rows at equal distances, the first among them; all of them if None or not fewer."""
    if count is None or count >= len(rows):
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]
