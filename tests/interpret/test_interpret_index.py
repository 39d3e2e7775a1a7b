"""The corpus index against all weights held at once, and against being interrupted, damaged or mistaken."""

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saved_model import LINES, save_model, train_tokenizer
from tiny_vision import tiny_classifier
from tokenformer.data import PreparedData, prepare
from tokenformer.errors import UserError
from tokenformer.interpret import building
from tokenformer.interpret.building import build_index
from tokenformer.interpret.contexts import pieces
from tokenformer.interpret.index import Index


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """A grown model in a folder, its tokenizer and a text of several rows."""
    model = save_model(tmp_path / "model", grown=True).eval()
    (tmp_path / "text.txt").write_text("\n".join(LINES * 20), encoding="utf-8")
    return {
        "model": model,
        "tokenizer": train_tokenizer(),
        "data": tmp_path / "text.txt",
        "model_folder": tmp_path / "model",
        "contexts": 3,
        "batch_size": 4,
        "progress": False,
    }


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_statistics_and_contexts_equal_those_of_all_weights_at_once(given: dict[str, Any], tmp_path: Path) -> None:
    index = build_index(folder=tmp_path / "index", **given)
    layer = given["model"].model.layers[1].ffn
    seen: list[np.ndarray] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double().numpy()))
    given["model"](index.rows.long())
    hook.remove()
    names = list(layer.segments)
    keys = np.concatenate([layer.segments[name].key.detach().double().numpy() for name in names])
    scores = seen[0] @ keys.T
    scaled = layer.scale.item() * scores / np.sqrt((scores**2).sum(-1, keepdims=True) + 1e-12)
    weights = torch.nn.functional.gelu(torch.from_numpy(scaled)).numpy()
    start = 0
    for name in names:
        count = layer.segments[name].num_tokens
        mine = weights[..., start : start + count]
        start += count
        found = index.statistics("model.layers.1.ffn", name)
        np.testing.assert_allclose(found["mean"], mine.mean((0, 1)), atol=1e-6)
        np.testing.assert_allclose(found["rms"], np.sqrt((mine**2).mean((0, 1))), atol=1e-6)
        np.testing.assert_allclose(found["max"], mine.max((0, 1)), atol=1e-5)
        np.testing.assert_allclose(found["active"], (np.abs(mine) > 0.1).mean((0, 1)), atol=2 / index.rows.numel())
        for token in range(count):
            best = mine[..., token].max(1)
            got = index.contexts(f"model.layers.1.ffn/{name}/{token}")
            np.testing.assert_allclose([c["weight"] for c in got], np.sort(best)[::-1][:3], atol=1e-5)
            assert all(np.isclose(mine[c["row"], c["position"], token], c["weight"], atol=1e-5) for c in got)


def test_equal_weights_go_to_the_earlier_row_and_position() -> None:
    from tokenformer.interpret.tallies import Tally

    tally = Tally(1, 2)
    for first in (0, 2):
        tally.add(torch.tensor([[1.0, 1.0], [2.0, 2.0]])[..., None], first)
    assert tally.tensors["row"].tolist() == [[1, 3]]
    assert tally.tensors["position"].tolist() == [[0, 0]]


