import hashlib
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from corpora import make_documents
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tokenformer.data import tokenizer as tokenizer_module
from tokenformer.data import tokenizer_hash
from tokenformer.data.tokenizer import END_OF_TEXT, Encoder, TokenizerChoice, choose, pieces, tokenizer_config, train
from tokenformer.errors import UserError

TEXTS = make_documents(60)


@pytest.fixture(scope="module")
def trained() -> bytes:
    return train(TEXTS, 330)


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "tokenizer.json").write_bytes(trained)
    (path / "tokenizer_config.json").write_bytes(tokenizer_config(TokenizerChoice("train:330", 330)))
    return path


def word_tokenizer(path: Path, words: list[str], **config: object) -> str:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return str(path)


def test_vocabulary(trained):
    vocabulary = Tokenizer.from_str(trained.decode()).get_vocab()
    assert sorted(vocabulary.values()) == list(range(330))
    assert vocabulary[END_OF_TEXT] == 0
    assert sorted(vocabulary, key=vocabulary.__getitem__)[1:257] == sorted(pre_tokenizers.ByteLevel.alphabet())


def test_smallest_vocabulary_is_bytes():
    encoder = Encoder(train(TEXTS, 257), END_OF_TEXT, 1)
    assert encoder.vocab_size == 257
    assert [len(ids) for ids in encoder.encode(TEXTS[:3])] == [len(text.encode()) + 1 for text in TEXTS[:3]]


def test_training_depends_on_the_texts_only(trained):
    assert train(TEXTS[::-1], 330) == trained
    assert train(TEXTS[:30], 330) != trained


@given(st.text())
def test_round_trip(folder, text):
    tokenizer = _loaded(folder)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    "text",
    [
        "a , b ! I 'm here . n't",
        "  two  \n\n\n three\r\n\t ",
        "e\u0301 é 日本 🙂 \x00\ufeff\u2028",
        f"a{END_OF_TEXT} b",
    ],
)
@pytest.mark.parametrize("kind", [PreTrainedTokenizerFast, AutoTokenizer])
def test_round_trip_of_what_clean_up_would_change(folder, kind, text):
    tokenizer = kind.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token) == (END_OF_TEXT, 0, END_OF_TEXT)
    # This transformers never cleans up after byte-level BPE; older ones do unless told not to.
    assert tokenizer.clean_up_tokenization_spaces is False


_cache: dict[Path, PreTrainedTokenizerFast] = {}


def _loaded(folder: Path) -> PreTrainedTokenizerFast:
    if folder not in _cache:
        _cache[folder] = PreTrainedTokenizerFast.from_pretrained(folder)
    return _cache[folder]


@pytest.mark.parametrize("workers", [1, 3])
def test_encoder_against_one_text_at_a_time(trained, workers, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_GROUP_CHARACTERS", 300)
    plain = Tokenizer.from_str(trained.decode())
    expected = [[*plain.encode(text, add_special_tokens=False).ids, 0] for text in TEXTS]
    found = list(Encoder(trained, END_OF_TEXT, workers).encode(TEXTS))
    assert [ids.tolist() for ids in found] == expected
    assert {ids.dtype for ids in found} == {np.dtype(np.uint16)}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_are_the_threads_that_encode(trained, workers, monkeypatch):
    running, most, lock = 0, 0, threading.Lock()
    encode_group = Encoder._encode_group

    def counted(self, group):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        result = encode_group(self, group)
        with lock:
            running -= 1
        return result

    monkeypatch.setattr(Encoder, "_encode_group", counted)
    monkeypatch.setattr(tokenizer_module, "_GROUP_CHARACTERS", 1)
    list(Encoder(trained, END_OF_TEXT, workers).encode(TEXTS[:12]))
    assert most == workers


def test_long_text_in_pieces_has_the_same_ids(trained, monkeypatch):
    text = " ".join(TEXTS)
    (whole,) = Encoder(trained, END_OF_TEXT, 1).encode([text])
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 800)
    assert len(list(pieces(text))) > 5
    (cut,) = Encoder(trained, END_OF_TEXT, 2).encode([text])
    assert cut.tolist() == whole.tolist()


@pytest.mark.parametrize("text", ["日本" * 700, "x" * 1001, "a b" * 330, ""], ids=["cjk", "one word", "words", "empty"])
def test_pieces_add_up_to_the_text(text, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 200)
    found = list(pieces(text))
    assert "".join(found) == text
    assert max(map(len, found)) <= 200 + 200 // 16


def test_text_that_spells_the_end_token_is_text(trained):
    text = f"before {END_OF_TEXT} after"
    (ids,) = Encoder(trained, END_OF_TEXT, 1).encode([text])
    assert ids.tolist().index(0) == len(ids) - 1
    plain = Tokenizer.from_str(trained.decode())
    assert plain.decode(ids[:-1].tolist(), skip_special_tokens=False) == text


@pytest.mark.parametrize(("size", "dtype"), [(65536, "uint16"), (65537, "int32")])
def test_smallest_type_that_holds_the_vocabulary(tmp_path, size, dtype):
    words = [END_OF_TEXT, *(f"w{i}" for i in range(1, size))]
    choice = choose(word_tokenizer(tmp_path, words))
    encoder = Encoder(choice.given, choice.end_token, 1)
    assert (encoder.vocab_size, encoder.dtype) == (size, np.dtype(dtype))
    (ids,) = encoder.encode([f"w5 {words[-1]}"])
    assert ids.tolist() == [5, size - 1, 0]


def test_truncation_and_padding_of_the_file_are_ignored(trained):
    tokenizer = Tokenizer.from_str(trained.decode())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=1000)
    (ids,) = Encoder(tokenizer.to_str().encode(), END_OF_TEXT, 1).encode(TEXTS[:1])
    (expected,) = Encoder(trained, END_OF_TEXT, 1).encode(TEXTS[:1])
    assert ids.tolist() == expected.tolist()


def test_file_and_folder_are_the_same_choice(folder, trained):
    expected = hashlib.sha256(trained).hexdigest()
    for path in (folder, folder / "tokenizer.json"):
        assert choose(str(path)).label == tokenizer_hash(path) == tokenizer_hash(str(path)) == expected
        assert choose(str(path)).given == trained


@pytest.mark.parametrize(
    ("words", "config", "end", "start"),
    [
        (["<unk>", "</s>", "<s>"], {}, "</s>", "</s>"),
        (["<unk>", "</s>", "stop", "<s>"], {"eos_token": "stop", "bos_token": "<s>"}, "stop", "<s>"),
        (["<unk>", "</s>", "stop"], {"eos_token": {"content": "stop"}, "bos_token": None}, "stop", "stop"),
    ],
)
def test_end_token_of_a_given_tokenizer(tmp_path, words, config, end, start):
    choice = choose(word_tokenizer(tmp_path, words, **config))
    assert (choice.end_token, choice.start_token) == (end, start)


def test_end_token_that_is_not_in_the_vocabulary(tmp_path):
    path = word_tokenizer(tmp_path, ["<unk>", "</s>"], eos_token="<stop>")
    with pytest.raises(UserError, match="has no end-of-text token"):
        choose(path)


def test_train_option_with_leading_zeros_is_the_same_option():
    assert choose("train:0300") == choose("train:300")


def test_hash_of_a_missing_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json in the folder"):
        tokenizer_hash(tmp_path)
    with pytest.raises(UserError, match="no tokenizer at"):
        tokenizer_hash(tmp_path / "tokenizer.json")
