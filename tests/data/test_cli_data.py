import re

import pytest
from corpora import make_documents, snapshot, write_documents

from tokenformer.cli import main
from tokenformer.data import PreparedData, prepare


def shown_by(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["data", *words]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_prepare(capsys, words):
    shown = shown_by(capsys, *words)
    assert re.search(r"^  prepare +tokenise", shown, re.MULTILINE)
    assert re.search(r"^  tokenformer data prepare --input", shown, re.MULTILINE)


def test_help_of_prepare(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["data", "prepare", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    options = "input tokenizer out sequence-length held-out text-field workers seed format"
    for option in options.split():
        assert f"--{option} " in shown
    assert "tokens in a row. (type: int, default: 512)" in shown
    assert "example: tokenformer data prepare --input" in shown


@pytest.mark.parametrize("format", ["arrow", "megatron"])
def test_command_does_what_the_function_does(tmp_path, capsys, format):
    texts = make_documents(40)
    inputs = [
        write_documents(tmp_path / name, part, "body")
        for name, part in (("a.jsonl", texts[:25]), ("b.json.gz", texts[25:]))
    ]
    options = {
        "tokenizer": "train:300",
        "sequence_length": 16,
        "held_out": 0.1,
        "text_field": "body",
        "workers": 2,
        "seed": 3,
        "format": format,
    }
    prepare(inputs, out=str(tmp_path / "function"), **options)
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    out = str(tmp_path / "command")
    first = shown_by(capsys, "prepare", "--input", *inputs, *words, "--out", out)
    assert snapshot(tmp_path / "command") == snapshot(tmp_path / "function")

    splits = PreparedData.load(out).manifest["splits"]
    for name, counts in splits.items():
        (line,) = (line for line in first.splitlines() if line.strip().startswith(name))
        numbers = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line)]
        assert numbers == [counts[key] for key in ("documents", "bytes", "tokens", "rows")] + [
            16,
            counts["dropped_tokens"],
        ]
    assert "next: tokenformer train" in first
    assert "already done" not in first

    again = shown_by(capsys, "prepare", "--input", *inputs, *words, "--out", out)
    assert again == f"already done, nothing was changed: {out}\n{first}"


def test_single_input_and_options_in_any_order(tmp_path, capsys):
    path = write_documents(tmp_path / "a.txt", ["\n".join(make_documents(30))])
    words = ["--tokenizer=train:300", "--sequence-length=8", f"--out={tmp_path / 'out'}", "--input", path]
    assert "split by tail" in shown_by(capsys, "prepare", *words)