@pytest.mark.parametrize("batches", [1, 3])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    build_index(folder=tmp_path / "whole", **given)
    add_rows, calls = building.add_rows, []

    def stopping(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return add_rows(*args)

    with monkeypatch.context() as patch:
        patch.setattr(building, "add_rows", stopping)
        with pytest.raises(KeyboardInterrupt):
            build_index(folder=tmp_path / "index", save_every=0, **given)
    with pytest.raises(UserError, match="unfinished"):
        Index.open(tmp_path / "index", given["model_folder"])
    build_index(folder=tmp_path / "index", **given)
    assert _files(tmp_path / "index") == _files(tmp_path / "whole")


def test_what_is_wrong_with_a_folder_is_named(given: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "index"
    build_index(folder=folder, **given)
    save_model(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(UserError, match=r"another model .*'model', not 'other'"):
        Index.open(folder, tmp_path / "other")
    with pytest.raises(UserError, match="another options"):
        build_index(folder=folder, **{**given, "contexts": 4})
    with pytest.raises(UserError, match="exists already"):
        build_index(folder=tmp_path / "model", **given)
    with pytest.raises(UserError, match="has tokens 0 to"):
        Index.open(folder, given["model_folder"]).contexts("model.layers.0.ffn/base/999")
    file = next(folder.glob("tokens-*"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="missing or damaged"):
        Index.open(folder, given["model_folder"])


def test_empty_text_is_refused_and_nothing_written(given: dict[str, Any], tmp_path: Path) -> None:
    given["data"].write_text("", encoding="utf-8")
    with pytest.raises(UserError):
        build_index(folder=tmp_path / "index", **given)
    assert not (tmp_path / "index").exists()


def test_a_classifier_reads_no_text(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reads no text: give a language model"):
        build_index(folder=tmp_path / "index", **{**given, "model": tiny_classifier()})
    assert not (tmp_path / "index").exists()


def test_pieces_join_to_the_text_though_characters_are_spread_over_tokens() -> None:
    tokenizer = train_tokenizer()
    text = " größer 🦊 日本 x"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text) / 2
    assert "".join(pieces(tokenizer, ids)) == text


def test_a_killed_run_goes_on_to_the_same_bytes(given: dict[str, Any], tmp_path: Path) -> None:
    script = """
import os, signal, sys
from tokenformer.interpret import building
from tokenformer.models.loading import load_model, load_tokenizer

write, calls = building._write_manifest, []
def dying(*args):
    write(*args)
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
building._write_manifest = dying
model, data, folder = sys.argv[1:]
building.build_index(
    load_model(model), load_tokenizer(model), data, folder, model_folder=model, contexts=3, batch_size=4, save_every=0
)
"""
    folder = given["model_folder"]
    ran = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(given["data"]), str(tmp_path / "index")],
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()
    state = json.loads((tmp_path / "index" / "index.json").read_text(encoding="utf-8"))["rows"]
    assert 0 < state["done"] < state["total"]
    build_index(folder=tmp_path / "index", **given)
    build_index(folder=tmp_path / "whole", **given)
    assert _files(tmp_path / "index") == _files(tmp_path / "whole")


@pytest.mark.parametrize("file", ["tokens", "index.json"])
def test_a_full_disk_is_one_line_and_leaves_what_was_saved(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    calls: list[int] = []

    def limited(write: Callable[..., Any], room: int) -> Callable[..., Any]:
        def writing(*args: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) > room:
                raise full
            return write(*args, **options)

        return writing

    with monkeypatch.context() as patch:
        if file == "tokens":
            patch.setattr(building, "save_file", limited(building.save_file, 2))  # the rows, and once the tokens
        else:
            patch.setattr(Path, "write_text", limited(Path.write_text, 2))
        with pytest.raises(UserError, match="no space left on the device") as raised:
            build_index(folder=tmp_path / "index", save_every=0, **given)
    assert "\n" not in str(raised.value)
    state = json.loads((tmp_path / "index" / "index.json").read_text(encoding="utf-8"))
    assert state["rows"]["done"] == 4
    build_index(folder=tmp_path / "index", **given)
    build_index(folder=tmp_path / "whole", **given)
    assert _files(tmp_path / "index") == _files(tmp_path / "whole")


def test_rows_of_a_prepared_folder_and_one_of_another_tokenizer(given: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "corpus.jsonl"
    source.write_text("\n".join(json.dumps({"text": line}) for line in LINES * 20), encoding="utf-8")
    options: dict[str, Any] = {"sequence_length": 32, "held_out": 0.2, "progress": False}
    prepare([str(source)], tokenizer=str(given["model_folder"]), out=str(tmp_path / "mine"), **options)
    index = build_index(folder=tmp_path / "index", num_tokens=4 * 32, **{**given, "data": tmp_path / "mine"})
    train = PreparedData.load(tmp_path / "mine").train
    assert len(train) > 8
    assert index.rows.tolist() == [train[i * len(train) // 4]["input_ids"] for i in range(4)]
    prepare([str(source)], tokenizer="train:270", out=str(tmp_path / "other"), **options)
    with pytest.raises(UserError, match="another tokenizer than the model's"):
        build_index(folder=tmp_path / "second", **{**given, "data": tmp_path / "other"})
    assert not (tmp_path / "second").exists()


def test_dead_and_always_on_tokens(given: dict[str, Any], tmp_path: Path) -> None:
    model, folder = given["model"], given["model_folder"]
    with torch.no_grad():
        layer = model.model.layers[0].ffn
        layer.segments["base"].key.zero_()
        layer.segments["grown1"].key.zero_()
        key = torch.randn(layer.in_features)
        layer.segments["base"].key[3], layer.segments["base"].key[5] = key, -key
        layer.scale.fill_(8.0)
    model.save_pretrained(folder)
    index = build_index(folder=tmp_path / "index", **given)
    # Each score is plus or minus 1 / sqrt(2) of the norm: one of the two weights is gelu(5.7), the other about 0.
    assert index.dead("model.layers.0.ffn", "base") == [i for i in range(20) if i not in (3, 5)]
    assert index.dead("model.layers.0.ffn", "grown1") == list(range(12))
    active = index.statistics("model.layers.0.ffn", "base")["active"]
    assert (active[3] + active[5]).item() == pytest.approx(1)
    with torch.no_grad():
        layer.normalization = "softmax"  # where no key wins, all weights are equal
        layer.segments["base"].key.zero_()
        layer.scale.fill_(32.0)
    model.save_pretrained(folder)
    index = build_index(folder=tmp_path / "second", **given)
    assert index.always_on("model.layers.0.ffn", "base") == list(range(20))
    assert index.dead("model.layers.0.ffn", "base") == []
