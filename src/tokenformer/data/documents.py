"""Where documents come from: text, JSON lines and Parquet files, plain or compressed, and datasets of the Hub.

A source streams its documents in order and turns whatever is wrong with them into one line that names the file and the
place in it. Sources are read several times, so nothing is kept between readings.
"""

import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from tokenformer.errors import UserError

Advance = Callable[[int], None]

FORMATS = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSIONS = (".gz", ".zst")
# A missing argument with one of these endings was meant as a file, never as a dataset of the Hub.
_FILE_ENDINGS = (
    *FORMATS,
    *COMPRESSIONS,
    ".csv",
    ".tsv",
    ".md",
    ".html",
    ".xml",
    ".pdf",
    ".arrow",
    ".zip",
    ".bz2",
    ".xz",
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class Source(Protocol):
    """A stream of documents that can be read again.

    Attributes:
        name: the argument the user gave.
        num_bytes: bytes of the file, or of the texts of a Hub dataset.
    """

    name: str
    num_bytes: int

    def sha256(self, advance: Advance) -> str:
        """Return what identifies the content; `advance` is told the bytes read."""

    def documents(self, advance: Advance) -> Iterator[str]:
        """Stream the texts in order; `advance` is told the bytes read.

        Raises:
            UserError: for anything wrong with the content, naming the place.
        """


def open_sources(arguments: list[str], text_field: str, split: str = "train") -> list[Source]:
    """Return one source for each argument: a file, or else the name of a dataset on the Hub.

    Args:
        arguments: paths or Hub names.
        text_field: the field or column that holds the text, where the format has fields.
        split: of datasets on the Hub.

    Raises:
        UserError: if a file is missing, is a folder or has an unknown extension, or a dataset cannot be loaded.
    """
    if not arguments:
        raise UserError("no input: name at least one file with --input")
    return [_open(argument, text_field, split) for argument in arguments]


def _open(argument: str, text_field: str, split: str) -> Source:
    folder = os.path.dirname(argument)
    if os.path.isdir(argument):
        raise UserError(f"'{argument}' is a folder: name the files in it, such as {os.path.join(argument, '*.txt')}")
    if os.path.isfile(argument):
        return File(argument, text_field)
    if os.path.exists(argument):
        raise UserError(f"'{argument}' is a pipe or a device, which cannot be read twice: save it as a file first")
    if (
        (folder and os.path.isdir(folder))
        or argument.lower().endswith(_FILE_ENDINGS)
        or not _HUB_NAME.fullmatch(argument)
    ):
        raise UserError(f"file not found: '{argument}'")
    return HubDataset(argument, text_field, split)


class File:
    """The documents of one file.

    A `.txt` file is one document; a `.jsonl` or `.json` file holds one JSON object a line; a `.parquet` file has one
    document a row. The first three may end in `.gz` or `.zst`.
    """

    def __init__(self, name: str, text_field: str) -> None:
        self.name = name
        self.text_field = text_field
        self.path = Path(name)
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        self.compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
        self.format = suffixes[-1] if suffixes else ""
        if self.format not in FORMATS or (self.format == ".parquet" and self.compression):
            raise UserError(
                f"'{name}' has an extension that is not understood: "
                "use .txt, .jsonl or .json (each also with .gz or .zst), or .parquet"
            )
        self.num_bytes = self.path.stat().st_size

    def sha256(self, advance: Advance) -> str:
        """Return the SHA-256 of the file as it is on disk."""
        digest = hashlib.sha256()
        try:
            with open(self.path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    advance(len(block))
        except OSError as error:
            raise self._unreadable(error) from error
        return digest.hexdigest()

    def documents(self, advance: Advance) -> Iterator[str]:
        """Stream the texts of the file."""
        try:
            if self.format == ".parquet":
                yield from self._parquet(advance)
                return
            with open(self.path, "rb") as file:
                texts = self._text(file) if self.format == ".txt" else self._json_lines(file)
                position = 0
                for text in texts:
                    yield text
                    advance(file.tell() - position)
                    position = file.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise self._damaged(error) from error
        except OSError as error:
            raise self._unreadable(error) from error

    def _text(self, file: io.BufferedReader) -> Iterator[str]:
        data = self._decompressed(file).read().removeprefix(b"\xef\xbb\xbf")
        try:
            yield data.decode()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise UserError(
                f"'{self.name}' is not UTF-8 at byte {error.start} (line {line}): save it as UTF-8"
            ) from error

    def _json_lines(self, file: io.BufferedReader) -> Iterator[str]:
        for number, line in enumerate(self._decompressed(file), start=1):
            where = f"'{self.name}' line {number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise UserError(f"{where} is not UTF-8 at its byte {error.start}: save the file as UTF-8") from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON ({error}): each line must hold one JSON object") from error
            if not isinstance(record, dict):
                raise UserError(f"{where} is not a JSON object: each line must hold one JSON object")
            if self.text_field not in record:
                fields = ", ".join(list(record)[:8]) or "none"
                raise UserError(
                    f"{where} has no field '{self.text_field}' (its fields: {fields}): name the field with --text-field"
                )
            yield _checked(record[self.text_field], where, self.text_field)

    def _parquet(self, advance: Advance) -> Iterator[str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path) as table:
                columns = table.schema_arrow.names
                if self.text_field not in columns:
                    raise UserError(
                        f"'{self.name}' has no column '{self.text_field}' (its columns: {', '.join(columns)}): "
                        "name the column with --text-field"
                    )
                row, groups = 0, table.num_row_groups
                for group in range(groups):
                    for batch in table.iter_batches(row_groups=[group], columns=[self.text_field], batch_size=1024):
                        for value in batch.column(0):
                            row += 1
                            where = f"'{self.name}' row {row}"
                            try:
                                text = value.as_py()
                            except UnicodeDecodeError as error:
                                raise UserError(f"{where} is not UTF-8: write the column as UTF-8 text") from error
                            yield _checked(text, where, self.text_field)
                    advance(self.num_bytes // groups)
        except pa.ArrowException as error:
            raise self._damaged(error) from error

    def _decompressed(self, file: io.BufferedReader) -> io.BufferedIOBase:
        if self.compression == ".gz":
            return gzip.open(file)
        if self.compression == ".zst":
            return io.BufferedReader(_ZstdReader(file, self.name), 1 << 17)
        return file

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"'{self.name}' is damaged or cut off ({error}): copy or download it again")

    def _unreadable(self, error: OSError) -> UserError:
        # Arrow reports damaged pages as OSError without an errno.
        if error.errno is None:
            return self._damaged(error)
        return UserError(f"cannot read '{self.name}': {error.strerror}")


class _ZstdReader(io.RawIOBase):
    """Decompresses a .zst file, and unlike zstandard's own reader raises `EOFError` where it is cut off."""

    def __init__(self, file: io.BufferedReader, name: str) -> None:
        import zstandard

        self._file, self._name = file, name
        # The format's largest window: files made with `zstd --long=31` need it.
        self._context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._compressed = b""
        self._text = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            self._compressed = self._compressed or self._file.read(1 << 14)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends within a zstd frame")
                return 0
            self._frame = self._frame or self._context.decompressobj()
            try:
                self._text = self._frame.decompress(self._compressed)
            except self._error as error:
                raise EOFError(str(error)) from error
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size


class HubDataset:
    """The documents of one split of a dataset on the Hub.

    It is downloaded once into the cache of `datasets` rather than streamed, because it is read several times.
    """

    def __init__(self, name: str, text_field: str, split: str) -> None:
        import datasets

        self.name, self.text_field = name, text_field
        try:
            self._rows = datasets.load_dataset(name, split=split, streaming=False)
        except Exception as error:  # the Hub client raises dozens of unrelated types
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"'{name}' is no file here, and not a dataset the Hub could load: {reason}") from error
        columns = self._rows.column_names
        if text_field not in columns:
            raise UserError(
                f"dataset '{name}' has no column '{text_field}' (its columns: {', '.join(columns)}): "
                "name the column with --text-field"
            )
        self._rows = self._rows.select_columns([text_field])
        self.num_bytes = int(self._rows.data.nbytes)

    def sha256(self, advance: Advance) -> str:
        """Return the SHA-256 of the texts, each preceded by its length."""
        digest = hashlib.sha256()
        for text in self.documents(advance):
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    def documents(self, advance: Advance) -> Iterator[str]:
        """Stream the texts of the dataset."""
        number = 0
        for batch in self._rows.iter(batch_size=1024):
            for text in batch[self.text_field]:
                number += 1
                yield _checked(text, f"dataset '{self.name}' row {number}", self.text_field)
                advance(len(text))


def _checked(text: object, where: str, field: str) -> str:
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise UserError(f"{where}: '{field}' is {kind}, not text: drop the document or name another --text-field")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: '{field}' holds half of a surrogate pair at character {error.start}, which is no text: fix it"
        ) from error
    return text
