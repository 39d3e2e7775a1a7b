"""Rows of a fixed length from documents of any length, and how far each split has come in writing."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenformer.data.prepared import check_shards
from tokenformer.data.storage import shard_bytes, shard_name, write_atomically, write_dataset_files
from tokenformer.data.tokenizer import ids_dtype

if TYPE_CHECKING:
    from datasets import Dataset

# What a killed run has to tokenise again at most: some ten seconds of work on one core.
CHUNK_BYTES = 1 << 26


def pack(carry: np.ndarray, documents: list[np.ndarray], sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay documents end to end and cut the stream into rows.

    Args:
        carry: ids left over from the documents before.
        documents: ids of each document.
        sequence_length: ids in a row.

    Returns:
        The rows (num_rows, sequence_length), and the ids left over.
    """
    stream = np.concatenate([carry, *documents])
    full = len(stream) - len(stream) % sequence_length
    return stream[:full].reshape(-1, sequence_length), stream[full:]


def chunks(parts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Gather (split name, text) until a chunk has `CHUNK_BYTES` of text; the work is saved after each chunk."""
    chunk: list[tuple[str, str]] = []
    size = 0
    for name, text in parts:
        chunk.append((name, text))
        size += len(text.encode())
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@dataclass
class SplitProgress:
    """What has been written of a split, kept in the state file.

    Attributes:
        documents: documents so far.
        bytes: their UTF-8 bytes.
        tokens: their ids, end tokens and left-over ones included.
        rows: rows so far.
        shards: file name and size in bytes of each shard.
        carry: ids that do not fill a row yet, where rows are what is written.
    """

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    rows: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    carry: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ArrowStore:
    """Writes each split as a folder of rows that `datasets.load_from_disk` opens; each chunk is a file of its own.

    Args:
        folder: of the preparation.
        sequence_length: ids in a row.
        vocab_size: the largest id plus one.
    """

    folder: Path
    sequence_length: int
    vocab_size: int

    @property
    def dtype(self) -> np.dtype:
        """Type of the stored ids."""
        return ids_dtype(self.vocab_size)

    def append(self, name: str, done: SplitProgress, documents: list[np.ndarray]) -> None:
        """Pack `documents` behind what was carried over and write the full rows, if any, as the next shard."""
        rows, carry = pack(np.array(done.carry, dtype=self.dtype), documents, self.sequence_length)
        done.tokens += sum(map(len, documents))
        done.rows += len(rows)
        done.carry = carry.tolist()
        if len(rows):
            data = shard_bytes(rows)
            shard = shard_name(len(done.shards))
            write_atomically(self.folder / name / shard, data)
            done.shards.append({"file": shard, "bytes": data.nbytes})

    def check(self, name: str, done: SplitProgress) -> None:
        """Check that all that `done` counts is there.

        Raises:
            UserError: a shard is missing or has another size.
        """
        check_shards(self.folder, name, done.shards)

    def finish(self, name: str, done: SplitProgress) -> tuple["Dataset", list[dict[str, Any]]]:
        """Write what `datasets` wants beside the shards; return the rows, and name and size in bytes of the shards."""
        from datasets import load_from_disk

        write_dataset_files(self.folder / name, len(done.shards), self.dtype.name, self.sequence_length)
        return load_from_disk(str(self.folder / name)), done.shards
