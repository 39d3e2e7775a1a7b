"""A preparation that is stopped at any moment and called again ends with the same bytes."""

import contextlib
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import snapshot
from crashes import Crash, crash_at

from tokenformer.data import PreparedData, packing, prepare
from tokenformer.data.preparation import LOCK, STATE
from tokenformer.data.tokenizer import Encoder
from tokenformer.errors import UserError

FIXED = {"tokenizer": "train:300", "sequence_length": 32, "held_out": 0.2, "progress": False, "workers": 1}
CHUNK_BYTES = 1500


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(packing, "CHUNK_BYTES", CHUNK_BYTES)


@pytest.fixture(params=["arrow", "megatron"])
def options(request) -> dict[str, object]:
    return FIXED | {"format": request.param}


@pytest.fixture
def uninterrupted(corpus, tmp_path, options) -> dict[str, bytes]:
    prepare(corpus, out=str(tmp_path / "uninterrupted"), **options)
    if options["format"] == "arrow":
        assert len(list((tmp_path / "uninterrupted" / "train").glob("*.arrow"))) >= 3
    return snapshot(tmp_path / "uninterrupted")


def test_crash_at_every_file_operation(corpus, tmp_path, uninterrupted, options):
    for point in itertools.count(1):
        out = tmp_path / f"crash-{point}"
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, point)
            try:
                prepare(corpus, out=str(out), **options)
                break
            except Crash:
                pass
        if not (out / "manifest.json").exists():
            with pytest.raises(UserError, match=r"no prepared data|no finished preparation"):
                PreparedData.load(out)
        prepare(corpus, out=str(out), **options)
        assert snapshot(out) == uninterrupted, f"after a crash at moment {point}"
    assert point > 60


def test_crashes_again_and_again(corpus, tmp_path, uninterrupted, options):
    out = tmp_path / "out"
    crashes = 0
    while not (out / "manifest.json").exists():
        assert crashes < 50, "no progress between crashes"
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, 30)  # late enough to save a chunk each time
            with contextlib.suppress(Crash):
                prepare(corpus, out=str(out), **options)
        crashes += 1
    assert crashes > 2
    prepare(corpus, out=str(out), **options)  # the last crash may have left what a finished folder does not need
    assert snapshot(out) == uninterrupted


KILLED = """
import os, signal, sys
from tokenformer.data import packing, prepare
packing.CHUNK_BYTES = {chunk}
replace = os.replace
calls = 0
def counted(source, target):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = counted
prepare({corpus!r}, out={out!r}, **{options!r})
"""


@pytest.mark.parametrize("call", [2, 9])
def test_killed_process(corpus, tmp_path, uninterrupted, call, options):
    out = tmp_path / "out"
    code = KILLED.format(chunk=CHUNK_BYTES, call=call, corpus=corpus, out=str(out), options=options)
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (out / STATE).exists()
    prepare(corpus, out=str(out), **options)
    assert snapshot(out) == uninterrupted


def test_resuming_tokenises_only_what_is_missing(corpus, tmp_path, monkeypatch, options):
    encoded: list[int] = []
    encode = Encoder.encode

    def counted(self, texts):
        texts = list(texts)
        encoded.append(sum(len(text.encode()) for text in texts))
        return encode(self, texts)

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 40)
        with pytest.raises(Crash):
            prepare(corpus, out=str(out), **options)
    monkeypatch.setattr(Encoder, "encode", counted)
    splits = prepare(corpus, out=str(out), **options)["splits"]
    assert 0 < sum(encoded) <= splits["train"]["bytes"] + splits["held_out"]["bytes"] - CHUNK_BYTES


@pytest.mark.parametrize("full_from", [1, 2, 5])
def test_full_disk(corpus, tmp_path, uninterrupted, full_from, options):
    out = tmp_path / "out"
    calls = itertools.count(1)

    def fsync(descriptor: int) -> None:
        if next(calls) >= full_from:
            os.ftruncate(descriptor, 10)
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match="No space left on device") as raised:
            prepare(corpus, out=str(out), **options)
    assert str(out) in str(raised.value)
    assert "run the same command again" in str(raised.value)
    with pytest.raises(UserError, match="holds no finished preparation"):
        PreparedData.load(out)
    prepare(corpus, out=str(out), **options)
    assert snapshot(out) == uninterrupted


@pytest.fixture
def unfinished(corpus, tmp_path, options) -> Path:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 40)
        with pytest.raises(Crash):
            prepare(corpus, out=str(out), **options)
    state = json.loads((out / STATE).read_bytes())
    assert all(done["tokens"] for done in state["progress"].values())
    return out


def test_unfinished_folder_of_another_preparation_is_refused(corpus, unfinished, options):
    before = snapshot(unfinished)
    with pytest.raises(UserError, match=r"holds another preparation \(sequence length 32, not 16\)"):
        prepare(corpus, out=str(unfinished), **options | {"sequence_length": 16})
    with pytest.raises(UserError, match=r"holds another preparation \(other input files\)"):
        prepare(corpus[:1], out=str(unfinished), **options)
    assert snapshot(unfinished) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [(STATE, b"{"), (STATE, b"[]"), ("ids", b"x"), ("lengths", b"x"), ("tokenizer/tokenizer.json", b"{}")],
)
def test_damaged_unfinished_folder(corpus, unfinished, name, content, options):
    arrow = options["format"] == "arrow"
    files = {
        "ids": "train/data-00000.arrow" if arrow else "train.bin",
        "lengths": "held_out/data-00000.arrow" if arrow else "held_out.lengths",
    }
    (unfinished / files.get(name, name)).write_bytes(content)
    before = snapshot(unfinished)
    with pytest.raises(UserError, match=r"is damaged .* delete the folder"):
        prepare(corpus, out=str(unfinished), **options)
    assert snapshot(unfinished).keys() - {LOCK} == before.keys() - {LOCK}


@pytest.mark.parametrize("options", ["arrow"], indirect=True)
def test_unfinished_folder_from_before_there_were_formats(corpus, unfinished, uninterrupted, options):
    state = json.loads((unfinished / STATE).read_bytes())
    del state["options"]["format"]
    (unfinished / STATE).write_text(json.dumps(state))
    prepare(corpus, out=str(unfinished), **options)
    assert snapshot(unfinished) == uninterrupted


def test_two_processes_do_not_write_one_folder(corpus, tmp_path, options):
    filelock = pytest.importorskip("filelock")
    out = tmp_path / "out"
    out.mkdir()
    with (
        filelock.FileLock(out / LOCK, is_singleton=False),
        pytest.raises(UserError, match="another process is preparing"),
    ):
        prepare(corpus, out=str(out), **options)
    assert {path.name for path in out.iterdir()} <= {LOCK}
    prepare(corpus, out=str(out), **options)
