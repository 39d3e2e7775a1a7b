"""Text to fit a converted model on: read from a file, or written by the Transformer itself."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tokenformer.convert.pretrained import Pretrained
from tokenformer.errors import UserError
from tokenformer.models.loading import load_tokenizer

# Tokens in a row, where the Transformer takes so many.
ROW = 512
_ROWS_AT_ONCE = 16


def read_rows(file: Path, folder: Path, pretrained: Pretrained, num_tokens: int) -> torch.Tensor:
    """The first `num_tokens` tokens of a text file as rows (B, T), by the tokenizer in `folder`.

    Raises:
        UserError: no such file, not UTF-8, less than two rows of text; no tokenizer in the folder.
    """
    length = _row_length(pretrained)
    try:
        # No token stands for more than some ten characters on average.
        with file.open(encoding="utf-8") as opened:
            text = opened.read(16 * max(num_tokens, 2 * length))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"calibration: cannot read {file} ({reason}): give a text file") from error
    tokenizer = load_tokenizer(folder, vocab_size=len(pretrained.embedding))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < 2 * length:
        raise UserError(
            f"calibration: {file} holds {len(ids)} tokens, at least {2 * length} are needed: give more text"
        )
    count = max(2, min(num_tokens, len(ids)) // length)
    return torch.tensor(ids[: count * length]).view(count, length)


def write_rows(pretrained: Pretrained, num_tokens: int, seed: int = 0) -> torch.Tensor:
    """About `num_tokens` tokens of text that the Transformer writes itself, as rows (B, T), from its start token on."""
    length = _row_length(pretrained)
    count = max(2, num_tokens // length)
    start = pretrained.model.config.bos_token_id
    torch.manual_seed(seed)
    first = torch.randint(len(pretrained.embedding), (count, 1)) if start is None else torch.full((count, 1), start)
    # No end token: what comes after it is the next text.
    pretrained.model.generation_config.eos_token_id = None
    return torch.cat(
        [
            pretrained.model.generate(
                rows,
                attention_mask=torch.ones_like(rows),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=length - 1,
                pad_token_id=0,
            )
            for rows in first.split(4 * _ROWS_AT_ONCE)
        ]
    )


@torch.no_grad()
def mean_loss(model: nn.Module, ids: torch.Tensor) -> float:
    """Mean next-token loss, in nats, of a language model on ids (B, T)."""
    total = 0.0
    for rows in ids.split(_ROWS_AT_ONCE):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return total / ids[:, 1:].numel()


def _row_length(pretrained: Pretrained) -> int:
    return min(ROW, pretrained.max_positions)
