from pathlib import Path

import pytest
from corpora import make_documents, write_documents


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """Three files of thirty documents in all."""
    texts = make_documents(30)
    return [
        write_documents(tmp_path / "a.jsonl.zst", texts[:12]),
        write_documents(tmp_path / "b.txt", texts[12:13]),
        write_documents(tmp_path / "c.parquet", texts[13:]),
    ]
