"""Perplexity on files, datasets and prepared folders: what is read, what is counted, what is refused."""

import gzip
import json
import math
import struct

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from saved_model import END, LINES, save_model, train_tokenizer
from tokenformer import UserError
from tokenformer.data import prepare
from tokenformer.evaluation import evaluate_sources, load_any_model, load_any_tokenizer, read_sources
from tokenformer.evaluation.text import TokenSource

TEXTS = [
    "the quick brown fox",
    "",
    " \n",
    "größer als 日本語 😀\nnaïve  café",
    f"the end {END} is only text here",
    "dog " * 60,
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    return folder, save_model(folder), train_tokenizer()


def write(path, texts=TEXTS):
    name = path.name
    if ".parquet" in name:
        pq.write_table(pa.table({"text": texts}), path)
        return str(path)
    data = texts[0] if ".txt" in name else "".join(json.dumps({"text": text}) + "\n" for text in texts)
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(data.encode()))
    return str(path)


def by_hand(model, tokenizer, text):
    """Nats and tokens of a text that fits into the window."""
    return nats_of_ids(model, tokenizer, tokenizer(text)["input_ids"])


def nats_of_ids(model, tokenizer, ids):
    ids = torch.tensor([[tokenizer.eos_token_id, *ids]])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return -logs.gather(1, ids[0, 1:, None]).sum().item(), ids.shape[1] - 1


# Figures


