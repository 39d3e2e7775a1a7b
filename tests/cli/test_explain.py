"""`tokenformer explain` and `explore`: what they write, print and refuse."""

import json
import socket
import subprocess
import sys

import pytest
import torch

from saved_model import LINES, save_model
from tokenformer.cli import main
from tokenformer.interpret.explain import explain_text

TOKEN = "1.ffn/base/3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("explain")
    torch.manual_seed(0)
    save_model(place / "model", grown=True)
    save_model(place / "other")
    (place / "corpus.txt").write_text("\n".join(LINES * 4), encoding="utf-8")
    return place / "model"


def run(capsys, *argv):
    capsys.readouterr()
    assert main([*map(str, argv), "--threads", "1"]) == 0
    return capsys.readouterr().out


def refused(capsys, *argv):
    capsys.readouterr()
    assert main(list(map(str, argv))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"tokenformer {argv[0]}: error: ")
    assert err.count("\n") == 1
    return err


def test_summary_and_json(capsys, folder, tmp_path):
    from tokenformer.models.loading import load_model, load_tokenizer

    expected = explain_text(load_model(folder), load_tokenizer(folder), LINES[0], position=3)
    out = run(capsys, "explain", folder, "--text", LINES[0], "--position", 3, "--change", f"off {TOKEN}")
    first = expected["positions"][3]["predictions"][0]
    assert f"{first['probability']:6.1%}  {first['piece']!r}" in out
    assert expected["attribution"][0]["address"] in out
    assert f"With off model.layers.{TOKEN}:" in out
    assert all(note in out for note in expected["notes"])
    file = tmp_path / "found.json"
    run(capsys, "explain", folder, "--text", LINES[0], "--position", 3, "--json", file)
    assert json.loads(file.read_text(encoding="utf-8")) == expected


def test_index_then_page(capsys, folder, tmp_path):
    index, page = tmp_path / "index", tmp_path / "page.html"
    corpus = folder.parent / "corpus.txt"
    out = run(capsys, "explain", folder, "--data", corpus, "--index", index, "--contexts", 2)
    assert out.endswith(f"tokens read: {index}\n")
    out = run(capsys, "explain", folder, "--text", LINES[0], "--index", index, "--out", page)
    assert out == f"page: {page}\n"
    assert page.read_text(encoding="utf-8").count('"contexts":[{"before"') > 0
    error = refused(capsys, "explain", folder.parent / "other", "--text", "fox", "--index", index, "--out", page)
    assert "is an index of another model" in error
    assert "is an index of another model" in refused(
        capsys, "explore", folder.parent / "other", "--index", index, "--port", 0
    )


def test_lineage(capsys, folder, tmp_path):
    page, corpus = tmp_path / "page.html", folder.parent / "corpus.txt"
    run(capsys, "explain", folder, "--before", folder, "--data", corpus, "--num-rows", 4, "--out", page)
    assert "Before and after" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "there is nothing to explain: give one of --text TEXT"),
        (["--data", "x"], "there is nothing to explain"),
        (["--text", "a", "--before", "x"], "--text and --before were given"),
        (["--text", "a", "--data", "x"], "--data does not belong to --text"),
        (["--before", "x"], "--before needs --data"),
        (["--index", "x"], "--index needs --data"),
        (["--faithfulness", "x.json"], "--faithfulness needs --data"),
        (["--data", "x", "--index", "y", "--out", "p.html"], "--out does not belong to --index"),
        (["--data", "x", "--index", "y", "--position", "1"], "--position does not belong to --index"),
        (["--text", ""], "the text is empty"),
        (["--text", "fox " * 500], "tokens"),
        (["--text", "fox", "--position", "99"], "position 99 is outside of the text"),
        (["--text", "fox", "--target", "the quick"], "tokens: give text that is one"),
        (["--text", "fox", "--change", "burn 1.ffn"], "'burn 1.ffn' is no change"),
        (["--text", "fox", "--change", "off 9.ffn/base/1"], "9.ffn"),
        (["--text", "fox", "--out", "absent/page.html"], "--out: 'absent/page.html' cannot be written"),
        (["--text", "fox", "--json", "absent/page.json"], "--json: 'absent/page.json' cannot be written"),
        (["--txt", "fox"], "did you mean '--text'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input(capsys, folder, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, "explain", folder, *options)
    assert list(tmp_path.iterdir()) == []


def test_missing_plotly(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tokenformer.errors.find_spec", lambda name: None)
    error = refused(capsys, "explain", folder, "--text", "fox", "--out", tmp_path / "page.html")
    assert "this needs plotly, which is not installed: pip install 'tokenformer[explain]'" in error
    assert "pip install 'tokenformer[explain]'" in refused(capsys, "explore", folder)


def test_port_in_use(capsys, folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "choose another --port" in refused(capsys, "explore", folder, "--port", taken.getsockname()[1])


@pytest.mark.parametrize("verb", ["explain", "explore"])
def test_help_is_light(verb):
    code = (
        "import sys; from tokenformer.cli import main\n"
        f"try: main(['{verb}', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'plotly', 'fastapi', 'uvicorn', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.rstrip().endswith("[]")
    assert f"\n  tokenformer {verb} " in done.stdout
