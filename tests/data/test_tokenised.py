"""Tokenised files as training data: the tokenizer, the held-out part and the rows that are chosen for them."""

import json
from pathlib import Path

import pytest
from corpora import make_documents, write_documents
from megatron_files import read_pair, write_pair

from tokenformer.data import PreparedData, megatron, open_data, prepare, tokenised
from tokenformer.errors import UserError

LENGTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A prepared folder, whose files stand for some that were made elsewhere."""
    folder = tmp_path_factory.mktemp("prepared")
    options = {"tokenizer": "train:300", "sequence_length": LENGTH, "held_out": 0.2, "progress": False}
    path = write_documents(folder / "a.jsonl", make_documents(30))
    prepare([path], out=str(folder / "out"), format="megatron", **options)
    return folder / "out"


@pytest.mark.parametrize("tokenizer", ["tokenizer", "tokenizer/tokenizer.json"])
def test_files_with_their_held_out_files(folder, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(tokenised, "_BATCH", 100)
    data = open_data(
        folder / "train.bin",
        tokenizer=str(folder / tokenizer),
        held_out=str(folder / "held_out"),
        sequence_length=LENGTH,
    )
    prepared = PreparedData.load(folder)
    for name in ("train", "held_out"):
        assert getattr(data, name)["input_ids"][:] == getattr(prepared, name)["input_ids"][:]
        # Byte-level BPE gives back the very text, whose bytes were counted when it was prepared.
        assert data.tokens_per_byte(name) == prepared.tokens_per_byte(name)
    for name in ("tokenizer_hash", "vocab_size", "sequence_length"):
        assert getattr(data, name) == getattr(prepared, name)
    assert data.tokenizer.get_vocab() == prepared.tokenizer.get_vocab()
    assert data.tokenizer.special_tokens_map == prepared.tokenizer.special_tokens_map
    assert set(data.fingerprints) == {"train", "held_out", "tokenizer"}
    assert data.fingerprints["train"] != data.fingerprints["held_out"]
    data.save_tokenizer(tmp_path / "data")
    prepared.save_tokenizer(tmp_path / "prepared")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "data" / file).read_bytes() == (tmp_path / "prepared" / file).read_bytes()
    with pytest.raises(UserError, match="no split 'test'"):
        data.tokens_per_byte("test")


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 12), (0.25, 6), (0.1, 2), (0.001, 1), (0.999, 23), (None, 1)])
def test_last_documents_are_held_out(folder, fraction, count):
    data = open_data(folder / "train", tokenizer=str(folder / "tokenizer"), held_out=fraction, sequence_length=LENGTH)
    documents = read_pair(folder / "train")
    assert len(documents) == 24
    for rows, part in ((data.train, documents[:-count]), (data.held_out, documents[-count:])):
        stream = [id_ for ids in part for id_ in ids]
        expected = [stream[at : at + LENGTH] for at in range(0, len(stream) - LENGTH + 1, LENGTH)]
        assert rows["input_ids"][:] == expected


def test_folder_with_what_it_knows_already(folder):
    data = open_data(folder, tokenizer=str(folder / "tokenizer" / "tokenizer.json"), sequence_length=LENGTH)
    assert isinstance(data, PreparedData)
    assert len(open_data(folder).train) == len(data.train)


def given(**options: object) -> dict[str, object]:
    return {"path": "train", "tokenizer": "tokenizer", "sequence_length": LENGTH, "held_out": "held_out"} | options


REFUSED = {
    "no tokenizer": (given(tokenizer=None), "data.tokenizer: give the tokenizer.json that '.*train' was made with"),
    "tokenizer to train": (given(tokenizer="train:300"), "data.tokenizer 'train:300': give the tokenizer.json"),
    "missing tokenizer": (given(tokenizer="nowhere"), "no tokenizer at '.*nowhere'"),
    "no length": (given(sequence_length=None), "data.sequence_length: '.*train' is not cut into rows"),
    "zero length": (given(sequence_length=0), "data.sequence_length 0: a row needs at least 1 token"),
    "long rows": (
        given(sequence_length=10**6),
        "the train part of '.*train.bin' has .*, fewer than one row of 10{6}",
    ),
    "long rows held out": (
        given(held_out=0.001, sequence_length=200),
        "the held-out part of '.*train.bin' has [0-9]+ tokens, fewer than one row of 200: lower data.sequence_length",
    ),
    "missing files": (given(path="nothing"), "no file '.*nothing.idx': tokenised data is a pair of files"),
    "missing folder": (given(path="nothing", tokenizer=None), "no prepared data at '.*nothing'"),
    "missing held-out files": (given(held_out="nothing"), "no file '.*nothing.idx'"),
    "held out what is trained on": (given(held_out="../out/train.idx"), "is what is trained on: give another pair"),
    "nothing held out": (given(held_out=0.0), "data.held_out 0.0: give a fraction between 0 and 1"),
    "all held out": (given(held_out=1), "data.held_out 1: give a fraction between 0 and 1"),
    "fraction nan": (given(held_out=float("nan")), "data.held_out nan: give a fraction"),
    "folder with another length": (
        given(path=".", tokenizer=None, held_out=None, sequence_length=8),
        "data.sequence_length 8: '.*' was prepared in rows of 16; leave it out",
    ),
    "folder with a held-out part": (given(path=".", tokenizer=None, held_out=0.1), "has a held-out part of its own"),
    "folder with another tokenizer": (
        given(path=".", tokenizer="other.json", held_out=None),
        "data.tokenizer '.*other.json': '.*' was prepared with another one; leave it out",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_options_that_cannot_be(folder, options, message):
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_bytes())
    (folder / "other.json").write_text(json.dumps(tokenizer))  # the same, but not the same file
    options = {
        name: str(folder / value) if isinstance(value, str) and ":" not in value else value
        for name, value in options.items()
    }
    with pytest.raises(UserError, match=message) as raised:
        open_data(**options)
    assert "\n" not in str(raised.value)


def test_single_document_has_no_last_ones(folder, tmp_path):
    pair = write_pair(tmp_path / "x", [[list(range(100))]])
    with pytest.raises(UserError, match=r"x.bin' is a single document: give another pair as data.held_out"):
        open_data(pair, tokenizer=str(folder / "tokenizer"), sequence_length=LENGTH)


def test_tokenizer_of_another_vocabulary(folder, tmp_path, monkeypatch):
    ids = [[[*range(100)]], [[*range(290, 301), *range(100)]], [[*range(100)]]]
    options = {"tokenizer": str(folder / "tokenizer"), "sequence_length": LENGTH, "held_out": 0.4}
    with pytest.raises(UserError, match=r"the id 300 at token 110, outside the vocabulary of 300: it was made with"):
        open_data(write_pair(tmp_path / "x", ids), **options)
    monkeypatch.setattr(megatron, "_SAMPLE_PIECES", 2)
    monkeypatch.setattr(megatron, "_SAMPLE_PIECE", 2)
    rows = open_data(tmp_path / "x", **options).train
    assert rows[0]["input_ids"] == list(range(16))
    with pytest.raises(UserError, match=r"x.bin' holds the id 300, outside the vocabulary of 300"):
        rows[6]


def test_text_of_end_tokens_only(folder, tmp_path):
    data = open_data(
        write_pair(tmp_path / "x", [[[5] * 40], [[0] * 40]]),
        tokenizer=str(folder / "tokenizer"),
        sequence_length=LENGTH,
    )
    assert data.tokens_per_byte("train") > 0
    with pytest.raises(UserError, match=r"the held-out part of '.*x.bin' decodes to no text"):
        data.tokens_per_byte("held_out")
