"""`data prepare --format megatron`: files that an independent reader understands, and the rows of the other format."""

import hashlib
import json
from pathlib import Path

import pytest
from corpora import make_documents, snapshot, write_documents
from megatron_files import read_pair, write_pair
from transformers import AutoTokenizer

from tokenformer.data import MegatronData, PreparedData, megatron_writer, packing, prepare
from tokenformer.errors import UserError

LENGTH = 32
OPTIONS = {"tokenizer": "train:300", "sequence_length": LENGTH, "held_out": 0.2, "progress": False}


def test_files_hold_the_documents(corpus, tmp_path):
    out = tmp_path / "out"
    manifest = prepare(corpus, out=str(out), format="megatron", **OPTIONS)
    texts = make_documents(30)
    by_hash = sorted(texts, key=lambda text: hashlib.sha256(f"0\n{text}".encode()).digest())
    expected = {"train": [text for text in texts if text not in by_hash[:6]]}
    expected["held_out"] = [text for text in texts if text in by_hash[:6]]

    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    for name, documents in expected.items():
        ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in documents]
        assert read_pair(out / name) == ids
        assert [found.tolist() for found in MegatronData.open(out / name)] == ids
        # The very bytes that the format asks for: 300 entries fit uint16, a document is one sequence.
        by_hand = write_pair(tmp_path / name, [[document] for document in ids])
        for ending in (".idx", ".bin"):
            assert (out / f"{name}{ending}").read_bytes() == Path(by_hand + ending).read_bytes()
        shards = manifest["splits"][name]["shards"]
        assert [(shard["file"], shard["bytes"], shard["sha256"]) for shard in shards] == [
            (file, len(data), hashlib.sha256(data).hexdigest())
            for file in (f"{name}.bin", f"{name}.idx")
            for data in [(out / file).read_bytes()]
        ]
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["held_out.bin", "held_out.idx", "manifest.json", "tokenizer", "train.bin", "train.idx"]
    )


@pytest.mark.parametrize("single", [True, False])
def test_rows_are_those_of_the_other_format(corpus, tmp_path, single):
    if single:  # one document, whose end is held out
        corpus = [write_documents(tmp_path / "a.txt", ["\n".join(make_documents(30))])]
    manifests = {
        format: prepare(corpus, out=str(tmp_path / format), format=format, **OPTIONS)
        for format in ("arrow", "megatron")
    }
    arrow, megatron = (PreparedData.load(tmp_path / format) for format in manifests)
    for name in ("train", "held_out"):
        rows, others = getattr(arrow, name), getattr(megatron, name)
        assert others["input_ids"][:] == rows["input_ids"][:]
        assert others.features == rows.features
        assert others.with_format("torch")[0]["input_ids"].tolist() == rows[0]["input_ids"]
        assert megatron.tokens_per_byte(name) == arrow.tokens_per_byte(name)
        del manifests["arrow"]["splits"][name]["shards"], manifests["megatron"]["splits"][name]["shards"]
    assert megatron.fingerprints == arrow.fingerprints
    assert snapshot(tmp_path / "megatron" / "tokenizer") == snapshot(tmp_path / "arrow" / "tokenizer")
    assert [manifest["options"].pop("format") for manifest in manifests.values()] == ["arrow", "megatron"]
    assert manifests["megatron"] == manifests["arrow"]


def test_files_do_not_depend_on_the_chunks(tmp_path, monkeypatch):
    corpus = [write_documents(tmp_path / "a.jsonl", make_documents(80))]
    prepare(corpus, out=str(tmp_path / "whole"), format="megatron", **OPTIONS)
    monkeypatch.setattr(packing, "CHUNK_BYTES", 700)
    monkeypatch.setattr(megatron_writer, "_BLOCK", 7)
    prepare(corpus, out=str(tmp_path / "cut"), format="megatron", workers=3, **OPTIONS)
    assert snapshot(tmp_path / "cut") == snapshot(tmp_path / "whole")


@pytest.mark.parametrize(("entries", "code"), [(65499, 8), (65500, 4), (70000, 4)])
def test_type_of_the_ids(tmp_path, entries, code):
    words = ["<unk>", "</s>", *(f"w{i}" for i in range(entries - 2))]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    path = write_documents(tmp_path / "a.jsonl", [f"{words[-1]} w{i}" for i in range(20)])
    options = OPTIONS | {"tokenizer": str(tmp_path), "sequence_length": 3}
    manifest = prepare([path], out=str(tmp_path / "out"), format="megatron", **options)
    assert manifest["dtype"] == {8: "uint16", 4: "int32"}[code]
    assert (tmp_path / "out" / "train.idx").read_bytes()[17] == code
    assert {tuple(ids[::2]) for ids in read_pair(tmp_path / "out" / "train")} == {(entries - 1, 1)}
    rows = PreparedData.load(tmp_path / "out").train
    assert {tuple(row["input_ids"][::2]) for row in rows} == {(entries - 1, 1)}


def test_document_longer_than_the_format_takes(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(megatron_writer, "MAX_LENGTH", 50)
    with pytest.raises(UserError, match=r"a document has [0-9]+ tokens, the Megatron format takes 50: split it"):
        prepare(corpus, out=str(tmp_path / "out"), format="megatron", **OPTIONS)


def test_unknown_format(corpus, tmp_path):
    with pytest.raises(UserError, match="no format 'parquet': use arrow or megatron"):
        prepare(corpus, out=str(tmp_path / "out"), format="parquet", **OPTIONS)
    assert not (tmp_path / "out").exists()
