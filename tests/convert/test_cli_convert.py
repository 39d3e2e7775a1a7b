"""`tokenformer convert` from the command line: what it prints, the bar, and how much memory it takes."""

import functools
import json
import os
import pty
import subprocess
import sys
from typing import Any

import pytest
import torch

from published_folder import write_published, write_tiny
from saved_model import save_model, train_tokenizer
from tokenformer import grow
from tokenformer.cli import main
from tokenformer.convert import transformer
from tokenformer.models.loading import load_model


def test_a_published_folder_is_converted_and_used(tmp_path, capsys):
    tensors = write_tiny(tmp_path / "published")
    train_tokenizer().save_pretrained(tmp_path / "published")
    assert main(["convert", str(tmp_path / "published"), str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert f"{sum(tensor.numel() for tensor in tensors.values()):,} parameters in float32" in captured.out
    assert "2 layers of 12 qkv, 10 output, 20 ffn tokens" in captured.out
    assert f"tokenformer eval {tmp_path / 'out'}" in captured.out
    assert "no tokenizer" not in captured.out
    assert captured.err == ""
    assert main(["generate", str(tmp_path / "out"), "--prompt", "the", "--max-new-tokens", "3"]) == 0
    assert main(["info", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))
    assert report["scale"]["ffn"]["sqrt_of"] == 20


def test_a_missing_tokenizer_is_mentioned(tmp_path, capsys):
    write_tiny(tmp_path / "published")
    assert main(["convert", str(tmp_path / "published"), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    shown = capsys.readouterr().out
    assert "no tokenizer" in shown
    assert "bfloat16" in shown
    assert load_model(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("normalization", "words"),
    [
        ("l2_gelu", "appended 20 tokens to each output layer and 32 tokens to each ffn layer"),
        ("gelu_l2", "scaled the values of the output and ffn layers"),
    ],
)
def test_what_was_done_to_keep_the_outputs_is_said(normalization, words, tmp_path, capsys):
    model = grow(save_model(tmp_path / "ours", normalization=normalization), output=20, ffn=64, name="more")
    model.save_pretrained(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "published"]) == 0
    shown = capsys.readouterr().out
    assert words in shown
    assert "because tau is not the root of the number of tokens" in shown
    assert "the segments base, more are one now" in shown


def test_a_transformer_is_passed_on_with_its_options(tmp_path, capsys, monkeypatch):
    calls = []

    @functools.wraps(transformer.from_transformer)
    def stand_in(*arguments: Any, **options: Any) -> dict[str, Any]:
        calls.append((arguments, options))
        tokens = {"qkv": 4, "output": 5, "ffn": 6}
        fitted = {"text": "own", "tokens": 1500, "loss_before": 3.25, "loss_after": 3.5}
        parameters = {"before": 1000, "after": 2000, "calibration": fitted}
        return {"out": options["out"], "architecture": "gpt2", "tokens": tokens, **parameters}

    monkeypatch.setattr(transformer, "from_transformer", stand_in)
    options = ["--qkv", "4", "--rotary-pct", "0.5"]
    assert main(["convert", "--from-transformer", "gpt2-folder", str(tmp_path / "out"), *options]) == 0
    ((arguments, given),) = calls
    assert arguments == ()
    assert (given["model"], given["out"]) == ("gpt2-folder", str(tmp_path / "out"))
    assert (given["qkv"], given["rotary_pct"], given["ffn"]) == (4, 0.5, None)
    assert "config" not in given
    shown = capsys.readouterr().out
    assert "gpt2: 1,000 -> 2,000 parameters" in shown
    assert "4 qkv, 5 output, 6 ffn" in shown
    assert "1,500 tokens of its own text: loss 3.250 -> 3.500" in shown


def test_a_terminal_gets_a_bar_on_stderr(tmp_path):
    write_tiny(tmp_path / "published")
    terminal, program = pty.openpty()
    command = [sys.executable, "-m", "tokenformer", "convert", str(tmp_path / "published"), str(tmp_path / "out")]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=program, check=True, env={**os.environ, "TERM": "xterm"}
    )
    os.close(program)
    assert b"converting" in os.read(terminal, 65536)
    os.close(terminal)
    assert b"converting" not in done.stdout


MEASURE = """
import sys, threading, time
from tokenformer.convert import convert

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024

resident, anonymous = memory("VmRSS"), memory("RssAnon")
peak, running = anonymous, True

def watch():
    global peak
    while running:
        peak = max(peak, memory("RssAnon"))
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
convert(sys.argv[1], sys.argv[2], to=sys.argv[3])
running = False
thread.join()
print(memory("VmHWM") - resident, peak - anonymous)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
def test_memory_stays_near_one_copy_of_the_model(tmp_path):
    sizes = {"layers": 6, "hidden": 512, "heads": 8, "qkv": 1024, "proj": 1024, "ffn": 4096, "vocab": 1000}
    tensors = write_published(tmp_path / "published", **sizes)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size > 190e6
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "config.json").write_bytes((tmp_path / "published" / "config.json").read_bytes())

    def measure(source: str, out: str, to: str = "tokenformer") -> tuple[float, float]:
        """Peak of resident and of anonymous memory, in copies of the model."""
        command = [sys.executable, "-c", MEASURE, str(tmp_path / source), str(tmp_path / out), to]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        resident, anonymous = map(int, done.stdout.split())
        print(f"{source} to {to}: resident {resident / size:.2f}, anonymous {anonymous / size:.2f} copies")
        return resident / size, anonymous / size

    resident, anonymous = measure("published", "ours")
    assert resident < 1.3
    assert anonymous < 0.3  # mapped: the rest are pages of the file, which the system may drop
    assert measure("old.bin", "from-old")[0] < 1.5
    assert measure("ours", "back", "published")[0] < 1.5
