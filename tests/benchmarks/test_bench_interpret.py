"""The benchmark of capturing: what its record says, and that it times nothing that is wrong."""

import json
from importlib import import_module

import pytest
import torch

from tiny import tiny_config
from tokenformer import UserError
from tokenformer.benchmarks import interpret
from tokenformer.cli import main

# `tokenformer.interpret.capture` is the function.
CAPTURE = import_module("tokenformer.interpret.capture")
CONFIG = tiny_config(
    segments=[{"name": "base", "qkv": 12, "output": 10, "ffn": 20}, {"name": "grown1", "qkv": 2, "output": 0, "ffn": 4}]
)
SMALL = {"length": 7, "top_k": 3, "threads": 1, "repeats": 2}
CASES = ["plain", "capture_top", "capture_weights", "capture_outputs", "index"]


def test_record():
    record = interpret.measure(CONFIG, dtypes=("float32", "bfloat16"), **SMALL)
    assert record["benchmark"] == "interpret"
    for dtype in ("float32", "bfloat16"):
        rows = record["seconds"][dtype]["forward"]
        assert list(rows) == CASES
        assert all(len(figures["rounds"]) == 2 for figures in rows.values())
        assert record["tokens_per_second"][dtype]["forward"]["plain"] == pytest.approx(7 / rows["plain"]["median"])
        checks = record["checks"][dtype]
        assert set(checks["errors"]) == {"qkv", "output", "ffn"}
        assert all(0 < e["relative"] < checks["tolerance"]["relative"] for e in checks["errors"]["ffn"].values())
    assert [(r["numerator"], r["denominator"]) for r in record["ratios"][::2]] == [
        (case, "plain") for case in CASES[1:]
    ]


def test_wrong_weights_are_not_timed(monkeypatch):
    original = CAPTURE.get_normalization

    class Wrong:
        def __init__(self, name):
            self.kind = original(name)

        def __getattr__(self, name):
            return getattr(self.kind, name)

        def weights(self, *args):
            return 1.1 * self.kind.weights(*args)

    monkeypatch.setattr(interpret, "interleave", lambda *args: pytest.fail("timed a wrong result"))
    monkeypatch.setattr(CAPTURE, "get_normalization", Wrong)
    with pytest.raises(UserError, match=r"in float32 is wrong: weights.*no speed is reported"):
        interpret.measure(CONFIG, dtypes=("float32",), **SMALL)


def test_a_capture_that_changes_the_logits_is_not_timed(monkeypatch):
    def call(self):
        return self._logits() + (0 if self.options is None else 1e-6)

    monkeypatch.setattr(interpret.Reading, "__call__", torch.no_grad()(call))
    monkeypatch.setattr(interpret, "interleave", lambda *args: pytest.fail("timed a wrong result"))
    with pytest.raises(UserError, match="capture_top in float32 is wrong: its logits are not bitwise"):
        interpret.measure(CONFIG, dtypes=("float32",), **SMALL)


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tokenformer.benchmarks.models.small_config", lambda: CONFIG)
    file = tmp_path / "record.json"
    command = ["bench", "interpret", "--quick", "--threads", "1", "--dtypes", "float32", "--json", str(file)]
    assert main(command) == 0
    assert "the strongest weights captured" in capsys.readouterr().out
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["options"]["length"] == 64
    assert main(["bench", "interpret", "--quick", "--top-k", "0"]) == 2
    assert "top_k must be at least 1" in capsys.readouterr().err
