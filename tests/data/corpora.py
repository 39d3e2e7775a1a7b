"""Small corpora for the tests of the data package."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

WORDS = [
    "the",
    "of",
    "and",
    "sea",
    "captain",
    ",",
    ".",
    "—",
    "naïve",
    "日本",
    "\n",
    "\n\n",
    "night's",
    "3.14",
    "'twas",
    "",
    "🙂",
]


def make_documents(number: int, words: int = 40, seed: int = 1) -> list[str]:
    draw = random.Random(seed)
    return [f"{i}: " + " ".join(draw.choices(WORDS, k=draw.randint(words // 2, words))) for i in range(number)]


def write_documents(path: Path, texts: list[str], field: str = "text") -> str:
    """Write `texts` in the format that the name of `path` asks for."""
    name = path.name
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"id": range(len(texts)), field: texts}), path, row_group_size=7)
        return str(path)
    if ".txt" in name:
        data = texts[0].encode()
    else:
        records = [json.dumps({"id": i, field: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
        data = "".join(record + "\n" for record in records).encode()
    if name.endswith(".gz"):
        data = gzip.compress(data)
    elif name.endswith(".zst"):
        data = zstandard.compress(data)
    path.write_bytes(data)
    return str(path)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
