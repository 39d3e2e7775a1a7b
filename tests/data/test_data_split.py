import hashlib
import random
from pathlib import Path

import pytest
from corpora import make_documents, write_documents

from tokenformer.data import split as split_module
from tokenformer.data.documents import File, Source, open_sources
from tokenformer.data.split import Split
from tokenformer.errors import UserError


def ignore(_: int) -> None:
    pass


def sources_of(folder: Path, *files: list[str]) -> list[Source]:
    names = [write_documents(folder / f"{i}.jsonl", texts) for i, texts in enumerate(files)]
    return open_sources(names, "text")


def held_out_by_hand(texts: list[str], number: int, seed: int) -> set[str]:
    by_hash = sorted(texts, key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).hexdigest())
    return set(by_hash[:number])


@pytest.mark.parametrize(
    ("documents", "fraction", "number"),
    [(40, 0.1, 4), (40, 0.11, 4), (40, 0.9, 36), (40, 0.001, 1), (3, 0.99, 2), (2, 0.05, 1)],
)
@pytest.mark.parametrize("seed", [0, 7])
def test_smallest_hashes_are_held_out(tmp_path, documents, fraction, number, seed):
    texts = make_documents(documents)
    sources = sources_of(tmp_path, texts[:1], texts[1:])
    split = Split.scan(sources, fraction, seed, ignore)
    expected = held_out_by_hand(texts, number, seed)
    parts = list(split.parts(sources))
    assert [text for _, text in parts] == texts
    assert {text for name, text in parts if name == "held_out"} == expected
    assert (split.by, split.num_documents) == ("documents", [1, documents - 1])
    assert split.num_bytes == sum(len(text.encode()) for text in texts)


def test_split_does_not_depend_on_the_order(tmp_path):
    texts = make_documents(50)
    shuffled = random.Random(3).sample(texts, len(texts))
    found = []
    for name, order in (("a", texts), ("b", shuffled)):
        (tmp_path / name).mkdir()
        sources = sources_of(tmp_path / name, order[:20], order[20:])
        split = Split.scan(sources, 0.2, 0, ignore)
        found.append({text for name, text in split.parts(sources) if name == "held_out"})
    assert found[0] == found[1]
    assert len(found[0]) == 10


def test_identical_documents_are_on_the_same_side(tmp_path):
    texts = make_documents(20) * 3
    sources = sources_of(tmp_path, texts)
    for fraction in (0.04, 0.1, 0.31, 0.5):  # 60 documents: some of these cut through three copies
        parts = list(Split.scan(sources, fraction, 0, ignore).parts(sources))
        sides = {name: {text for side, text in parts if side == name} for name in ("train", "held_out")}
        assert not sides["train"] & sides["held_out"]
        assert sum(side == "held_out" for side, _ in parts) >= round(fraction * 60)


def test_identical_documents_only(tmp_path):
    sources = sources_of(tmp_path, ["same"] * 5)
    with pytest.raises(UserError, match="too few different documents"):
        Split.scan(sources, 0.2, 0, ignore)


def test_documents_without_text_do_not_count(tmp_path):
    texts = make_documents(10)
    sources = sources_of(tmp_path, ["", *texts[:4], " \n\t"], ["\u3000"], texts[4:])
    split = Split.scan(sources, 0.2, 0, ignore)
    assert (split.num_documents, split.num_empty) == ([4, 0, 6], 3)
    assert [text for _, text in split.parts(sources)] == texts


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.7])
@pytest.mark.parametrize(
    "text", ["".join(f"line {i} näïve\n" for i in range(200)), "日本" * 500], ids=["lines", "no lines"]
)
def test_single_document_is_split_by_its_tail(tmp_path, text, fraction):
    sources = open_sources([write_documents(tmp_path / "a.txt", [text])], "text")
    split = Split.scan(sources, fraction, 0, ignore)
    (train, head), (held_out, tail) = split.parts(sources)
    assert (train, held_out, split.by) == ("train", "held_out", "tail")
    assert head + tail == text
    assert len(tail) / len(text) == pytest.approx(fraction, abs=0.01)
    assert head.endswith("\n") or "\n" not in text
    assert list(split.parts(sources, skip=1)) == [("held_out", tail)]


def test_far_newline_does_not_move_the_cut(tmp_path):
    text = "title\n" + "x" * 994
    sources = open_sources([write_documents(tmp_path / "a.txt", [text])], "text")
    assert [len(part) for _, part in Split.scan(sources, 0.1, 0, ignore).parts(sources)] == [900, 100]


def test_skipping_reads_only_the_files_it_must(tmp_path, monkeypatch):
    texts = make_documents(12)
    sources = sources_of(tmp_path, texts[:5], [""], texts[5:9], texts[9:])
    split = Split.scan(sources, 0.2, 0, ignore)
    everything = list(split.parts(sources))
    assert [list(split.parts(sources, skip=skip)) for skip in range(13)] == [everything[skip:] for skip in range(13)]
    opened: list[str] = []
    documents = File.documents
    monkeypatch.setattr(
        File, "documents", lambda self, advance: opened.append(self.path.name) or documents(self, advance)
    )
    list(split.parts(sources, skip=10))
    assert opened == ["3.jsonl"]


def test_training_sample_of_a_small_corpus_is_all_training_text(tmp_path):
    texts = make_documents(40)
    sources = sources_of(tmp_path, texts)
    split = Split.scan(sources, 0.25, 0, ignore)
    read: list[int] = []
    assert list(split.training_sample(sources, read.append)) == [
        text for text in texts if text not in held_out_by_hand(texts, 10, 0)
    ]
    assert sum(read) == split.num_bytes


def test_training_sample_of_a_large_corpus_is_a_fraction(tmp_path, monkeypatch):
    texts = make_documents(600)
    sources = sources_of(tmp_path, texts)
    split = Split.scan(sources, 0.25, 0, ignore)
    monkeypatch.setattr(split_module, "TRAINING_SAMPLE_BYTES", split.num_bytes // 3)
    sample = list(split.training_sample(sources, ignore))
    assert not set(sample) & held_out_by_hand(texts, 150, 0)
    assert len(sample) == pytest.approx(200, abs=40)  # 600 / 3, four standard deviations of the hash
