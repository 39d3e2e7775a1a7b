"""`tokenformer run`: what a user types, and every plan that is refused before anything is done."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tokenformer.cli import main
from tokenformer.data import prepare

STEP = 4 * 16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": f"def f{n}(x): return x + {n}\n" * 8}) + "\n" for n in range(60)]
    (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    prepare(
        [str(folder / "text.jsonl")],
        tokenizer="train:280",
        out=str(folder / "data"),
        sequence_length=16,
        held_out=0.2,
        progress=False,
    )
    return folder / "data"


def write_plan(folder: Path, **fields: Any) -> str:
    plan: dict[str, Any] = {
        "model": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "rotary_pct": 0.5},
        "training": {"batch_size": 4, "precision": "fp32", "compile": "off", "threads": 1},
        "stages": [
            {"name": "base", "train": {"qkv": 8, "output": 8, "ffn": 16}, "tokens": 3 * STEP, "learning_rate": 1e-3},
            {"name": "grown", "grow": {"qkv": 16, "output": 16, "ffn": 32}, "tokens": 2 * STEP, "learning_rate": 1e-3},
        ],
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan | fields), encoding="utf-8")
    return str(folder / "plan.yaml")


def test_run_then_report(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = write_plan(tmp_path)
    assert main(["run", plan, "--data.path", str(data)]) == 0
    printed = capsys.readouterr()
    assert "runs/plan/report.html" in printed.out
    results = json.loads(Path("runs/plan/results.json").read_text())
    assert results["complete"]
    base, grown = (results["stages"][name]["runs"][0] for name in ("base", "grown"))
    assert grown["start_loss"] == base["eval_loss"]
    assert main(["report", "runs/plan"]) == 0
    assert main(["run", plan, "--data.path", str(data)]) == 0  # nothing is left to do


def test_overrides(data: Path, tmp_path: Path) -> None:
    plan, out = write_plan(tmp_path), tmp_path / "elsewhere"
    assert main(["run", plan, "--data.path", str(data), "--out", str(out), "--training.batch_size", "2"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["stages"]["base"]["steps"] == 6


def test_dry_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = write_plan(tmp_path, assumed={"vocab_size": 280, "sequence_length": 16})
    before = sorted(tmp_path.rglob("*"))
    assert main(["run", plan, "--data.path", "nowhere", "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    assert "base" in printed
    assert "none at nowhere" in printed
    assert main(["run", plan, "--data.path", "nowhere", "--dry-run", "--json", "cost.json", "--rate", "1e12"]) == 0
    report = json.loads(Path("cost.json").read_text())
    assert report["stages"]["base"]["steps"] == 3
    assert report["rate"]["flops_per_second"] == 1e12


BASE = {"name": "base", "train": {"qkv": 8, "output": 8, "ffn": 16}, "tokens": 3 * STEP}
BAD: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "shrinks": (
        {"stages": [BASE, {"name": "less", "grow": {"qkv": 4}, "tokens": STEP}]},
        [],
        "stage 'less': grow.qkv: 4 is fewer than the 8 tokens there are: growing cannot shrink",
    ),
    "below one step": (
        {"stages": [BASE | {"tokens": STEP - 1}]},
        [],
        "stage 'base': its budget of 63 tokens is below one step",
    ),
    "cannot match": (
        {
            "stages": [BASE],
            "baselines": [
                {"name": "neox", "family": "gpt_neox", "train": {"like": "base", "hidden_size": 256}, "tokens": STEP}
            ],
        },
        [],
        "stage 'neox': ",
    ),
    "missing data": ({}, ["--data.path", "nowhere"], "no prepared data at 'nowhere'"),
    "no data": ({}, ["--data.path", ""], "data.path"),
    "unknown field": ({"stage": []}, [], "stage"),
    "unknown field of a stage": ({"stages": [BASE | {"token": 1}]}, [], "token"),
    "wrong type": ({"stages": [BASE | {"tokens": "many"}]}, [], "stages"),
    "no stages": ({"stages": []}, [], "stages: a plan has at least one"),
    "no jobs": ({}, ["--jobs", "0"], "jobs must be at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_named_and_nothing_is_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    fields, options, message = BAD[case]
    plan = write_plan(tmp_path, **fields)
    before = sorted(tmp_path.rglob("*"))
    assert main(["run", plan, "--data.path", str(data), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tokenformer run: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_stage_folder_of_another_plan(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", write_plan(tmp_path, stages=[BASE]), "--data.path", str(data)]) == 0
    changed = write_plan(tmp_path, stages=[BASE | {"tokens": 4 * STEP}])
    capsys.readouterr()
    assert main(["run", changed, "--data.path", str(data)]) == 2
    assert "stage 'base' has begun with another plan (tokens is 192 there and 256 here)" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--jobs", "2"], ["nowhere.yaml"]])
def test_no_plan(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_shows_every_field_of_a_stage() -> None:
    shown = subprocess.run([sys.executable, "-m", "tokenformer", "run", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    for option in ("--dry-run", "--jobs", "--seeds", "--stages", "--baselines", "--training.batch_size"):
        assert option in shown.stdout
