"""Writing the files that `megatron.py` reads, a chunk of documents at a time.

`NAME.bin` grows in place. Beside it grows `NAME.lengths`, the ids in each document as int32, of which the index is made
at the end. A chunk counts only once preparing.json says so: what a killed run appended after that is cut off again.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenformer.data.megatron import CODES, HEADER, MAGIC, VERSION, MegatronData
from tokenformer.data.packing import SplitProgress
from tokenformer.data.prepared import damaged
from tokenformer.data.storage import file_sha256, write_blocks_atomically, writing
from tokenformer.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

LENGTHS = ".lengths"
# The index stores the size of a sequence as int32.
MAX_LENGTH = 2**31 - 1
_LENGTH = np.dtype("<i4")
# Entries of the index that are written at a time.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class MegatronStore:
    """Writes each split as `folder/NAME.bin` and `folder/NAME.idx`, one sequence a document.

    Args:
        folder: of the preparation.
        sequence_length: ids in the rows that are cut from the files when they are read.
        vocab_size: the largest id plus one.
    """

    folder: Path
    sequence_length: int
    vocab_size: int

    @property
    def dtype(self) -> np.dtype:
        """The type that GPT-NeoX and Megatron-LM choose for the ids of a vocabulary."""
        return np.dtype("<u2" if self.vocab_size < 65500 else "<i4")

    def append(self, name: str, done: SplitProgress, documents: list[np.ndarray]) -> None:
        """Write `documents`, which `done` counts already, behind its `done.tokens` ids, and add theirs to it.

        Raises:
            UserError: a document is too long for the format; the files cannot be written.
        """
        lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
        if len(lengths) and lengths.max() > MAX_LENGTH:
            raise UserError(
                f"a document has {lengths.max()} tokens, the Megatron format takes {MAX_LENGTH}: split it, "
                "or prepare without --format megatron"
            )
        ids = [ids.astype(self.dtype, copy=False) for ids in documents]
        _write_at(self.folder / f"{name}.bin", done.tokens * self.dtype.itemsize, ids)
        before = done.documents - len(documents)
        _write_at(self.folder / f"{name}{LENGTHS}", before * _LENGTH.itemsize, [lengths.astype(_LENGTH)])
        done.tokens += int(lengths.sum())
        done.rows = done.tokens // self.sequence_length

    def check(self, name: str, done: SplitProgress) -> None:
        """Check that all that `done` counts is there.

        Raises:
            UserError: a file is missing or too short.
        """
        expected = {f"{name}.bin": done.tokens * self.dtype.itemsize, f"{name}{LENGTHS}": done.documents * 4}
        for file, size in expected.items():
            if size and (not (self.folder / file).is_file() or (self.folder / file).stat().st_size < size):
                raise damaged(self.folder, f"{file} is missing or too short")

    def finish(self, name: str, done: SplitProgress) -> tuple["Dataset", list[dict[str, Any]]]:
        """Write the index; return the rows, and the name, size in bytes and SHA-256 of both files."""
        lengths = np.fromfile(self.folder / f"{name}{LENGTHS}", _LENGTH, done.documents)
        write_blocks_atomically(self.folder / f"{name}.idx", _index(lengths, self.dtype))
        files = []
        for file in (f"{name}.bin", f"{name}.idx"):
            path = self.folder / file
            files.append({"file": file, "bytes": path.stat().st_size, "sha256": file_sha256(path)})
        return MegatronData.open(self.folder / name).rows(self.sequence_length), files


def _index(lengths: np.ndarray, dtype: np.dtype) -> Iterator[bytes]:
    """The index of documents that are one sequence each."""
    code = next(code for code, known in CODES.items() if known == dtype)
    yield HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1)
    yield lengths.tobytes()
    begin = 0
    for start in range(0, len(lengths), _BLOCK):
        num_bytes = lengths[start : start + _BLOCK].astype("<i8") * dtype.itemsize
        ends = begin + np.cumsum(num_bytes)
        yield (ends - num_bytes).astype("<i8").tobytes()
        begin = int(ends[-1])
    for start in range(0, len(lengths) + 1, _BLOCK):
        yield np.arange(start, min(start + _BLOCK, len(lengths) + 1), dtype="<i8").tobytes()


def _write_at(path: Path, offset: int, blocks: list[np.ndarray]) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "r+b" if path.exists() else "xb") as file:
            file.truncate(offset)
            file.seek(offset)
            for block in blocks:
                file.write(block.data)
            file.flush()
            # preparing.json must not count what a power cut could still take away.
            os.fsync(file.fileno())
