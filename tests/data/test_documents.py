import gzip
import hashlib

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from corpora import make_documents, write_documents

from tokenformer.data.documents import open_sources
from tokenformer.errors import UserError


def read(*names: str, text_field: str = "text") -> list[str]:
    return [text for source in open_sources(list(names), text_field) for text in source.documents(lambda _: None)]


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.JSONL", "a.json", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.v2.json.zst", "a.parquet"],
)
@pytest.mark.parametrize("field", ["text", "content"])
def test_formats_hold_the_same_documents(tmp_path, name, field):
    texts = make_documents(20)
    write_documents(tmp_path / name, texts, field)
    assert read(str(tmp_path / name), text_field=field) == texts


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_text_file_is_one_document_unchanged(tmp_path, name):
    text = "one\r\ntwo\rthree\n\n\x00 naïve\u2028 \ufeff end "
    assert read(write_documents(tmp_path / name, [text])) == [text]


def test_byte_order_mark_at_the_start_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}\n\n  \n{"text": "three"}')
    assert read(str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")) == ["one", "two", "three"]


@pytest.mark.parametrize(("ending", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_concatenated_compressed_files(tmp_path, ending, compress):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(compress(b"one " * 50_000) + compress(b"") + compress(b"two"))
    assert read(str(path)) == ["one " * 50_000 + "two"]


def test_zst_of_the_largest_window(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=False, hash_log=8, chain_log=8)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(stream.compress(b"long window") + stream.flush())
    assert zstandard.get_frame_parameters((tmp_path / "a.txt.zst").read_bytes()).window_size == 1 << 31
    assert read(str(tmp_path / "a.txt.zst")) == ["long window"]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_parquet_string_types(tmp_path, kind):
    texts = ["one", "two", "one"]
    pq.write_table(pa.table({"text": pa.array(texts).cast(kind)}), tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet")) == texts


def test_parquet_is_read_by_row_group(tmp_path):
    path = write_documents(tmp_path / "a.parquet", make_documents(70))  # ten groups of seven
    source = open_sources([path], "text")[0]
    advances: list[int] = []
    documents = source.documents(advances.append)
    for _ in range(8):
        next(documents)
    assert advances == [source.num_bytes // 10]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt"])
def test_file_sha256_is_that_of_the_file(tmp_path, name):
    path = write_documents(tmp_path / name, make_documents(5))
    read_bytes: list[int] = []
    source = open_sources([path], "text")[0]
    assert source.sha256(read_bytes.append) == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert sum(read_bytes) == source.num_bytes == (tmp_path / name).stat().st_size


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub whose only dataset, `owner/corpus`, is really a file; loaded by the true loader of `datasets`."""
    texts = make_documents(12)
    path = write_documents(tmp_path / "hub.jsonl", texts)
    load = datasets.load_dataset

    def load_dataset(name, split, streaming):
        if name != "owner/corpus":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub.\nSecond line.")
        return load("json", data_files=path, split=split, streaming=streaming, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return texts


def test_hub_dataset(hub):
    assert read("owner/corpus") == hub
    source = open_sources(["owner/corpus"], "text")[0]
    framed = b"".join(len(text.encode()).to_bytes(8, "little") + text.encode() for text in hub)
    assert source.sha256(lambda _: None) == hashlib.sha256(framed).hexdigest()


@pytest.mark.parametrize(
    ("name", "field", "message"),
    [
        ("owner/other", "text", "Dataset 'owner/other' doesn't exist on the Hub."),
        ("wikitext-103.raw_v1", "text", "no file here"),
        ("owner/corpus", "body", r"no column 'body' \(its columns: id, text\)"),
        ("owner/corpus", "id", "row 1: 'id' is int, not text"),
    ],
)
def test_hub_dataset_that_cannot_be_used(hub, name, field, message):
    with pytest.raises(UserError, match=message) as raised:
        read(name, text_field=field)
    assert "Second line" not in str(raised.value)


@pytest.mark.parametrize(
    "name", ["corpus.txt", "owner/corpus.jsonl.gz", "a.csv", "./corpus", "/x/y", "a/b/c", "~/a", ""]
)
def test_missing_file_is_not_looked_for_on_the_hub(hub, name):
    with pytest.raises(UserError, match="file not found: "):
        read(name)


def test_missing_name_in_an_existing_folder_is_a_missing_file(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    with pytest.raises(UserError, match="file not found: 'owner/corpus'"):
        read("owner/corpus")
