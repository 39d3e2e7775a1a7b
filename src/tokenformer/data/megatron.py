"""Tokenised documents in the memory-mapped files of Megatron-LM and GPT-NeoX, read in place: `NAME.idx` and `NAME.bin`.

Both projects write the same format (Megatron-LM: megatron/core/datasets/indexed_dataset.py; GPT-NeoX:
megatron/data/indexed_dataset.py). `NAME.bin` holds the ids of all sequences, end to end. `NAME.idx`, all of it
little-endian:

| bytes | what                                                                                              |
|-------|---------------------------------------------------------------------------------------------------|
| 9     | `MMIDIDX`, two zero bytes                                                                         |
| 8     | version, unsigned: 1                                                                              |
| 1     | type of the ids: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 6 and 7 floating point, 8 uint16     |
| 8     | n, the number of sequences, unsigned                                                              |
| 8     | d, the number of document boundaries, unsigned: the documents and one                             |
| 4 n   | ids in each sequence, int32                                                                       |
| 8 n   | byte in `NAME.bin` at which each sequence begins, int64                                           |
| 8 d   | index of the first sequence of each document, int64, and n behind the last                        |
| n     | only in multimodal data: the mode of each sequence, int8, 0 for text                              |
"""

import hashlib
import mmap
import struct
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenformer.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
CODES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_FLOATS = (6, 7)
_OLD_MAGIC = b"TNTIDX\x00\x00"
_ENDINGS = (".idx", ".bin")
# Entries of the index that are checked at a time: an index of a few gigabytes needs a few megabytes of memory.
_BLOCK = 1 << 20
# Ids that are read when a file is opened, in pieces spread over all of it.
_SAMPLE_PIECES = 256
_SAMPLE_PIECE = 4096


