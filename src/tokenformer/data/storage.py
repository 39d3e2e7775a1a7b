"""Files that appear whole or not at all, and the form in which `datasets` memory-maps a split."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenformer.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, Features


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` into a `UserError` that says how to go on."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write '{path}': {error.strerror}; "
            "put that right (free space, permissions) and run the same command again, it continues where it stopped"
        ) from error


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Replace the file at `path` by `data`, so that a crash at any moment leaves the old file or the new one.

    Raises:
        UserError: if the file cannot be written, for example because the disk is full.
    """
    write_blocks_atomically(path, [data])


def write_blocks_atomically(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    """Do as `write_atomically` with `blocks`, one behind the other, which need not be in memory at once."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.writelines(blocks)
            file.flush()
            # Without it the new name could survive a power cut and the content not.
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` atomically as indented JSON."""
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def shard_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"data-{index:05d}.arrow"


def _features(dtype: str, sequence_length: int) -> "Features":
    from datasets import Features, List, Value

    return Features({"input_ids": List(Value(dtype), length=sequence_length)})


def shard_bytes(rows: np.ndarray) -> memoryview:
    """Return `rows` (num_rows, sequence_length) as an Arrow stream with the column `input_ids`."""
    import pyarrow as pa

    schema = _features(rows.dtype.name, rows.shape[1]).arrow_schema
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch([column], schema=schema))
    return memoryview(sink.getvalue())


def write_dataset_files(folder: Path, num_shards: int, dtype: str, sequence_length: int) -> None:
    """Write what `datasets.load_from_disk(folder)` wants beside the shards."""
    from datasets import DatasetInfo

    info = {
        key: value for key, value in asdict(DatasetInfo(features=_features(dtype, sequence_length))).items() if value
    }
    state: dict[str, Any] = {
        "_data_files": [{"filename": shard_name(index)} for index in range(num_shards)],
        "_fingerprint": hashlib.sha256(f"{num_shards} {dtype} {sequence_length}".encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_json(folder / "dataset_info.json", info)
    write_json(folder / "state.json", state)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hexadecimal) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def ids_sha256(dataset: "Dataset") -> str:
    """Return the SHA-256 of all ids of a split, row after row, as little-endian integers of the stored type."""
    digest = hashlib.sha256()
    for chunk in dataset.data.column("input_ids").chunks:
        ids = chunk.flatten().to_numpy()
        digest.update(np.ascontiguousarray(ids, dtype=ids.dtype.newbyteorder("<")).data)
    return digest.hexdigest()
