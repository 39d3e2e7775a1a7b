"""Perplexity with a sliding window: what a model thinks of every token of documents of any length.

A document is read behind a start token, the one that separates documents in training, so that its first token is
predicted too; the start token itself is not. Documents do not see each other. With a context of C and a stride of S
tokens, the window reads C tokens at once and moves on by S. In numbers: let the start token be 0 and the tokens of the
document 1, 2, 3 ...; then token i is predicted from the tokens S * ceil((i - C) / S) to i - 1, and from 0 to i - 1 if
i <= C. So each is predicted exactly once, from all that is before it near the beginning, and later from at least
C - S + 1 and at most C tokens.

S = C cuts documents into disjoint windows and is fastest; S = 1 gives every token the longest context and is slowest.
These are the windows of the recipe in the documentation of transformers, whose `max_length` is C + 1: the last token of
a window is predicted, but need not be read.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from tokenformer.errors import UserError

_DEFAULT_CONTEXT = 2048
_CPU_BUDGET = 2 << 30
_IGNORED = -100


class Window(NamedTuple):
    """What the model reads at once, and for which of it the next token counts.

    Attributes:
        document: index of the document.
        start: position of the first input, where 0 is the start token.
        stop: position behind the last input.
        scored: so many of the last inputs predict a token that no window before predicted.
    """

    document: int
    start: int
    stop: int
    scored: int


def windows(document: int, length: int, context: int, stride: int) -> Iterator[Window]:
    """The windows over a document of `length` tokens; none over an empty one."""
    start, stop = 0, min(context, length)
    if length:
        yield Window(document, start, stop, scored=stop)
    while stop < length:
        start += stride
        end = min(start + context, length)
        yield Window(document, start, end, scored=end - stop)
        stop = end


def choose_window(model: PreTrainedModel, context: int | None, stride: int | None) -> tuple[int, int]:
    """The context and stride to use: as given, else the model's context but at most 2048, and half of the context.

    Raises:
        UserError: one is not positive, the stride is longer than the context, or the context than the model's.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        context = min(longest or _DEFAULT_CONTEXT, _DEFAULT_CONTEXT)
    if context < 1:
        raise UserError(f"context must be at least 1, got {context}")
    if longest is not None and context > longest:
        raise UserError(f"context {context} is longer than the {longest} tokens the model takes: use at most {longest}")
    if stride is None:
        stride = max(context // 2, 1)
    if stride < 1:
        raise UserError(f"stride must be at least 1, got {stride}")
    if stride > context:
        raise UserError(f"stride {stride} is longer than the context of {context}, so tokens would be left out")
    return context, stride


def rows_that_fit(model: PreTrainedModel, length: int) -> int:
    """How many sequences of `length` tokens to give a model at once, judged by the memory of their logits.

    Three float32 numbers per logit (the logits, their softmax, a copy) have to fit into 2 GiB, on a GPU into a quarter
    of its free memory; at most 64 rows.
    """
    on_gpu = model.device.type == "cuda"
    budget = torch.cuda.mem_get_info(model.device)[0] // 4 if on_gpu else _CPU_BUDGET
    return int(max(1, min(64, budget // (12 * length * model.config.get_text_config().vocab_size))))


@torch.no_grad()
def score_documents(
    model: PreTrainedModel,
    documents: Sequence[np.ndarray],
    *,
    start_id: int,
    context: int,
    stride: int,
    batch_size: int | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> float:
    """Summed loss of all tokens of all documents, as the module describes it.

    Args:
        model: a causal language model of transformers; its mode of training or evaluation is put back.
        documents: ids of each, without start token; they may be mapped from disk.
        start_id: of the token that stands before each document.
        context: tokens the model reads at once (C).
        stride: tokens the window moves by (S).
        batch_size: windows at a time; as many as `rows_that_fit` if not given.
        on_tokens: called after each batch with the tokens it predicted.

    Returns:
        Nats, added in float64; the mean per token is that divided by the number of all ids.

    Raises:
        UserError: the loss is not finite.
    """
    todo = [w for i, ids in enumerate(documents) for w in windows(i, len(ids), context, stride)]
    # Windows of one shape together: little padding, and logits only where they are needed. The largest batch is first,
    # so that memory runs out at once or never.
    todo.sort(key=lambda window: (window.stop - window.start, window.scored), reverse=True)
    rows = batch_size or rows_that_fit(model, context)
    keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
    was_training = model.training
    model.eval()
    total = 0.0
    try:
        for first in range(0, len(todo), rows):
            batch = todo[first : first + rows]
            inputs, targets = _rows(batch, documents, start_id)
            ids = torch.from_numpy(inputs).to(model.device)
            if keeps_logits:
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=targets.shape[1]).logits
            else:
                logits = model(input_ids=ids, use_cache=False).logits[:, -targets.shape[1] :]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1),
                torch.from_numpy(targets).to(model.device).flatten(),
                ignore_index=_IGNORED,
                reduction="none",
            )
            total += losses.cpu().double().sum().item()
            if not math.isfinite(total):
                raise UserError(
                    f"the model's loss is not finite in {str(model.dtype).removeprefix('torch.')}: its weights are "
                    "damaged, or their dtype is too narrow (try float32)"
                )
            if on_tokens is not None:
                on_tokens(sum(window.scored for window in batch))
    finally:
        model.train(was_training)
    return total


def _rows(batch: list[Window], documents: Sequence[np.ndarray], start_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (rows, longest), padded at the end, where a causal model does not look, and targets (rows, kept) of the
    last positions, -100 where none counts.
    """
    longest = max(window.stop - window.start for window in batch)
    kept = longest - min(window.stop - window.start - window.scored for window in batch)
    inputs = np.zeros((len(batch), longest), dtype=np.int64)
    targets = np.full((len(batch), longest), _IGNORED, dtype=np.int64)
    for row, window in enumerate(batch):
        ids, size = documents[window.document], window.stop - window.start
        if window.start == 0:
            inputs[row, 0], inputs[row, 1:size] = start_id, ids[: size - 1]
        else:
            inputs[row, :size] = ids[window.start - 1 : window.stop - 1]
        targets[row, size - window.scored : size] = ids[window.stop - window.scored : window.stop]
    return inputs, targets[:, longest - kept :]