class MegatronData:
    """The documents of a pair `NAME.idx`, `NAME.bin`; they stay on disk, memory-mapped.

    `len(data)` is the number of documents, `data[i]` the ids of one, `data.documents()` goes through all. Where the
    files were made with an end-of-document token, as both projects advise, it is the last id of each.

    Attributes:
        prefix: path of the pair without its endings.
        dtype: type of the stored ids.
        num_sequences: sequences; a document may consist of several.
        num_tokens: ids in all.
        vocab_size: what the ids are checked against when they are read, or None.
    """

    prefix: Path
    dtype: np.dtype
    num_sequences: int
    num_tokens: int
    vocab_size: int | None

    @classmethod
    def open(cls, path: str | Path, *, vocab_size: int | None = None) -> "MegatronData":
        """Open a pair of files and check the whole index, but of the ids only a sample of about a million.

        Args:
            path: of either file, or of both without the ending.
            vocab_size: an id that is not below it is an error, here and whenever ids are read.

        Raises:
            UserError: a file is missing, cannot be read, or is no such file; the index contradicts itself or the
                `.bin` file; there is no token; an id is negative or not below `vocab_size`.
        """
        data = cls()
        data.prefix = prefix_of(path)
        data.vocab_size = vocab_size
        data._read_index()
        data._check_sequences()
        data._check_documents()
        for start, ids in data._sample():
            data._check_ids(ids, start)
        return data

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes open the files again; the mapped memory itself would be copied to them.
        return partial(MegatronData.open, vocab_size=self.vocab_size), (self.prefix,)

    def __repr__(self) -> str:
        return f"MegatronData('{self.prefix}', {len(self)} documents, {self.num_tokens} tokens of {self.dtype})"

    def __len__(self) -> int:
        return len(self._boundaries) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """The ids of document `index`: (tokens,), of the stored type, read-only.

        Raises:
            IndexError: there is no such document.
            UserError: an id is negative or not below `vocab_size`.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        start = self.first_token(index % len(self))
        ids = self._ids[start : self.first_token(index % len(self) + 1)]
        self._check_ids(ids, start)
        return ids

    def documents(self) -> Iterator[np.ndarray]:
        """Go through the documents in order, as `data[i]` gives them."""
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Ids in each document: (documents,), int64."""
        starts = np.append(self._pointers, self.num_tokens * self.dtype.itemsize) // self.dtype.itemsize
        return np.diff(starts[self._boundaries])

    def first_token(self, document: int) -> int:
        """Position of the first id of a document among all ids; of `len(data)`, the number of ids."""
        sequence = int(self._boundaries[document])
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def rows(self, sequence_length: int, start: int = 0, stop: int | None = None) -> "Dataset":
        """Lay documents end to end and cut them into rows, as `tokenformer data prepare` does; nothing is copied.

        Args:
            sequence_length: ids in a row. The ids that fill no row at the end are left out.
            start: the first document.
            stop: the document behind the last; all that follow if not given.

        Returns:
            Rows with the column `input_ids`. Reading one checks its ids if `vocab_size` is known.
        """
        import pyarrow as pa
        from datasets import Dataset

        first, last = self.first_token(start), self.first_token(len(self) if stop is None else stop)
        num_rows = (last - first) // sequence_length
        ids = self._ids[first : first + num_rows * sequence_length]
        values = pa.Array.from_buffers(pa.from_numpy_dtype(ids.dtype), len(ids), [None, pa.py_buffer(ids)])
        table = pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(values, sequence_length)})
        key = f"{self.fingerprint} {sequence_length} {first} {last}"
        # Without a given fingerprint, datasets would hash the table, which is all ids.
        rows = Dataset(table, fingerprint=hashlib.sha256(key.encode()).hexdigest()[:16])
        if self.vocab_size is None:
            return rows
        return rows.with_transform(partial(_checked, f"{self.prefix}.bin", self.vocab_size))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the header, the sizes of the sequences and the sample of ids.

        It tells files apart without reading them whole: hundreds of gigabytes of ids would take minutes.
        """
        digest = hashlib.sha256(self._index[: HEADER.size])
        digest.update(self._sizes.data)
        for _, ids in self._sample():
            digest.update(ids.data)
        return digest.hexdigest()

    def _read_index(self) -> None:
        self._path = Path(f"{self.prefix}.idx")
        self._index = _mapped(self._path, self.prefix)
        if self._index[: len(_OLD_MAGIC)] == _OLD_MAGIC:
            raise UserError(
                f"'{self._path}' is of the older format TNTIDX, which is not memory-mapped: tokenise again with the "
                "option --dataset-impl mmap of GPT-NeoX or Megatron, or `tokenformer data prepare`"
            )
        if self._index[: len(MAGIC)] != MAGIC[: len(self._index)]:
            raise UserError(
                f"'{self._path}' is no index of Megatron or GPT-NeoX: it begins with "
                f"{bytes(self._index[: len(MAGIC)])!r}, not {MAGIC!r}"
            )
        if len(self._index) < HEADER.size:
            raise self._damaged(f"it has {len(self._index)} bytes, its header alone {HEADER.size}")
        _, version, code, num_sequences, num_boundaries = HEADER.unpack_from(self._index)
        if version != VERSION:
            raise UserError(f"'{self._path}' has version {version} of its format, only {VERSION} is known")
        if code in _FLOATS:
            raise UserError(f"'{self._path}' holds floating-point numbers (type {code}), not token ids")
        if code not in CODES:
            raise self._damaged(f"no type of ids has the number {code}")
        self.dtype = CODES[code]
        # In Python's integers, so that no count is large enough to overflow.
        expected = HEADER.size + 12 * num_sequences + 8 * num_boundaries
        if len(self._index) not in (expected, expected + num_sequences):
            raise self._damaged(
                f"its header announces {num_sequences} sequences and {num_boundaries} document boundaries, "
                f"which take {expected} bytes, but it has {len(self._index)}"
            )
        self.num_sequences = num_sequences
        offset = HEADER.size
        self._sizes = np.frombuffer(self._index, "<i4", num_sequences, offset)
        offset += self._sizes.nbytes
        self._pointers = np.frombuffer(self._index, "<i8", num_sequences, offset)
        offset += self._pointers.nbytes
        self._boundaries = np.frombuffer(self._index, "<i8", num_boundaries, offset)
        modes = np.frombuffer(self._index, "i1", offset=expected) if len(self._index) > expected else np.zeros(0)
        if modes.any():
            raise UserError(f"'{self._path}' is multimodal: sequence {int(modes.argmax())} is not text")

    def _check_sequences(self) -> None:
        """Check sizes and pointers, and map the ids: reading beyond the end of a mapped file would end the process."""
        binary = Path(f"{self.prefix}.bin")
        mapped = _mapped(binary, self.prefix)
        itemsize = self.dtype.itemsize
        end = 0
        for start in range(0, self.num_sequences, _BLOCK):
            num_bytes = self._sizes[start : start + _BLOCK].astype(np.int64) * itemsize
            if (num_bytes < 0).any():
                at = start + int(np.argmax(num_bytes < 0))
                raise self._damaged(f"sequence {at} has the size {self._sizes[at]}")
            ends = end + np.cumsum(num_bytes)
            wrong = self._pointers[start : start + _BLOCK] != ends - num_bytes
            if wrong.any():
                at = int(np.argmax(wrong))
                raise self._damaged(
                    f"sequence {start + at} begins at byte {self._pointers[start + at]} of '{binary}', "
                    f"but those before it end at byte {int(ends[at] - num_bytes[at])}"
                )
            end = int(ends[-1])
            # In each round, so that the sum cannot overflow.
            if end > len(mapped):
                break
        if end != len(mapped):
            than = "at least " if end > len(mapped) else ""
            raise UserError(
                f"'{binary}' has {len(mapped)} bytes, but its index '{self._path}' says {than}{end}: one of them is "
                "cut off, or they do not belong together"
            )
        if not end:
            raise UserError(f"'{binary}' holds no tokens")
        self.num_tokens = end // itemsize
        self._ids = np.frombuffer(mapped, self.dtype)

    def _check_documents(self) -> None:
        boundaries = self._boundaries
        if not len(boundaries):
            raise self._damaged("it has no document boundaries")
        if boundaries[0] != 0 or boundaries[-1] != self.num_sequences:
            raise self._damaged(
                f"its documents begin at sequence {boundaries[0]} and end at sequence {boundaries[-1]}, "
                f"not at 0 and {self.num_sequences}"
            )
        for start in range(0, len(boundaries), _BLOCK):
            block = boundaries[start : start + _BLOCK + 1]
            falling = block[1:] < block[:-1]  # not a difference, which can overflow
            if falling.any():
                raise self._damaged(f"document {start + int(np.argmax(falling))} ends before it begins")

    def _sample(self) -> Iterator[tuple[int, np.ndarray]]:
        """Pieces of the ids with their positions, from the first id to the last; all ids of a small file."""
        if self.num_tokens <= _SAMPLE_PIECES * _SAMPLE_PIECE:
            yield 0, self._ids
            return
        for piece in range(_SAMPLE_PIECES):
            start = piece * (self.num_tokens - _SAMPLE_PIECE) // (_SAMPLE_PIECES - 1)
            yield start, self._ids[start : start + _SAMPLE_PIECE]

    def _check_ids(self, ids: np.ndarray, start: int) -> None:
        for id_ in (ids.min(), ids.max()) if len(ids) else ():
            if id_ < 0 or (self.vocab_size is not None and id_ >= self.vocab_size):
                at = start + int(np.argmax(ids == id_))
                raise _outside(f"{self.prefix}.bin", int(id_), self.vocab_size, f" at token {at}")

    def _damaged(self, what: str) -> UserError:
        return UserError(f"'{self._path}' is cut off or damaged: {what}")


def prefix_of(path: str | Path) -> Path:
    """The common path of a pair, from the path of either file or of both without the ending."""
    # Not with_suffix: names such as pile_0.87_text_document have dots of their own.
    text = str(path)
    return Path(text[:-4] if text.endswith(_ENDINGS) else text)


def is_pair(path: str | Path) -> bool:
    """Whether a path seems to mean a pair of files: one of them is there, or the path has an ending of theirs."""
    return str(path).endswith(_ENDINGS) or any(Path(f"{path}{ending}").is_file() for ending in _ENDINGS)


def _mapped(path: Path, prefix: Path) -> mmap.mmap | bytes:
    """The whole file, memory-mapped, with the length that it has now."""
    if not path.exists():
        raise UserError(f"no file '{path}': tokenised data is a pair of files, {prefix}.idx and {prefix}.bin")
    if not path.is_file():
        raise UserError(f"'{path}' is a folder, a pipe or a device, not a file")
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:  # an empty file cannot be mapped
        return b""
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error


def _outside(name: str, id_: int, vocab_size: int | None, where: str = "") -> UserError:
    if vocab_size is None:
        return UserError(f"'{name}' holds the negative id {id_}{where}: it is damaged, or not of token ids")
    return UserError(
        f"'{name}' holds the id {id_}{where}, outside the vocabulary of {vocab_size}: "
        "it was made with another tokenizer, or is damaged"
    )


def _checked(name: str, vocab_size: int, batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    for ids in batch["input_ids"]:
        for id_ in (min(ids), max(ids)):
            if not 0 <= id_ < vocab_size:
                raise _outside(name, id_, vocab_size)
    return batch
