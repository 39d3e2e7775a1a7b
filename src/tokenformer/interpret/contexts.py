"""The text around a position of a row, from token ids."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

_UNDECODED = "\N{REPLACEMENT CHARACTER}"
# Tokens may straddle characters, each ending within the next; beyond so many the bytes are none of UTF-8.
_LONGEST_RUN = 16
# Tokens shown on either side.
WINDOW = 24


def pieces(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined, they are the text of all.

    A byte-level tokenizer may spread one character over several tokens. The last of these has the character then, and
    those before it are empty. Bytes that never become a character are shown as U+FFFD.

    Args:
        tokenizer: that made the ids.
        ids: T token ids.

    Returns:
        T strings.
    """
    found = [""] * len(ids)
    start = 0  # of the tokens that have no text yet
    for end in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids, start, end)
        if text.endswith(_UNDECODED) and end - start < _LONGEST_RUN and end < len(ids):
            continue
        own = _decode(tokenizer, ids, end - 1, end)
        if end - start > 1 and _UNDECODED in text and _UNDECODED not in own and text.endswith(own):
            # The bytes before it were no character: they are not this token's.
            found[end - 2], text = text[: len(text) - len(own)], own
        found[end - 1] = text
        start = end
    return found


def context(parts: Sequence[str], position: int, window: int = WINDOW) -> dict[str, str]:
    """What `pieces` of a row say `before`, at (`token`) and `after` a position.

    Where the token is the beginning of a character that is spread over several, the character is shown.

    Args:
        parts: of the row.
        position: in it.
        window: so many tokens on each side.
    """
    end = position + 1
    while not parts[end - 1] and end < len(parts):
        end += 1
    return {
        "before": "".join(parts[max(0, position - window) : position]),
        "token": "".join(parts[position:end]),
        "after": "".join(parts[end : end + window]),
    }


def _decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], start: int, end: int) -> str:
    """The text of ids[start:end] where they stand: some decoders take a space off the beginning of a text."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    whole = str(tokenizer.decode(list(ids[max(0, start - 1) : end]), **options))
    if start == 0:
        return whole
    before = str(tokenizer.decode(list(ids[start - 1 : start]), **options))
    if whole.startswith(before) and _UNDECODED not in before:
        return whole[len(before) :]
    return str(tokenizer.decode(list(ids[start:end]), **options))
