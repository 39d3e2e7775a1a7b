"""Images in tables: Parquet files, and datasets of the Hub."""

import hashlib
import re
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenformer.errors import UserError
from tokenformer.images.decoding import BadImage
from tokenformer.images.parts import HELD_OUT_NAMES, Part

if TYPE_CHECKING:
    from datasets import Dataset, Features

_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "fine_label")
# Of a Parquet file so many bytes are hashed at either end: all of a small one, and the table of contents of any.
_HASHED = 1 << 25
_SOURCES = "give digits, a folder of class folders, Parquet files or a dataset of the Hub"


class Rows:
    """The image column of a table, not decoded."""

    def __init__(self, table: "Dataset", column: str, where: str) -> None:
        self._table = table.select_columns([column])
        self._column = column
        self._where = where

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> bytes | str:
        value = self._table[index][self._column]
        source = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
        if not isinstance(source, (bytes, str)):
            raise BadImage(f"{self.name(index)} is missing: remove the row")
        return source

    def name(self, index: int) -> str:
        """The row and where it lies."""
        return f"the image in row {index} of {self._where}"


def open_tables(
    source: str,
    image_column: str | None,
    label_column: str | None,
    held_out_names: Sequence[str] = HELD_OUT_NAMES,
) -> dict[str, Part]:
    """Open Parquet files (a file, a pattern, a folder of them) or a dataset of the Hub.

    Raises:
        UserError: there is no such thing, it cannot be read, a column is missing, or a label is no class.
    """
    tables, fingerprint = _load(source)
    held_out = next((name for name in held_out_names if name in tables), None)
    chosen = {part: name for part, name in (("train", "train"), ("held_out", held_out)) if name in tables}
    if not chosen:
        raise UserError(f"'{source}' has the splits {', '.join(tables)}: one of them must be called train or test")
    return {
        part: _part(tables[name], source, name if len(tables) > 1 else None, fingerprint, image_column, label_column)
        for part, name in chosen.items()
    }


def _load(source: str) -> tuple[dict[str, "Dataset"], str]:
    """The splits of a source by name, and what tells it from others."""
    from datasets import load_dataset

    path = Path(source)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [Path(name) for name in sorted(glob(source))]
    if strange := [file for file in files if file.suffix != ".parquet"]:
        raise UserError(f"'{strange[0]}' is no Parquet file: {_SOURCES}")
    if not files and not _may_be_on_the_hub(source):
        raise UserError(f"there is no '{source}': {_SOURCES}")
    try:
        if files and not path.is_dir():
            loaded = load_dataset("parquet", data_files=[str(file) for file in files])
        else:
            loaded = load_dataset(source)
    except Exception as error:  # datasets, pyarrow and huggingface_hub raise many unrelated types
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        if files:
            raise UserError(f"cannot read '{source}' as Parquet ({reason}): repair it") from error
        raise UserError(f"there is no '{source}' here, and the Hub does not give it ({reason}): {_SOURCES}") from error
    tables = dict(loaded)
    if files:
        return tables, _hash(files)
    return tables, " ".join(table._fingerprint for table in tables.values())


def _may_be_on_the_hub(source: str) -> bool:
    """Whether it reads like the name of a dataset; asking the Hub for a path takes half a minute without a network."""
    parent = Path(source).parent
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) is not None
    return is_name and not source.endswith(".parquet") and (parent == Path() or not parent.exists())


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_HASHED))
            file.seek(max(_HASHED, size - _HASHED))
            digest.update(file.read())
    return f"{len(files)} files {digest.hexdigest()}"


def _part(
    table: "Dataset",
    source: str,
    split: str | None,
    fingerprint: str,
    image_column: str | None,
    label_column: str | None,
) -> Part:
    from datasets import ClassLabel, Image

    where = f"'{source}'" + (f" ({split})" if split else "")
    image_column = _column(table.features, image_column, "image", Image, _IMAGE_NAMES, where)
    label_column = _column(table.features, label_column, "label", ClassLabel, _LABEL_NAMES, where)
    if isinstance(table.features[image_column], Image):
        table = table.cast_column(image_column, Image(decode=False))
    elif not _is_encoded(table.features[image_column]):
        raise UserError(
            f"column '{image_column}' of {where} holds no image files but {table.features[image_column]}: "
            "name another with image_column"
        )
    labels, classes = _labels(table, label_column, where)
    name = f"{split or 'all'} of {fingerprint}, columns {image_column} and {label_column}"
    return Part(Rows(table, image_column, where), labels, classes, name, where)


def _column(features: "Features", given: str | None, kind: str, feature: type, names: Sequence[str], where: str) -> str:
    if given is not None:
        if given not in features:
            raise UserError(f"{where} has no column '{given}' for {kind}_column: it has {', '.join(features)}")
        return given
    found = [name for name, value in features.items() if isinstance(value, feature)]
    if len(found) == 1:
        return found[0]
    named = [name for name in names if name in (found or features)]
    if not named:
        raise UserError(f"{where} has the columns {', '.join(features)}: say with {kind}_column which is the {kind}")
    return named[0]


def _is_encoded(feature: Any) -> bool:
    """Whether a column holds the bytes of image files, their paths, or both, as without features of `datasets`."""
    if isinstance(feature, dict):
        return bool({"bytes", "path"} & feature.keys())
    return getattr(feature, "dtype", None) in ("binary", "large_binary", "string", "large_string")


def _labels(table: "Dataset", column: str, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    from datasets import ClassLabel

    values: list[Any] = table.with_format(None)[column][:]
    feature = table.features[column]
    if isinstance(feature, ClassLabel):
        for row, value in enumerate(values):
            if value is None or not 0 <= value < feature.num_classes:
                raise UserError(
                    f"row {row} of {where} has the label {value}, none of the {feature.num_classes} classes of "
                    f"'{column}': correct or remove the row"
                )
        return np.array(values, dtype=np.int64), tuple(feature.names)
    for row, value in enumerate(values):
        if not isinstance(value, (int, str)):
            raise UserError(
                f"row {row} of {where} has the label {value!r} in '{column}': labels are whole numbers or words"
            )
    distinct = sorted(set(values))
    positions = {value: position for position, value in enumerate(distinct)}
    return np.array([positions[value] for value in values], dtype=np.int64), tuple(str(value) for value in distinct)