def test_figures_of_a_file(saved, tmp_path):
    _, model, tokenizer = saved
    text = "größer als 日本語 😀 \n the  fox"
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())  # a byte-order mark is no text
    nats, tokens = by_hand(model, tokenizer, text)
    results = evaluate_sources(model, tokenizer, read_sources([str(file)], tokenizer), word_level=True)
    assert results["tokens"] == tokens
    assert results["words"] == 6
    assert results["bytes"] == len(text.encode()) == 38
    assert results["documents"] == 1
    assert results["loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert results["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert results["bits_per_byte"] == pytest.approx(nats / math.log(2) / 38, rel=1e-6)
    assert results["word_perplexity"] == pytest.approx(math.exp(nats / 6), rel=1e-4)
    assert (results["context"], results["stride"]) == (64, 32)
    assert results["sources"] == [
        {"name": str(file), **{k: v for k, v in results.items() if k not in ("sources", "context", "stride")}}
    ]


def test_several_files_add_up(saved, tmp_path):
    _, model, tokenizer = saved
    files = [write(tmp_path / "a.txt"), write(tmp_path / "b.jsonl")]
    results = evaluate_sources(model, tokenizer, read_sources(files, tokenizer))
    first, second = results["sources"]
    assert [first["name"], second["name"]] == files
    for count in ("documents", "tokens", "words", "bytes"):
        assert results[count] == first[count] + second[count]
    nats = first["loss"] * first["tokens"] + second["loss"] * second["tokens"]
    assert results["loss"] == pytest.approx(nats / results["tokens"], rel=1e-12)
    assert "word_perplexity" not in results


@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz", "b.json.zst", "b.parquet"])
def test_formats_hold_the_same_documents(saved, tmp_path, name):
    tokenizer = saved[2]
    (source,) = read_sources([write(tmp_path / name)], tokenizer)
    assert [tokenizer.decode(ids) for ids in source.documents] == [text for text in TEXTS if text]
    assert source.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert source.num_words == 4 + 6 + 7 + 60


def test_text_that_spells_a_special_token_is_text(saved, tmp_path):
    tokenizer = saved[2]
    (source,) = read_sources([write(tmp_path / "a.txt", [f"a{END}b"])], tokenizer)
    (ids,) = source.documents
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == f"a{END}b"


def test_split_of_a_dataset_on_the_hub(saved, tmp_path, monkeypatch):
    tokenizer, load = saved[2], datasets.load_dataset
    files = {"train": write(tmp_path / "t.jsonl", ["training"]), "test": write(tmp_path / "e.jsonl", ["testing it"])}

    def load_dataset(name, split, streaming):
        assert name == "owner/corpus"
        return load("json", data_files=files, split=split, streaming=streaming, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for options, text in (({}, "testing it"), ({"split": "train"}, "training")):
        (source,) = read_sources(["owner/corpus"], tokenizer, **options)
        assert [tokenizer.decode(ids) for ids in source.documents] == [text]
    with pytest.raises(UserError, match='Unknown split "dev"'):
        read_sources(["owner/corpus"], tokenizer, split="dev")


# Token ids


def write_megatron(prefix, documents, dtype="<u2", code=8):
    """The pair of files, from the description of the format: one sequence for each document."""
    sizes = [len(document) for document in documents]
    width = np.dtype(dtype).itemsize
    with open(f"{prefix}.bin", "wb") as file:
        for document in documents:
            file.write(np.array(document, dtype=dtype).tobytes())
    with open(f"{prefix}.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(sizes), len(sizes) + 1))
        file.write(np.array(sizes, dtype="<i4").tobytes())
        file.write((np.cumsum([0, *sizes[:-1]]) * width).astype("<i8").tobytes())
        file.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())


@pytest.mark.parametrize("ending", [".idx", ".bin"])
def test_megatron_files_give_the_figures_of_their_text(saved, tmp_path, ending):
    _, model, tokenizer = saved
    texts, end = [text for text in TEXTS if text and END not in text], tokenizer.eos_token_id
    write_megatron(tmp_path / "m", [[*tokenizer(text)["input_ids"], end] for text in texts])
    sources = read_sources([str(tmp_path / f"m{ending}"), write(tmp_path / "t.jsonl", texts)], tokenizer)
    results = evaluate_sources(model, tokenizer, sources)
    ids, text = results["sources"]
    assert ids["loss"] == text["loss"]
    assert ids["tokens"] == text["tokens"]
    assert ids["bytes"] is ids["bits_per_byte"] is ids["words"] is results["bits_per_byte"] is None
    with pytest.raises(UserError, match="holds no words"):
        evaluate_sources(model, tokenizer, sources, word_level=True)


def test_megatron_files_of_another_vocabulary(saved, tmp_path):
    tokenizer = saved[2]
    write_megatron(tmp_path / "m", [[1, 2, len(tokenizer)]])
    with pytest.raises(UserError, match=str(len(tokenizer))):
        read_sources([str(tmp_path / "m.idx")], tokenizer)


@pytest.fixture(scope="module")
def prepared(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    texts = [f"{i} {LINES[i % 3]}" for i in range(40)]
    file = write(folder / "corpus.jsonl", texts)
    prepare([file], tokenizer=str(saved[0]), out=str(folder / "out"), sequence_length=100, held_out=0.3, progress=False)
    return folder / "out", texts


def test_held_out_part_of_a_prepared_folder(saved, prepared):
    _, model, tokenizer = saved
    folder, texts = prepared
    (source,) = read_sources([str(folder)], tokenizer)
    *whole, cut = [tokenizer.decode(ids) for ids in source.documents]
    assert len(whole) == 10
    assert set(whole) <= set(texts)
    assert any(text.startswith(cut.rstrip("\ufffd")) for text in texts)  # it may end within a character
    exact = sum(len(text.encode()) for text in [*whole, cut])
    assert source.num_bytes == pytest.approx(exact, rel=0.02)  # in proportion to the tokens; 12 % are cut off
    results = evaluate_sources(model, tokenizer, [source])
    expected = [by_hand(model, tokenizer, text) for text in whole]
    expected.append(nats_of_ids(model, tokenizer, source.documents[-1].tolist()))
    nats, tokens = map(sum, zip(*expected, strict=True))
    assert results["tokens"] == tokens
    assert results["loss"] == pytest.approx(nats / tokens, rel=1e-6)


def test_prepared_with_another_tokenizer(saved, tmp_path):
    file = write(tmp_path / "a.jsonl", ["one text", "another text", "a third"])
    prepare([file], tokenizer="train:257", out=str(tmp_path / "out"), sequence_length=4, held_out=0.4, progress=False)
    with pytest.raises(UserError, match="another tokenizer than the model's"):
        read_sources([str(tmp_path / "out")], saved[2])


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.txt", None, "file not found"),
        ("empty.txt", b"", "holds no text"),
        ("empty.jsonl", b"", "holds no text"),
        ("empty.jsonl", b'{"text": ""}\n', "holds no text"),
        ("latin.txt", b"caf\xe9", "not UTF-8 at byte 3"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', "line 2 is not JSON"),
        ("field.jsonl", b'{"body": "a"}\n', "no field 'text'"),
        ("page.html", b"<p>", "extension that is not understood"),
        ("cut.txt.gz", gzip.compress(b"text", mtime=0)[:-5], "damaged or cut off"),
    ],
)
def test_bad_files(saved, tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as raised:
        read_sources([str(tmp_path / name)], saved[2])
    assert name in str(raised.value)


def test_no_input_and_a_folder_that_was_not_prepared(saved, tmp_path):
    with pytest.raises(UserError, match="name at least one file"):
        read_sources([], saved[2])
    with pytest.raises(UserError, match="is a folder: name the files in it"):
        read_sources([str(tmp_path)], saved[2])


def test_batch_size_and_start_token(saved, tmp_path):
    _, model, tokenizer = saved
    sources = [TokenSource("x", [np.array([1, 2, 3])], 3, 1)]
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        evaluate_sources(model, tokenizer, sources, batch_size=0)
    nameless = train_tokenizer()
    nameless.bos_token = nameless.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token"):
        evaluate_sources(model, nameless, sources)


# Other models


def save_neox(folder, **fields):
    config = GPTNeoXConfig(
        **{
            "vocab_size": 320,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 48,
            "initializer_range": 0.3,
            **fields,
        }
    )
    model = GPTNeoXForCausalLM(config).eval()
    model.save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return model


def test_any_causal_model_of_transformers(tmp_path):
    model = save_neox(tmp_path)
    loaded, tokenizer = load_any_model(tmp_path), load_any_tokenizer(tmp_path)
    assert type(loaded) is GPTNeoXForCausalLM
    results = evaluate_sources(loaded, tokenizer, read_sources([write(tmp_path / "a.txt")], tokenizer))
    nats, tokens = by_hand(model, train_tokenizer(), TEXTS[0])
    assert results["loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert results["context"] == 48


def test_other_models_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        load_any_model(tmp_path / "absent")
    save_neox(tmp_path, vocab_size=200)
    with pytest.raises(UserError, match="vocab_size is 200"):
        load_any_tokenizer(tmp_path)
    with pytest.raises(UserError, match="unknown dtype 'int8'"):
        load_any_model(tmp_path, dtype="int8")
    with pytest.raises(UserError, match="device 'nowhere' cannot be used"):
        load_any_model(tmp_path, device="nowhere")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_any_tokenizer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot load the 'gpt_neox' model"):
        load_any_model(tmp_path)
