"""`tokenformer bench long-context` on models that take no time."""

import json

import pytest

from tiny import tiny_config
from tokenformer import UserError
from tokenformer.benchmarks import long_context as bench
from tokenformer.cli import main

CONFIG = tiny_config(segments=[{"name": "base", "qkv": 24, "output": 20, "ffn": 100}])
SMALL = ["--lengths", "4,8", "--tokens", "16", "--threads", "1", "--repeats", "2", "--dtypes", "float32"]


def refused(capsys, *argv):
    assert main(["bench", "long-context", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tokenformer bench: error: ")
    assert err.count("\n") == 1
    return err


def test_record_tables_and_picture(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "default_config", lambda: CONFIG)
    file, picture = tmp_path / "record.json", tmp_path / "picture.png"
    files = ["--json", str(file), "--picture", str(picture)]
    assert main(["bench", "long-context", *SMALL, *files]) == 0
    out = capsys.readouterr().out
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["command"] == " ".join(["tokenformer bench long-context", *SMALL, *files])
    for name in ("tokenformer_x4", "gpt_neox_x4"):
        median = 1e6 * record["seconds"]["float32"]["8"][name]["median"] / 16
        (row,) = (line for line in out.splitlines() if f"{median:.0f} (" in line and "x4" in line)
        assert f"{record['models'][name]['hidden_size']} channels" in row
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_on_standard_output_is_json(capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda config, **options: {"benchmark": "long-context"})
    assert main(["bench", "long-context", "--json", "-"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out == {"benchmark": "long-context", "command": "tokenformer bench long-context --json -"}


@pytest.mark.parametrize(
    ("argv", "small", "options"),
    [
        ([], False, {"lengths": (128, 512, 1024, 2048, 4096), "tokens": 4096, "repeats": 3, "threads": None}),
        (["--lengths", "64, 16", "--tokens", "64"], False, {"lengths": (64, 16), "tokens": 64}),
        (["--dtypes", "bfloat16", "--threads", "3"], False, {"dtypes": ("bfloat16",), "threads": 3}),
        (["--quick", "--repeats", "9"], True, {"tokens": 256, "repeats": 3}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_reach_the_measurement(capsys, monkeypatch, argv, small, options):
    def stop(config, **others):
        assert (config is None) != small
        assert options.items() <= others.items()
        raise UserError("stopped")

    monkeypatch.setattr(bench, "measure", stop)
    assert "stopped" in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lengths", "128,x"], "--lengths must be whole numbers separated by commas, got '128,x'"),
        (["--lengths", ""], "--lengths must be whole numbers"),
        (["--lengths", "3000"], "length 3000 does not divide the 4096 tokens of a step"),
        (["--lengths", "-4"], "--lengths must be whole numbers"),
        (["--dtypes", "float31"], "unknown dtype 'float31'"),
        (["--json", "absent/record.json"], "--json absent/record.json: there is no folder 'absent': create it first"),
        (["--picture", "absent/picture.png"], "--picture absent/picture.png: there is no folder 'absent'"),
        (["--picture", "-"], "--picture -: name a file that ends in .png"),
        (["--picture", "picture"], "name a file that ends in .png"),
        (["--batch", "4"], "unknown option '--batch'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(capsys, monkeypatch, argv, words):
    monkeypatch.setattr(bench, "build_models", lambda config: pytest.fail("began to measure"))
    assert words in refused(capsys, *argv)
