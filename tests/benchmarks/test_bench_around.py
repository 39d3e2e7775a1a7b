"""The benchmarks of what is around a step: rows, checkpoints, start-up. Records, refused results, commands."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny import tiny_config, tiny_model
from tokenformer import UserError
from tokenformer.benchmarks import checkpoint, data, startup
from tokenformer.cli import main
from tokenformer.cli.bench import BENCHMARKS

NEEDS = {"tiny": data.Need(tiny_config(), 3, 16)}


# Rows


@pytest.fixture(scope="module")
def rows_record():
    return data.measure(NEEDS, rows=64, threads=1, repeats=2)


def test_record_of_rows(rows_record):
    (dtype,) = rows_record["options"]["dtypes"]
    cases = rows_record["seconds"][dtype]["tiny"]
    assert set(cases) == {"loader", "numpy", "step"}
    for case, figures in cases.items():
        assert rows_record["rows_per_second"]["tiny"][case] == pytest.approx(3 / np.median(figures["rounds"]))
    assert (rows_record["options"]["tiny_batch"], rows_record["options"]["tiny_length"]) == (3, 16)
    ratios = {(row["numerator"], row["denominator"]): row for row in rows_record["ratios"]}
    assert ratios["loader", "step"]["at_most"] == 0.02
    assert ratios["loader", "step"]["met"] is None  # the target is for the default models
    each = zip(cases["loader"]["rounds"], cases["step"]["rounds"], strict=True)
    assert ratios["loader", "step"]["value"] == pytest.approx(np.median([loader / step for loader, step in each]))


def test_the_small_model_is_that_of_the_quickstart():
    from tokenformer.quickstart.job import Plan

    need, plan = data.default_needs()["quickstart"], Plan()
    assert (need.batch, need.length) == (plan.batch_size, plan.sequence_length)
    assert tuple(need.config.num_tokens(kind) for kind in ("qkv", "output", "ffn")) == plan.base
    config = need.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.vocab_size) == (
        plan.hidden_size,
        plan.layers,
        plan.heads,
        plan.vocabulary,
    )


def batches(ids, order):
    return iter([{"input_ids": torch.from_numpy(ids[rows].astype(np.int64))} for rows in order])


def test_an_epoch_in_any_order_is_right():
    ids = data.random_rows(5, 4, 100)
    data.check_epoch(batches(ids, [[4, 1], [0, 2]]), ids, 2)


@pytest.mark.parametrize("order", [[[0, 1]], [[0, 1], [1, 2]], [[0, 1], [2, 3], [4, 0]]], ids=["few", "twice", "many"])
def test_rows_that_are_left_out_or_repeated_are_refused(order):
    ids = data.random_rows(5, 4, 100)
    with pytest.raises(UserError, match="gives other rows than were written"):
        data.check_epoch(batches(ids, order), ids, 2)


def test_wrong_ids_are_not_timed(monkeypatch):
    original = data.shard_bytes
    monkeypatch.setattr(data, "shard_bytes", lambda ids: original(np.roll(ids, 1, axis=1)))
    monkeypatch.setattr(data, "interleave", lambda *args: pytest.fail("timed a wrong result"))
    with pytest.raises(UserError, match="gives other rows than were written"):
        data.measure(NEEDS, rows=64, threads=1, repeats=2)


# Checkpoints


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def checkpoint_record(disk):
    return checkpoint.measure(tiny_config(), folder=str(disk), threads=1, repeats=2)


def test_record_of_checkpoints(checkpoint_record, disk):
    record = checkpoint_record
    parameters = record["models"]["tokenformer"]["parameters"]
    # float32 weights; in a checkpoint two moments beside them
    assert 4 * parameters < record["bytes"]["model"] < 4 * parameters + 20000
    assert record["bytes"]["checkpoint"] > 12 * parameters
    passes = record["seconds"]["float32"]
    assert {name: set(cases) for name, cases in passes.items()} == {
        "model save": {"library", "write", "write_synced"},
        "model load": {"library", "read"},
        "checkpoint save": {"library", "write", "write_synced"},
        "checkpoint load": {"library", "read"},
    }
    speed = record["megabytes_per_second"]["checkpoint load"]["read"]
    assert speed == pytest.approx(
        record["bytes"]["checkpoint"] / 1e6 / np.median(passes["checkpoint load"]["read"]["rounds"])
    )
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("kind", ["_ModelFolder", "_Checkpoint"])
def test_what_does_not_come_back_is_not_timed(monkeypatch, tmp_path, kind):
    """A load that leaves one number as it was."""
    original = getattr(checkpoint, kind).load

    def load(self):
        loaded = original(self)
        with torch.no_grad():
            model = loaded if kind == "_ModelFolder" else self.trainer.model
            next(model.parameters()).view(-1)[0] += 1
        return loaded

    monkeypatch.setattr(getattr(checkpoint, kind), "load", load)
    seen = []
    monkeypatch.setattr(checkpoint, "interleave", lambda cases, *args, **options: seen.append(set(cases)) or {})
    with pytest.raises(UserError, match="came back otherwise than it was saved"):
        checkpoint.measure(tiny_config(), folder=str(tmp_path), threads=1, repeats=1)
    assert len(seen) == (0 if kind == "_ModelFolder" else 3)  # those of the model folder, which is right
    assert list(tmp_path.iterdir()) == []


def test_other_tensors_are_told():
    one = {"a": torch.ones(2)}
    with pytest.raises(UserError, match="came back with other tensors"):
        checkpoint.require_equal(one, {}, "model")
    with pytest.raises(UserError, match="a of the model came back otherwise"):
        checkpoint.require_equal(one, {"a": torch.zeros(2)}, "model")


def test_a_plain_file_holds_the_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_BLOCK", 16)
    plain = checkpoint._PlainFile(tmp_path / "file", 41)
    plain.write_synced()
    assert (tmp_path / "file").stat().st_size == 41
    plain.read()
    plain.clear()
    assert not (tmp_path / "file").exists()


# Start-up


def test_commands_that_start():
    environment = {"PYTHONPATH": str(Path(startup.__file__).parents[2])}
    assert startup.run(startup.CASES["help"], Path.cwd(), environment).startswith("usage: tokenformer VERB")
    for name in startup.WITHOUT_TORCH:
        startup.require_no_torch(startup.CASES[name], Path.cwd(), environment)
    with pytest.raises(UserError, match="loads torch"):
        startup.require_no_torch(["-c", "import sys; sys.modules['torch'] = None"], Path.cwd(), environment)
    with pytest.raises(UserError, match=r"ends with code 1 \(ValueError: broken\)"):
        startup.run(["-c", "raise ValueError('broken')"], Path.cwd(), environment)


def test_a_model_that_can_be_explained(tmp_path):
    model, found = tmp_path / "model", tmp_path / "found"
    tiny_model(vocab_size=320).save_pretrained(model)
    startup.add_tokenizer(model)
    words = [word.format(model=model, found=found, threads=1) for word in startup.CASES["explain"]]
    startup.run(words, tmp_path, {"PYTHONPATH": str(Path(startup.__file__).parents[2])})
    assert "".join(json.loads(found.read_text(encoding="utf-8"))["text"]["pieces"]) == startup.TEXT


@pytest.fixture
def started(monkeypatch):
    """Stands for processes, of which each takes seconds: notes what would be run."""
    calls = []

    def run(arguments, folder, environment):
        calls.append((arguments, environment["OMP_NUM_THREADS"]))
        return "False\n"

    monkeypatch.setattr(startup, "run", run)
    return calls


def test_record_of_starts(started):
    record = startup.measure(tiny_config(), threads=1, repeats=2)
    assert len(started) == (1 + 2) * len(startup.CASES) + len(startup.WITHOUT_TORCH)
    assert {threads for _, threads in started} == {"1"}
    assert set(record["seconds"]["none"]["start"]) == set(startup.CASES)
    limits = {row["case"]: row for row in record["limits"]}
    assert {case: row["at_most"] for case, row in limits.items()} == {"help": 0.3, "import": 0.5, "explain": 10}
    for case, row in limits.items():
        assert row["met"] == (row["seconds"] <= row["at_most"])
        assert row["seconds"] == record["seconds"]["none"]["start"][case]["median"]


# The commands


@pytest.mark.parametrize("name", ["data", "checkpoint", "startup"])
def test_tables_and_records(capsys, monkeypatch, tmp_path, started, rows_record, checkpoint_record, name):
    record = {
        "data": rows_record,
        "checkpoint": checkpoint_record,
        "startup": startup.measure(tiny_config(), threads=1, repeats=2),
    }[name]
    module = {"data": data, "checkpoint": checkpoint, "startup": startup}[name]
    monkeypatch.setattr(module, "measure", lambda *args, **options: record)
    file = tmp_path / "record.json"
    assert main(["bench", name, "--quick", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert json.loads(file.read_text(encoding="utf-8"))["command"] == f"tokenformer bench {name} --quick --json {file}"
    for passes in record["seconds"].values():
        for cases in passes.values():
            for figures in cases.values():
                assert f" {1e3 * figures['median']:,.2f} " in out
    for ratio in record.get("ratios", []) if name != "startup" else []:
        assert f" {ratio['value']:6.3f}" in out
    if name == "startup":
        assert out.count("target <= ") == 3


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["data", "--rows", "0"], "rows must be at least 1"),
        (["data", "--rows", "4"], "rows must be at least the 8 of a batch, got 4"),
        (["data", "--repeats", "0"], "repeats must be at least 1"),
        (["checkpoint", "--folder", "absent"], "there is no folder 'absent': create it first"),
        (["checkpoint", "--repeats", "0"], "repeats must be at least 1"),
        (["startup", "--threads", "0"], "threads must be at least 1"),
        (["startup", "--json", "absent/"], "create it first"),
        (["all", "--only", "data,decod"], "unknown benchmark 'decod': did you mean 'decode'?"),
        (["all", "--json", "absent"], "there is no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(capsys, monkeypatch, argv, words):
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("began to measure"))
    assert main(["bench", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_a_full_disk_is_one_line(monkeypatch, tmp_path, capsys):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint._ModelFolder, "save", full)
    assert main(["bench", "checkpoint", "--quick", "--folder", str(tmp_path)]) == 2
    assert "no space left on the device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# The whole suite


def test_every_benchmark_is_listed_with_a_line(capsys):
    assert main(["bench"]) == 0
    out = capsys.readouterr().out
    for name, summary in BENCHMARKS.items():
        assert f"\n  {name:<12} {summary}\n" in out
        assert f"\n  tokenformer bench {name} --quick" in out


def test_all_runs_each_in_a_process_and_names_those_that_fail(capfd, monkeypatch, tmp_path):
    calls = []

    class Done:
        def __init__(self, returncode):
            self.returncode = returncode

    def run(command):
        calls.append(command)
        return Done(2 if command[4] == "decode" else 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["bench", "all", "--quick", "--threads", "2", "--json", str(tmp_path)]) == 2
    options = ["--quick", "--threads", "2", "--json", str(tmp_path)]
    assert calls == [[sys.executable, "-m", "tokenformer", "bench", name, *options] for name in BENCHMARKS]
    assert "failed: decode" in capfd.readouterr().err
    calls.clear()
    assert main(["bench", "all", "--only", "startup, data"]) == 0
    assert [command[4:] for command in calls] == [["startup"], ["data"]]
