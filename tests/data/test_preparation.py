import hashlib
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from corpora import make_documents, snapshot, write_documents
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tokenformer.data import PreparedData, packing, prepare, tokenizer_hash
from tokenformer.data.packing import pack
from tokenformer.errors import UserError

LENGTH = 32
OPTIONS = {"tokenizer": "train:300", "sequence_length": LENGTH, "held_out": 0.2, "progress": False}


def test_folder_holds_the_documents(corpus, tmp_path):
    out = tmp_path / "out"
    manifest = prepare(corpus, out=str(out), **OPTIONS)
    texts = make_documents(30)
    by_hash = sorted(texts, key=lambda text: hashlib.sha256(f"0\n{text}".encode()).digest())
    expected = {"train": [text for text in texts if text not in by_hash[:6]]}
    expected["held_out"] = [text for text in texts if text in by_hash[:6]]

    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    for name, documents in expected.items():
        counts = manifest["splits"][name]
        ids = [i for text in documents for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        rows = len(ids) // LENGTH
        dataset = datasets.load_from_disk(str(out / name))
        found = np.array(dataset["input_ids"])
        assert found.tolist() == np.array(ids[: rows * LENGTH]).reshape(rows, LENGTH).tolist()
        stream = tokenizer.eos_token.join(documents)
        decoded = tokenizer.decode(found.reshape(-1))
        # The last row may end within a character, which then decodes to a replacement character.
        assert decoded.rstrip("\ufffd") == stream[: len(decoded.rstrip("\ufffd"))]
        assert len(decoded) > 0.9 * len(stream)
        assert counts["documents"] == len(documents)
        assert counts["bytes"] == sum(len(text.encode()) for text in documents)
        assert (counts["tokens"], counts["rows"], counts["dropped_tokens"]) == (len(ids), rows, len(ids) % LENGTH)
        assert counts["sha256"] == hashlib.sha256(found.astype("<u2").tobytes()).hexdigest()
        assert [shard["bytes"] for shard in counts["shards"]] == [(out / name / "data-00000.arrow").stat().st_size]

    assert manifest == json.loads((out / "manifest.json").read_text())
    assert [(Path(file["name"]).name, file["sha256"], file["bytes"]) for file in manifest["files"]] == [
        (Path(path).name, hashlib.sha256(Path(path).read_bytes()).hexdigest(), Path(path).stat().st_size)
        for path in corpus
    ]
    assert manifest["tokenizer"] == {"sha256": tokenizer_hash(out / "tokenizer"), "vocab_size": 300}
    assert sorted(path.name for path in out.iterdir()) == ["held_out", "manifest.json", "tokenizer", "train"]


def test_rows_do_not_depend_on_the_chunks(tmp_path, monkeypatch):
    corpus = [write_documents(tmp_path / "a.jsonl", make_documents(80))]
    whole = prepare(corpus, out=str(tmp_path / "whole"), **OPTIONS)
    monkeypatch.setattr(packing, "CHUNK_BYTES", 700)
    cut = prepare(corpus, out=str(tmp_path / "cut"), workers=3, **OPTIONS)
    for name in ("train", "held_out"):
        shards = cut["splits"][name].pop("shards")
        del whole["splits"][name]["shards"]
        assert cut["splits"][name] == whole["splits"][name]
        assert len(shards) > 2
        loaded = datasets.load_from_disk(str(tmp_path / "cut" / name))
        assert loaded["input_ids"] == datasets.load_from_disk(str(tmp_path / "whole" / name))["input_ids"]


@pytest.mark.parametrize("size", [0, 1, 6, 7, 8, 20])
def test_pack(size):
    stream = np.arange(size, dtype=np.uint16)
    rows, rest = pack(stream[:3], [stream[3:5], stream[5:5], stream[5:]], 7)
    assert rows.shape == (size // 7, 7)
    assert [*rows.reshape(-1), *rest] == list(range(size))
    assert rows.dtype == rest.dtype == np.uint16


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_torch_reads_the_rows(tmp_path, dtype):
    words = ["<unk>", "</s>", *(f"w{i}" for i in range(70_000 if dtype == "int32" else 100))]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    texts = [f"{words[-1]} {words[-2]} w{i}" for i in range(50)]
    path = write_documents(tmp_path / "a.jsonl", texts)
    manifest = prepare(
        [path], out=str(tmp_path / "out"), **OPTIONS | {"tokenizer": str(tmp_path), "sequence_length": 4}
    )
    assert manifest["dtype"] == dtype
    data = PreparedData.load(tmp_path / "out")
    assert data.train.features["input_ids"].feature.dtype == dtype
    rows = data.train.with_format("torch")
    batch = next(iter(torch.utils.data.DataLoader(rows, batch_size=8)))["input_ids"]
    assert batch.dtype == torch.int64
    assert batch[:, [0, 1, 3]].tolist() == [[len(words) - 1, len(words) - 2, 1]] * 8


def test_given_tokenizer_is_kept_as_it_is(corpus, tmp_path):
    prepare(corpus, out=str(tmp_path / "first"), **OPTIONS)
    given = tmp_path / "first" / "tokenizer"
    again = prepare(corpus[:1], out=str(tmp_path / "second"), **OPTIONS | {"tokenizer": str(given)})
    assert snapshot(tmp_path / "second" / "tokenizer") == snapshot(given)
    assert again["tokenizer"]["sha256"] == tokenizer_hash(given)


def test_tokenizer_is_trained_on_training_documents_only(tmp_path):
    draw = random.Random(0)
    # Each document has its own word, so frequent that it becomes a token if the document is seen.
    own = ["".join(draw.choices("bcdfghjklm", k=8)) for _ in range(30)]
    texts = [f"{i}" + f" {word}" * 50 for i, word in enumerate(own)]
    path = write_documents(tmp_path / "a.jsonl", texts)
    prepare([path], out=str(tmp_path / "out"), **OPTIONS | {"tokenizer": "train:1000"})
    vocabulary = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer" / "tokenizer.json")).get_vocab()
    by_hash = sorted(texts, key=lambda text: hashlib.sha256(f"0\n{text}".encode()).digest())
    assert [f"Ġ{word}" in vocabulary for word in own] == [text not in by_hash[:6] for text in texts]


def test_single_document(tmp_path):
    text = "\n".join(make_documents(20))
    path = write_documents(tmp_path / "a.txt", [text])
    manifest = prepare([path], out=str(tmp_path / "out"), **OPTIONS)
    assert manifest["split_by"] == "tail"
    splits = manifest["splits"]
    assert splits["train"]["bytes"] + splits["held_out"]["bytes"] == len(text.encode())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    head = tokenizer.decode(
        [i for row in datasets.load_from_disk(str(tmp_path / "out" / "train")) for i in row["input_ids"]]
    )
    tail = tokenizer.decode(datasets.load_from_disk(str(tmp_path / "out" / "held_out"))[0]["input_ids"])
    assert text.startswith(head.rstrip("\ufffd"))
    assert text.encode()[splits["train"]["bytes"] :].decode().startswith(tail.rstrip("\ufffd"))


def test_finished_folder_is_left_alone(corpus, tmp_path):
    out = tmp_path / "out"
    manifest = prepare(corpus, out=str(out), **OPTIONS)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    content = snapshot(out)
    moved = [str(Path(path).rename(Path(path).with_name(f"moved-{Path(path).name}"))) for path in corpus]
    assert prepare(moved, out=str(out), workers=1, **OPTIONS) == manifest
    assert snapshot(out) == content
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 16}, "sequence length 32, not 16"),
        ({"held_out": 0.3}, r"held out 0\.2, not 0\.3"),
        ({"seed": 5}, "seed 0, not 5"),
        ({"text_field": "id"}, "text field text, not id"),
        ({"tokenizer": "train:301"}, "tokenizer train:300, not train:301"),
        ({"format": "megatron"}, "format arrow, not megatron"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_folder_of_another_preparation_is_refused(corpus, tmp_path, change, message):
    out = tmp_path / "out"
    prepare(corpus, out=str(out), **OPTIONS)
    before = snapshot(out)
    with pytest.raises(UserError, match=rf"holds another preparation \({message}\)"):
        prepare(corpus, out=str(out), **OPTIONS | change)
    assert snapshot(out) == before


@pytest.mark.parametrize("change", ["fewer", "order", "content"])
def test_folder_of_other_inputs_is_refused(corpus, tmp_path, change):
    out = tmp_path / "out"
    prepare(corpus, out=str(out), **OPTIONS)
    before = snapshot(out)
    if change == "content":
        Path(corpus[1]).write_text("another text")
    inputs = {"fewer": corpus[:2], "order": corpus[::-1], "content": corpus}[change]
    with pytest.raises(UserError, match=r"holds another preparation \(other input files\)"):
        prepare(inputs, out=str(out), **OPTIONS)
    assert snapshot(out) == before


def test_damaged_finished_folder_is_not_called_done(corpus, tmp_path):
    prepare(corpus, out=str(tmp_path / "out"), **OPTIONS)
    (tmp_path / "out" / "train" / "data-00000.arrow").write_bytes(b"")
    with pytest.raises(UserError, match=r"is damaged .* delete the folder"):
        prepare(corpus, out=str(tmp_path / "out"), **OPTIONS)


def test_import_is_light():
    code = "import sys, tokenformer.data; print({'torch', 'datasets', 'transformers', 'pyarrow'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "set()\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("progress", [True, False])
def test_progress_of_every_pass_on_a_terminal(corpus, tmp_path, monkeypatch, progress):
    monkeypatch.setattr(sys, "stderr", Terminal())
    prepare(corpus, out=str(tmp_path / "out"), **OPTIONS | {"progress": progress})
    shown = sys.stderr.getvalue()
    assert [word in shown for word in ("checking", "reading", "training the tokenizer", "tokenising")] == [progress] * 4


def test_progress_is_silent_without_a_terminal(corpus, tmp_path, capsys):
    prepare(corpus, out=str(tmp_path / "out"), **OPTIONS | {"progress": True})
    assert capsys.readouterr() == ("", "")
