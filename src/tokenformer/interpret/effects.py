"""What changes to parameter tokens do to the predictions of a language model on a text."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tokenformer.errors import UserError
from tokenformer.interpret.attribution import token_losses
from tokenformer.interpret.intervention import Change, intervene
from tokenformer.interpret.text import predictions, text_ids


@torch.no_grad()
def change_effect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    changes: Iterable[Change],
    text: str,
    *,
    position: int | None = None,
    count: int = 10,
) -> dict[str, Any]:
    """Next-token distribution and loss on `text`, before and after `changes`.

    Args:
        model: a language model, in the mode it is in.
        tokenizer: of the model.
        changes: to make.
        text: that the model reads.
        position: of the token behind which predictions are given; the last one if not given, and -1 too.
        count: predictions to give.

    Returns:
        - `changes`: as text;
        - `position`: of the token behind which the predictions are, from 0;
        - `before` and `after`: the likeliest next tokens, `id`, `piece` and `probability` of each;
        - `divergence`: Kullback-Leibler, in nats, of the distribution after from the one before;
        - `loss_before` and `loss_after`: mean nats of the tokens of the text but the first; None if there is only one;
        - `perplexity_before` and `perplexity_after`: exp of these.

    Raises:
        UserError: as `intervene`; an empty or overlong text, or a position outside of it.
    """
    ids = text_ids(model, tokenizer, text)
    length = ids.shape[1]
    place = length - 1 if position is None else position + length if position < 0 else position
    if not 0 <= place < length:
        raise UserError(f"position {position} is outside of the text: it has the tokens 0 to {length - 1}")
    changes = list(changes)
    with intervene(model, changes):
        after = model(input_ids=ids, use_cache=False).logits
    before = model(input_ids=ids, use_cache=False).logits
    result: dict[str, Any] = {"changes": [str(change) for change in changes], "position": place}
    logs = [torch.log_softmax(logits[0, place].double(), -1) for logits in (before, after)]
    for when, logits in (("before", before), ("after", after)):
        result[when] = predictions(tokenizer, logits[0, place], count)
    result["divergence"] = (logs[0].exp() * (logs[0] - logs[1])).sum().item()
    losses = {
        when: token_losses(logits, ids).mean().item() if length > 1 else None
        for when, logits in (("before", before), ("after", after))
    }
    for when, loss in losses.items():
        result[f"loss_{when}"] = loss
        result[f"perplexity_{when}"] = None if loss is None else math.exp(min(loss, 700.0))
    return result
