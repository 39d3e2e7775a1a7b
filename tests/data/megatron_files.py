"""The `.idx` and `.bin` files of GPT-NeoX and Megatron-LM, written and read from the description of their format."""

import struct
from itertools import pairwise
from pathlib import Path

import numpy as np

TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def index_bytes(documents: list[list[list[int]]], code: int = 8) -> bytes:
    """The index of documents, each a list of sequences of ids."""
    sequences = [sequence for document in documents for sequence in document]
    data = b"MMIDIDX\0\0" + struct.pack("<Q", 1) + struct.pack("<B", code)
    data += struct.pack("<QQ", len(sequences), len(documents) + 1)
    data += b"".join(struct.pack("<i", len(sequence)) for sequence in sequences)
    begin = 0
    for sequence in sequences:
        data += struct.pack("<q", begin)
        begin += len(sequence) * np.dtype(TYPES[code]).itemsize
    count = 0
    for document in [[], *documents]:
        count += len(document)
        data += struct.pack("<q", count)
    return data


def write_pair(prefix: Path, documents: list[list[list[int]]], code: int = 8) -> str:
    """Write documents, each a list of sequences of ids; returns the prefix."""
    ids = [id_ for document in documents for sequence in document for id_ in sequence]
    Path(f"{prefix}.bin").write_bytes(np.array(ids, dtype=TYPES[code]).tobytes())
    Path(f"{prefix}.idx").write_bytes(index_bytes(documents, code))
    return str(prefix)


def read_pair(prefix: Path | str) -> list[list[int]]:
    """The ids of each document, by the index alone; slices of bytes never reach beyond their end."""
    index, ids = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    magic, version, code, num_sequences, num_boundaries = struct.unpack("<9sQBQQ", index[:34])
    assert (magic, version) == (b"MMIDIDX\0\0", 1)
    sizes = struct.unpack(f"<{num_sequences}i", index[34 : 34 + 4 * num_sequences])
    begin = 34 + 4 * num_sequences
    pointers = struct.unpack(f"<{num_sequences}q", index[begin : begin + 8 * num_sequences])
    begin += 8 * num_sequences
    boundaries = struct.unpack(f"<{num_boundaries}q", index[begin : begin + 8 * num_boundaries])
    width = np.dtype(TYPES[code]).itemsize
    sequences = [
        np.frombuffer(ids[pointer : pointer + size * width], TYPES[code]).tolist()
        for pointer, size in zip(pointers, sizes, strict=True)
    ]
    return [[id_ for sequence in sequences[first:last] for id_ in sequence] for first, last in pairwise(boundaries)]
