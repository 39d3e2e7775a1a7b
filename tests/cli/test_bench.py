"""`tokenformer bench` on a shape that takes no time, without a compiler."""

import json
from copy import deepcopy

import pytest

from tokenformer import UserError
from tokenformer.benchmarks import pattention as bench
from tokenformer.cli import main

TINY = ["--tokens", "6", "--hidden-size", "8", "--parameter-tokens", "20", "--threads", "1", "--repeats", "2"]


@pytest.fixture(scope="module")
def record():
    return bench.measure(bench.Shape(6, 8, 20), threads=1, repeats=2, compiler="eager")


@pytest.fixture
def measured(monkeypatch, record):
    """Stands for a measurement, as it takes seconds; returns the record that the command gets."""
    copy = deepcopy(record)
    monkeypatch.setattr(bench, "measure", lambda shape, **options: copy)
    return copy


def run(capsys, *argv):
    assert main(["bench", *argv]) == 0
    return capsys.readouterr().out


def refused(capsys, *argv):
    assert main(["bench", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tokenformer bench: error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("argv", [[], ["--help"]], ids=["nothing", "help"])
def test_benchmarks_are_listed(capsys, argv):
    out = run(capsys, *argv)
    assert "\n  pattention " in out
    assert "tokenformer bench pattention --quick" in out


def test_help_shows_options_and_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "pattention", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for option in ("--parameter-tokens", "--dtypes", "--quick", "--json", "example:\n  tokenformer bench pattention"):
        assert option in out
    assert "--command" not in out


@pytest.mark.usefixtures("measured")
def test_table_and_record(capsys, tmp_path):
    file = tmp_path / "record.json"
    out = run(capsys, "pattention", *TINY, "--json", str(file))
    record = json.loads(file.read_text(encoding="utf-8"))
    assert out.rstrip().endswith(f"record: {file}")
    median = 1e3 * record["seconds"]["bfloat16"]["forward_backward"]["fused_compiled"]["median"]
    rows = [line for line in out.splitlines() if line.strip().startswith("fused, compiled ")]
    assert len(rows) == 2
    assert f" {median:.2f} " in rows[1]
    ratio = next(r for r in record["ratios"] if r["dtype"] == "float32")
    assert f"{ratio['value']:.3f}" in out
    assert "target" not in out  # another shape
    assert record["command"] == " ".join(["tokenformer bench pattention", *TINY, "--json", str(file)])
    assert record["options"]["repeats"] == 2


def test_targets_are_marked(capsys, measured):
    for ratio in measured["ratios"]:
        ratio["met"] = None if ratio["at_most"] is ratio["at_least"] else ratio["at_most"] is not None
    out = run(capsys, "pattention", *TINY)
    assert out.count("target <= 1.05: met") == 2
    assert out.count("target >= 1.9: MISSED") == 1


def test_json_on_standard_output_is_json(capsys, measured):
    assert json.loads(run(capsys, "pattention", *TINY, "--json", "-")) == measured


def test_cases_that_did_not_compile_are_named(capsys, measured):
    measured["checks"]["float32"]["failed_to_compile"] = {"mlp_compiled": "no [C++] compiler"}
    assert "GELU MLP, compiled: does not compile here (no [C++] compiler)" in run(capsys, "pattention", *TINY)


@pytest.mark.parametrize(
    ("argv", "shape", "options"),
    [
        ([], (2048, 768, 3072), {"dtypes": ("float32", "bfloat16"), "threads": None, "repeats": 20}),
        (["--quick"], (256, 256, 1024), {"repeats": 3}),
        (["--quick", "--tokens", "16", "--repeats", "1"], (16, 256, 1024), {"repeats": 1}),
        (["--dtypes", "bfloat16", "--threads", "3"], (2048, 768, 3072), {"dtypes": ("bfloat16",), "threads": 3}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_reach_the_measurement(capsys, monkeypatch, argv, shape, options):
    def stop(given, **others):
        assert given == bench.Shape(*shape)
        assert options.items() <= others.items()
        raise UserError("stopped")

    monkeypatch.setattr(bench, "measure", stop)
    assert "stopped" in refused(capsys, "pattention", *argv)


def test_wrong_result_ends_with_code_2_and_no_figures(capsys, monkeypatch):
    monkeypatch.setattr(bench, "pattention", lambda x, keys, values, scale, **options: x @ keys.T @ values)
    error = refused(capsys, "pattention", *TINY)
    assert "fused_eager in float32 is wrong" in error
    assert "no speed" in error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["patention"], "did you mean 'pattention'?"),
        (["decode"], "use one of pattention"),
        (["pattention", "--tokens", "0"], "tokens must be at least 1"),
        (["pattention", "--hidden-size", "-3"], "hidden_size must be at least 1"),
        (["pattention", "--repeats", "0"], "repeats must be at least 1"),
        (["pattention", "--threads", "0"], "threads must be at least 1"),
        (["pattention", "--dtypes", "float31"], "unknown dtype 'float31'"),
        (["pattention", "--dtypes", ""], "unknown dtype ''"),
        (["pattention", "--json", "absent/record.json"], "create it first"),
        (["pattention", "--tokens", "x"], "expected int"),
        (["pattention", "--slow"], "unknown option '--slow'"),
    ],
    ids=lambda value: " ".join(value[1:]) or value[0] if isinstance(value, list) else "",
)
def test_bad_input(capsys, argv, words):
    assert words in refused(capsys, *argv)
