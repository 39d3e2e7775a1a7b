"""What a training run reads: a folder of `tokenformer data prepare`, or files that were tokenised elsewhere."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenformer.data.megatron import MegatronData, is_pair, prefix_of
from tokenformer.data.prepared import PreparedData
from tokenformer.data.progress import Bars
from tokenformer.data.split import SPLITS
from tokenformer.data.storage import write_atomically
from tokenformer.data.tokenizer import TokenizerChoice, choose, tokenizer_config, tokenizer_hash
from tokenformer.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

HELD_OUT = 0.01
# Tokens that are decoded at a time.
_BATCH = 1 << 20


@dataclass(frozen=True)
class Part:
    """The documents of a pair from `start` up to `stop`, excluded."""

    documents: MegatronData
    start: int
    stop: int

    def rows(self, sequence_length: int) -> "Dataset":
        """The documents laid end to end, in rows of `sequence_length` ids."""
        return self.documents.rows(sequence_length, self.start, self.stop)

    @property
    def num_tokens(self) -> int:
        """Ids in all."""
        return self.documents.first_token(self.stop) - self.documents.first_token(self.start)


@dataclass(frozen=True)
class TokenisedData:
    """Files in the format of GPT-NeoX and Megatron-LM with their tokenizer, in the shape of `PreparedData`.

    Attributes:
        path: the files for training, without ending.
        train: rows of the training part; column `input_ids`, a list of `sequence_length` ids.
        held_out: rows of the held-out part.
        tokenizer: the tokenizer that made the ids.
        tokenizer_hash: SHA-256 of its tokenizer.json.
        vocab_size: the largest id of the tokenizer plus one.
        sequence_length: ids in a row.
        parts: the documents of `train` and `held_out`.
        choice: the tokenizer as it was given.
    """

    path: Path
    train: "Dataset"
    held_out: "Dataset"
    tokenizer: "PreTrainedTokenizerFast"
    tokenizer_hash: str
    vocab_size: int
    sequence_length: int
    parts: dict[str, Part]
    choice: TokenizerChoice

    @property
    def fingerprints(self) -> dict[str, str]:
        """What tells these data from others, without reading all of them."""
        files = {name: part.documents.fingerprint for name, part in self.parts.items()}
        return files | {"tokenizer": self.tokenizer_hash}

    def tokens_per_byte(self, split: str, *, progress: bool = False) -> float:
        """Return the tokens that stand for one UTF-8 byte of text, end tokens included.

        Decodes the whole split: the files do not say how long its text was.

        Args:
            split: `train` or `held_out`.
            progress: show a progress bar where stderr is a terminal.

        Raises:
            UserError: if there is no such split, or no text in it.
        """
        if split not in SPLITS:
            raise UserError(f"no split '{split}': use train or held_out")
        part = self.parts[split]
        num_bytes = 0
        with Bars(progress) as bars, bars.bar("measuring the text", part.num_tokens) as advance:
            batch: list[list[int]] = []
            size = 0
            for index in range(part.start, part.stop):
                batch.append(part.documents[index].tolist())
                size += len(batch[-1])
                if size >= _BATCH or index == part.stop - 1:
                    texts = self.tokenizer.backend_tokenizer.decode_batch(batch)
                    num_bytes += sum(len(text.encode()) for text in texts)
                    advance(size)
                    batch, size = [], 0
        if not num_bytes:
            raise UserError(f"the {split.replace('_', '-')} part of '{part.documents.prefix}.bin' decodes to no text")
        return part.num_tokens / num_bytes

    def save_tokenizer(self, folder: Path) -> None:
        """Write tokenizer.json, as it was given, and tokenizer_config.json."""
        assert self.choice.given is not None
        write_atomically(folder / "tokenizer.json", self.choice.given)
        write_atomically(folder / "tokenizer_config.json", tokenizer_config(self.choice))


TrainingData = PreparedData | TokenisedData


def open_data(
    path: str | Path,
    *,
    tokenizer: str | None = None,
    held_out: str | float | None = None,
    sequence_length: int | None = None,
) -> TrainingData:
    """Open what `path` names; the ids stay on disk, memory-mapped.

    Args:
        path: a folder written by `tokenformer data prepare`, or a pair of files of GPT-NeoX or Megatron-LM: either
            file, or both without the ending. The other arguments describe such files; a folder knows them itself.
        tokenizer: the tokenizer.json that the ids were made with, or a folder that holds it; needed for files.
        held_out: another pair, or the fraction of the documents to hold out, at the end; 0.01 if not given.
        sequence_length: ids in a row; needed for files.

    Raises:
        UserError: something is missing, damaged, or contradicts the rest.
    """
    if Path(path).is_dir() or (tokenizer is None and not is_pair(path)):
        return _folder(Path(path), tokenizer, held_out, sequence_length)
    if tokenizer is None:
        raise UserError(f"data.tokenizer: give the tokenizer.json that '{path}' was made with")
    if sequence_length is None:
        raise UserError(f"data.sequence_length: '{path}' is not cut into rows; give their length, for example 2048")
    if sequence_length < 1:
        raise UserError(f"data.sequence_length {sequence_length}: a row needs at least 1 token, for example 2048")
    choice = choose(tokenizer)
    if choice.given is None:
        raise UserError(f"data.tokenizer '{tokenizer}': give the tokenizer.json that '{path}' was made with")
    loaded = _loaded(choice.given, choice)
    vocab_size = max(loaded.get_vocab().values()) + 1
    parts = _parts(MegatronData.open(path, vocab_size=vocab_size), HELD_OUT if held_out is None else held_out)
    rows = {name: part.rows(sequence_length) for name, part in parts.items()}
    for name, part in parts.items():
        if not len(rows[name]):
            raise UserError(
                f"the {name.replace('_', '-')} part of '{part.documents.prefix}.bin' has {part.num_tokens} tokens, "
                f"fewer than one row of {sequence_length}: lower data.sequence_length or change data.held_out"
            )
    return TokenisedData(
        path=prefix_of(path),
        train=rows["train"],
        held_out=rows["held_out"],
        tokenizer=loaded,
        tokenizer_hash=tokenizer_hash(tokenizer),
        vocab_size=vocab_size,
        sequence_length=sequence_length,
        parts=parts,
        choice=choice,
    )


def _folder(
    path: Path, tokenizer: str | None, held_out: str | float | None, sequence_length: int | None
) -> PreparedData:
    data = PreparedData.load(path)
    if sequence_length not in (None, data.sequence_length):
        raise UserError(
            f"data.sequence_length {sequence_length}: '{path}' was prepared in rows of {data.sequence_length}; "
            "leave it out, or prepare the data again"
        )
    if tokenizer is not None and tokenizer_hash(tokenizer) != data.tokenizer_hash:
        raise UserError(f"data.tokenizer '{tokenizer}': '{path}' was prepared with another one; leave it out")
    if held_out is not None:
        raise UserError(f"data.held_out {held_out}: '{path}' has a held-out part of its own; leave it out")
    return data


def _parts(documents: MegatronData, held_out: str | float) -> dict[str, Part]:
    count = len(documents)
    if isinstance(held_out, str):
        others = MegatronData.open(held_out, vocab_size=documents.vocab_size)
        if others.prefix.resolve() == documents.prefix.resolve():
            raise UserError(f"data.held_out '{held_out}' is what is trained on: give another pair, or a fraction")
        return {"train": Part(documents, 0, count), "held_out": Part(others, 0, len(others))}
    if not 0 < held_out < 1:
        raise UserError(f"data.held_out {held_out}: give a fraction between 0 and 1, for example 0.01, or another pair")
    if count < 2:
        raise UserError(f"'{documents.prefix}.bin' is a single document: give another pair as data.held_out")
    cut = count - min(max(round(held_out * count), 1), count - 1)
    return {"train": Part(documents, 0, cut), "held_out": Part(documents, cut, count)}


def _loaded(tokenizer_json: bytes, choice: TokenizerChoice) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json.decode()),
        bos_token=choice.start_token,
        eos_token=choice.end_token,
        clean_up_tokenization_spaces=False,
    )
