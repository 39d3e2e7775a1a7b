"""`tokenformer bench` on a shape that takes no time, without a compiler."""

import json
from copy import deepcopy

import pytest

from tiny import tiny_config
from tokenformer import UserError
from tokenformer.benchmarks import decode, forward, models
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
    for name in ("pattention", "forward", "decode"):
        assert f"\n  {name} " in out
        assert f"tokenformer bench {name} --quick" in out


@pytest.mark.parametrize(
    ("name", "own"), [("pattention", "--parameter-tokens"), ("forward", "--length"), ("decode", "--prompt")]
)
def test_help_shows_options_and_an_example(capsys, name, own):
    with pytest.raises(SystemExit) as stop:
        main(["bench", name, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for option in (own, "--dtypes", "--threads", "--quick", "--json", f"example:\n  tokenformer bench {name}"):
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
        (["speed"], "use one of pattention, train-step, forward, decode"),
        (["decod"], "did you mean 'decode'?"),
        (["forward", "--length", "0"], "length must be at least 1"),
        (["forward", "--dtypes", "float31"], "unknown dtype 'float31'"),
        (["forward", "--json", "absent/record.json"], "create it first"),
        (["decode", "--tokens", "1"], "tokens must be at least 2"),
        (["decode", "--prompt", "x"], "expected int"),
        (["decode", "--parameter-tokens", "4"], "unknown option '--parameter-tokens'"),
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


# Whole models


@pytest.fixture(scope="module")
def model_records():
    """Of both benchmarks, without compilation, which takes seconds."""
    config = tiny_config(segments=[{"name": "base", "qkv": 24, "output": 24, "ffn": 102}])
    options = {"dtypes": ("float32",), "threads": 1, "repeats": 2, "compiler": "eager"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.compile", lambda function, **options: function)
        return {
            "forward": forward.measure(config, length=6, **options),
            "decode": decode.measure(config, prompt=6, tokens=3, **options),
        }


@pytest.fixture(params=["forward", "decode"])
def measured_model(request, monkeypatch, model_records):
    """Stands for a measurement; gives the verb and the record that it gets."""
    copy = deepcopy(model_records[request.param])
    module = {"forward": forward, "decode": decode}[request.param]
    monkeypatch.setattr(module, "measure", lambda config, **options: copy)
    return request.param, copy


def test_table_and_record_of_models(capsys, tmp_path, measured_model):
    name, measured = measured_model
    file = tmp_path / "record.json"
    out = run(capsys, name, "--quick", "--json", str(file))
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record == measured
    assert record["command"] == f"tokenformer bench {name} --quick --json {file}"
    assert out.rstrip().endswith(f"record: {file}")
    for case, label in (("tokenformer_eager", "TokenFormer, eager"), ("gpt_neox_compiled", "GPTNeoX, compiled")):
        (row,) = (line for line in out.splitlines() if line.strip().startswith(f"{label} ") and "/" not in line)
        for cases in record["tokens_per_second"]["float32"].values():
            assert f" {cases[case]:.1f} " in row
        if name == "decode":
            assert f"{100 * record['memory']['float32']['fraction'][case]['copy']:.0f} %" in row
    for ratio in record["ratios"]:
        assert f"{ratio['value']:.3f}" in out
    assert "GPTNeoXForCausalLM: 2 layers of 32 channels" in out
    assert "target" not in out  # another model


def test_quartiles_of_speeds_stand_in_order(capsys, measured_model):
    name, record = measured_model
    for cases in record["seconds"]["float32"].values():
        for figures in cases.values():
            figures |= {"first_quartile": 0.5 * figures["median"], "third_quartile": 2 * figures["median"]}
    out = run(capsys, name)
    speed = next(iter(record["tokens_per_second"]["float32"].values()))["tokenformer_eager"]
    assert f" {speed / 2:.1f}-{speed * 2:.1f} " in out


def test_targets_of_models_are_marked(capsys, measured_model):
    name, record = measured_model
    for ratio, met in zip(record["ratios"], (True, False), strict=True):
        ratio["met"] = met
    out = run(capsys, name)
    assert out.count("target <= 1.0: met") == 1
    assert out.count("target <= 1.0: MISSED") == 1


@pytest.mark.parametrize(
    ("argv", "small", "options"),
    [
        (["forward"], False, {"batch": 1, "length": 512, "repeats": 10, "dtypes": ("float32", "bfloat16")}),
        (["forward", "--quick", "--batch", "3"], True, {"batch": 3, "length": 64, "repeats": 3}),
        (["decode", "--threads", "2"], False, {"prompt": 128, "tokens": 64, "repeats": 5, "threads": 2}),
        (["decode", "--quick", "--prompt", "4"], True, {"prompt": 4, "tokens": 16, "repeats": 3}),
        (["decode", "--dtypes", "bfloat16"], False, {"dtypes": ("bfloat16",), "threads": None}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_reach_the_measurement_of_models(capsys, monkeypatch, argv, small, options):
    def stop(config, **others):
        assert (config is None) != small
        assert config is None or config.hidden_size == models.small_config().hidden_size
        assert options.items() <= others.items()
        raise UserError("stopped")

    monkeypatch.setattr({"forward": forward, "decode": decode}[argv[0]], "measure", stop)
    assert "stopped" in refused(capsys, *argv)
