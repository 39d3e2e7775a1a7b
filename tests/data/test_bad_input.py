"""What a user can get wrong: exit code 2, one line that names the thing and the fix, and nothing written."""

import builtins
import errno
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from corpora import make_documents, snapshot, write_documents
from tokenizers import Tokenizer, models

from tokenformer.cli import main

GOOD = [*make_documents(30)]


def run(folder: Path, capsys: pytest.CaptureFixture[str], *inputs: str, **options: str) -> str:
    """Run a command that must fail in `folder` and return what it says."""
    before = snapshot(folder)
    options = {"tokenizer": "train:300", "out": str(folder / "out"), "sequence-length": "16"} | options
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert main(["data", "prepare", "--input", *inputs, *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.endswith("\n")
    assert shown.err.count("\n") == 1, shown.err
    assert "Traceback" not in shown.err
    assert snapshot(folder) == before
    assert not (folder / "out").exists()
    return shown.err.removeprefix("tokenformer data: error: ")


def jsonl(*lines: str | bytes) -> bytes:
    return b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)


RECORD = json.dumps({"text": "some text"})
COMPRESSED = {".gz": gzip.compress, ".zst": zstandard.compress}
FILES = {
    "not JSON": ("a.jsonl", jsonl(RECORD, "{text: 1}"), "line 2 is not JSON"),
    "cut JSON": ("a.jsonl", jsonl(RECORD, RECORD, '{"text": "x'), "line 3 is not JSON"),
    "nested too deep": ("a.jsonl", jsonl(RECORD, "[" * 100_000), "line 2 is not JSON"),
    "JSON list": ("a.json", jsonl("[", RECORD), "line 1 is not JSON"),
    "JSON string": ("a.jsonl", jsonl(RECORD, '"text"'), "line 2 is not a JSON object"),
    "no field": (
        "a.jsonl",
        jsonl(RECORD, '{"id": 3, "body": "x"}'),
        "line 2 has no field 'text' (its fields: id, body)",
    ),
    "number": ("a.jsonl", jsonl(RECORD, "", '{"text": 3}'), "line 3: 'text' is int, not text"),
    "null": ("a.jsonl.gz", gzip.compress(jsonl(RECORD, '{"text": null}')), "line 2: 'text' is null, not text"),
    "half character": (
        "a.jsonl",
        jsonl(RECORD, r'{"text": "ab\ud83d"}'),
        "line 2: 'text' holds half of a surrogate pair",
    ),
    "JSON not UTF-8": ("a.jsonl", jsonl(RECORD, b'{"text": "\xff"}'), "line 2 is not UTF-8 at its byte 10"),
    "text not UTF-8": ("a.txt", b"one\ntwo\nth\xe9ee\n", "is not UTF-8 at byte 10 (line 3)"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "is not UTF-8 at byte 0"),
    "extension": ("a.csv", b"text\n", "extension that is not understood: use .txt"),
    "no extension": ("a", b"text\n", "extension that is not understood: use .txt"),
    "only compression": ("a.gz", gzip.compress(b"text"), "extension that is not understood: use .txt"),
    "compressed Parquet": ("a.parquet.gz", gzip.compress(b"text"), "extension that is not understood: use .txt"),
    "not gz": ("a.txt.gz", b"plain text", "is damaged or cut off"),
    "not zst": ("a.txt.zst", b"plain text", "is damaged or cut off"),
    "not Parquet": ("a.parquet", b"plain text", "is damaged or cut off"),
    "empty Parquet": ("a.parquet", b"", "is damaged or cut off"),
    "too little": ("a.jsonl", jsonl(RECORD, '{"text": "x"}'), "too little text: the "),
    "one short document": ("a.txt", b"short", "too little text: the held-out part has"),
    "all the same": ("a.jsonl", jsonl(*[RECORD] * 40), "too few different documents"),
} | {
    f"empty {name}": (name, data, "no text in the input")
    for name, data in {
        "a.txt": b"",
        "b.txt": b" \n\r\n\t",
        "a.jsonl": b"\n\n",
        "b.jsonl": jsonl('{"text": ""}', '{"text": " "}'),
        "a.txt.gz": gzip.compress(b""),
        "a.jsonl.zst": zstandard.compress(b"\n"),
    }.items()
}


@pytest.mark.parametrize(("name", "content", "message"), FILES.values(), ids=FILES)
def test_bad_file(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    error = run(tmp_path, capsys, str(tmp_path / name))
    assert message in error
    if not message.startswith("too"):  # those are about the corpus, not about one file
        assert f"'{tmp_path / name}'" in error


@pytest.mark.parametrize("last", [True, False])
def test_bad_file_among_good_ones(tmp_path, capsys, last):
    good = write_documents(tmp_path / "good.jsonl", GOOD)
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(jsonl(RECORD, "{"))
    inputs = [good, str(bad)] if last else [str(bad), good]
    assert f"'{bad}' line 2 is not JSON" in run(tmp_path, capsys, *inputs)


@pytest.mark.parametrize("format", ["txt", "jsonl"])
@pytest.mark.parametrize("ending", COMPRESSED)
@pytest.mark.parametrize("damage", ["cut off", "last byte gone", "garbage in the middle", "garbage at the end"])
def test_damaged_compressed_file(tmp_path, capsys, format, ending, damage):
    path = tmp_path / f"a.{format}{ending}"
    write_documents(path, ["".join(GOOD)] if format == "txt" else GOOD)
    data = bytearray(path.read_bytes())
    if damage == "garbage in the middle":
        data[len(data) // 2 : len(data) // 2 + 40] = b"\xa5" * 40
    elif damage == "garbage at the end":
        data += b"garbage"
    else:
        del data[-1 if damage == "last byte gone" else len(data) // 2 :]
    path.write_bytes(data)
    error = run(tmp_path, capsys, str(path))
    assert f"'{path}'" in error
    # Garbage may decompress, into something that is not text or not JSON.
    if damage != "garbage in the middle":
        assert "is damaged or cut off" in error


@pytest.mark.parametrize("damage", ["cut off", "pages"])
def test_damaged_parquet(tmp_path, capsys, damage):
    path = Path(write_documents(tmp_path / "a.parquet", GOOD))
    data = bytearray(path.read_bytes())
    if damage == "pages":
        data[4:400] = b"\xff" * 396
    else:
        del data[len(data) // 2 :]
    path.write_bytes(data)
    assert f"'{path}' is damaged or cut off" in run(tmp_path, capsys, str(path))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.table({"id": [1], "body": ["x"]}), "has no column 'text' (its columns: id, body): name the column with"),
        (pa.table({"text": [1, 2]}), "row 1: 'text' is int, not text"),
        (pa.table({"text": ["x", None]}), "row 2: 'text' is null, not text"),
        (pa.table({"text": pa.array([b"x", b"\xff"]).view(pa.string())}), "row 2 is not UTF-8"),
    ],
    ids=["no column", "number", "null", "not UTF-8"],
)
def test_bad_parquet_column(tmp_path, capsys, column, message):
    pq.write_table(column, tmp_path / "a.parquet")
    error = run(tmp_path, capsys, str(tmp_path / "a.parquet"))
    assert message in error
    assert f"'{tmp_path / 'a.parquet'}'" in error


def test_missing_file(tmp_path, capsys):
    path = str(tmp_path / "missing.jsonl")
    assert run(tmp_path, capsys, path) == f"file not found: '{path}'\n"


def test_folder_as_input(tmp_path, capsys):
    write_documents(tmp_path / "a.txt", GOOD)
    assert f"'{tmp_path}' is a folder: name the files in it, such as {tmp_path}/*.txt" in run(
        tmp_path, capsys, str(tmp_path)
    )


def test_pipe_as_input(tmp_path, capsys):
    os.mkfifo(tmp_path / "a.txt")
    assert "is a pipe or a device" in run(tmp_path, capsys, str(tmp_path / "a.txt"))


@pytest.mark.parametrize("opening", [1, 2], ids=["hashing", "reading"])
def test_file_without_permission(tmp_path, capsys, monkeypatch, opening):
    path = Path(write_documents(tmp_path / "a.txt", GOOD))
    calls = 0

    def refuse(file, *args, **kwargs):
        nonlocal calls
        if file == path:
            calls += 1
            if calls == opening:
                raise PermissionError(errno.EACCES, "Permission denied")
        return open_(file, *args, **kwargs)

    open_ = builtins.open
    monkeypatch.setattr(builtins, "open", refuse)
    assert run(tmp_path, capsys, str(path)) == f"cannot read '{path}': Permission denied\n"
    assert calls == opening


OPTIONS = {
    "zero length": ({"sequence-length": "0"}, "sequence length 0: a row needs at least 1 token"),
    "negative length": ({"sequence-length": "-5"}, "sequence length -5"),
    "length in words": ({"sequence-length": "long"}, "sequence_length: expected int, got 'long'"),
    "no workers": ({"workers": "0"}, "0 workers: give at least 1"),
    "negative workers": ({"workers": "-1"}, "-1 workers"),
    "nothing held out": ({"held-out": "0"}, "held-out fraction 0.0: it must lie between 0 and 1"),
    "all held out": ({"held-out": "1"}, "held-out fraction 1.0"),
    "held out nan": ({"held-out": "nan"}, "held_out: expected float, got 'nan'"),
    "negative held out": ({"held-out": "-0.1"}, "held-out fraction -0.1"),
    "small vocabulary": ({"tokenizer": "train:256"}, "need at least train:257"),
    "negative vocabulary": ({"tokenizer": "train:-1"}, "'-1' is not a vocabulary size: write for example train:4096"),
    "vocabulary in words": ({"tokenizer": "train:big"}, "'big' is not a vocabulary size"),
    "no vocabulary": ({"tokenizer": "train:"}, "'' is not a vocabulary size"),
    "missing tokenizer": ({"tokenizer": "nowhere/tokenizer.json"}, "no tokenizer at 'nowhere/tokenizer.json'"),
    "unknown format": ({"format": "parquet"}, "format: expected 'arrow', 'megatron', got 'parquet'"),
    "unknown option": ({"held-oud": "0.1"}, "did you mean '--held"),
    "row longer than the corpus": ({"sequence-length": "100000"}, "fewer than one row of 100000; add text"),
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS)
def test_bad_option(tmp_path, capsys, options, message):
    assert message in run(tmp_path, capsys, write_documents(tmp_path / "a.jsonl", GOOD), **options)


def test_folder_without_tokenizer(tmp_path, capsys):
    path = write_documents(tmp_path / "a.jsonl", GOOD)
    assert f"no tokenizer.json in the folder '{tmp_path}'" in run(tmp_path, capsys, path, tokenizer=str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"[1]"])
def test_file_that_is_no_tokenizer(tmp_path, capsys, content):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes(content)
    path = write_documents(tmp_path / "a.jsonl", GOOD)
    assert f"'{tokenizer}' is not a tokenizer.json" in run(tmp_path, capsys, path, tokenizer=str(tokenizer))


def test_tokenizer_without_end_token(tmp_path, capsys):
    tokenizer = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")).save(str(tokenizer))
    path = write_documents(tmp_path / "a.jsonl", GOOD)
    error = run(tmp_path, capsys, path, tokenizer=str(tokenizer))
    assert f"'{tokenizer}' has no end-of-text token" in error
    assert "eos_token" in error


@pytest.mark.parametrize("config", ["{", "[]"])
def test_damaged_tokenizer_config(tmp_path, capsys, config):
    Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(config)
    path = write_documents(tmp_path / "a.jsonl", GOOD)
    assert "tokenizer_config.json' is damaged" in run(tmp_path, capsys, path, tokenizer=str(tmp_path))


@pytest.mark.parametrize("inside", ["", "deeper/out"])
def test_file_in_place_of_the_folder(tmp_path, capsys, inside):
    path = write_documents(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "file").write_text("mine")
    error = run(tmp_path, capsys, path, out=str(tmp_path / "file" / inside))
    assert f"'{tmp_path / 'file'}' is a file; give another --out" in error


def test_folder_with_other_files(tmp_path, capsys):
    path = write_documents(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    error = run(tmp_path, capsys, path, out=str(tmp_path / "mine"))
    assert "is not empty and holds no preparation: give another --out" in error


def test_folder_that_cannot_be_made(tmp_path, capsys, monkeypatch):
    path = write_documents(tmp_path / "a.jsonl", GOOD)

    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert f"cannot write '{tmp_path / 'out'}': Permission denied" in run(tmp_path, capsys, path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["preprae"], "unknown verb 'data preprae': did you mean 'data prepare'?"),
        (["prepare", "--input"], "--input"),
        (["prepare", "--tokenizer", "train:300", "--out", "out"], "input"),
        (["prepare", "--input", "a.txt", "--out", "out"], "tokenizer"),
        (["prepare", "--input", "a.txt", "--tokenizer", "train:300"], "out"),
    ],
)
def test_incomplete_command(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path / "a.txt", GOOD)
    assert main(["data", *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
