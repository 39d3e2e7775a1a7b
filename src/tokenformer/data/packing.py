"""Rows of a fixed length from documents of any length, and how far each split has come."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tokenformer.data.storage import shard_bytes, shard_name, write_atomically

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
        carry: ids that do not fill a row yet.
    """

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    rows: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    carry: list[int] = field(default_factory=list)

    def write(self, folder: Path, documents: list[np.ndarray], sequence_length: int, dtype: np.dtype) -> None:
        """Pack `documents` behind what was carried over and write the full rows, if any, as the next shard."""
        rows, carry = pack(np.array(self.carry, dtype=dtype), documents, sequence_length)
        self.tokens += sum(map(len, documents))
        self.rows += len(rows)
        self.carry = carry.tolist()
        if len(rows):
            data = shard_bytes(rows)
            name = shard_name(len(self.shards))
            write_atomically(folder / name, data)
            self.shards.append({"file": name, "bytes": data.nbytes})
