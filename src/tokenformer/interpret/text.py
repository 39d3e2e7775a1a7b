"""Text for a model that is looked into, and what it predicts, in words."""

from functools import cache, partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tokenformer.errors import UserError
from tokenformer.interpret.payload import LISTED, likeliest

_REPLACEMENT = "\ufffd"


@cache
def _bytes_by_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def piece(tokenizer: PreTrainedTokenizerFast, token_id: int) -> str:
    r"""The text of one token of the vocabulary; bytes that are no whole character as `\xe6\x97`.

    An id that only the embedding has, as padding, is `<id 317>`.
    """
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token is None:
        return f"<id {token_id}>"
    text = str(tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    known = _bytes_by_character()
    if _REPLACEMENT in text and all(character in known for character in token):
        return "".join(f"\\x{known[character]:02x}" for character in token)
    return text


def text_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """Token ids (1, T) of a text, on the device of the model.

    Raises:
        UserError: an empty text, or more tokens than the model takes.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    if not ids:
        raise UserError("the text is empty: give at least one character")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and len(ids) > longest:
        raise UserError(f"the text has {len(ids)} tokens, and the model takes {longest}: give a shorter text")
    return torch.tensor([ids], device=model.device)


def predictions(tokenizer: PreTrainedTokenizerFast, logits: torch.Tensor, count: int = LISTED) -> list[dict[str, Any]]:
    """The likeliest next tokens, by the logits (V,) of a position: `id`, `piece` and `probability` of each."""
    return likeliest(logits, partial(piece, tokenizer), count)
