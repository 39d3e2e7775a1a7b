"""Calibration text, and what the layers of a model see when they read it, one block after the other.

Shapes: B rows, T positions, D channels, M inputs of a layer (B T).
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenformer.data.prepared import MANIFEST, PreparedData
from tokenformer.errors import UserError
from tokenformer.models.loading import load_tokenizer
from tokenformer.models.modeling_tokenformer import TokenFormerForCausalLM

_LONGEST_ROW = 512
_ROWS_AT_ONCE = 8


def read_rows(source: Path, folder: Path, *, vocab_size: int, longest: int, num_tokens: int) -> torch.Tensor:
    """About `num_tokens` token ids of a text file, or of the training rows of a prepared folder, as rows (B, T).

    Args:
        source: UTF-8 text, or what `tokenformer data prepare` wrote.
        folder: of the model, whose tokenizer reads the text.
        vocab_size: of the model.
        longest: positions that the model takes.
        num_tokens: at most so many; fewer if the text is shorter.

    Raises:
        UserError: no such file, not text, less than two rows of it; no tokenizer, or data of another one.
    """
    tokenizer = load_tokenizer(folder, vocab_size=vocab_size)
    if (source / MANIFEST).is_file():
        data = PreparedData.load(source, verify=False)
        if data.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise UserError(f"calibration: {source} was prepared with another tokenizer than the model's")
        length = min(data.sequence_length, longest)
        count = min(len(data.train), max(2, num_tokens // length))
        rows = [data.train[i * len(data.train) // count]["input_ids"][:length] for i in range(count)]
        return torch.tensor(rows)
    length = min(_LONGEST_ROW, longest)
    try:
        with source.open(encoding="utf-8") as opened:
            text = opened.read(16 * max(num_tokens, 2 * length))  # no token stands for more characters on average
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(
            f"calibration: cannot read {source} ({reason}): give a text file, or a folder written by "
            "tokenformer data prepare"
        ) from error
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < 2 * length:
        raise UserError(
            f"calibration: {source} holds {len(ids)} tokens, at least {2 * length} are needed: give more text"
        )
    count = max(2, min(num_tokens, len(ids)) // length)
    return torch.tensor(ids[: count * length]).view(count, length)


class _Reached(Exception):
    """Ends a forward pass at the first block."""


class Walk:
    """The hidden states of calibration rows on their way through the blocks.

    Args:
        model: in evaluation mode.
        rows: token ids (B, T).

    Attributes:
        hidden: of each batch, what the next block reads.
    """

    def __init__(self, model: TokenFormerForCausalLM, rows: torch.Tensor) -> None:
        self.hidden: list[torch.Tensor] = []
        self._options: list[dict[str, Any]] = []
        first = model.model.layers[0]
        hook = first.register_forward_pre_hook(self._catch, with_kwargs=True)
        try:
            for batch in rows.split(_ROWS_AT_ONCE):
                with suppress(_Reached):
                    model.model(batch.to(model.device), use_cache=False)
        finally:
            hook.remove()

    def _catch(self, block: nn.Module, args: tuple[torch.Tensor], options: dict[str, Any]) -> None:
        self.hidden.append(args[0])
        self._options.append(options)
        raise _Reached

    def inputs(self, block: nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the layers of these names in `block` read, (M, D) each; the walk stays where it is."""
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        hooks = [
            block.get_submodule(name).register_forward_pre_hook(
                lambda layer, args, name=name: seen[name].append(args[0].flatten(0, -2))
            )
            for name in names
        ]
        try:
            self._run(block)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: torch.cat(parts) for name, parts in seen.items()}

    def advance(self, block: nn.Module) -> None:
        """Go through `block`."""
        self.hidden = self._run(block)

    def _run(self, block: nn.Module) -> list[torch.Tensor]:
        return [block(states, **options) for states, options in zip(self.hidden, self._options, strict=True)]
