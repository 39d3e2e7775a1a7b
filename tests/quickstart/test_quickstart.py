"""The quickstart, whole but small, and the corpus and sweep it stands on."""

import json
import sysconfig
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tokenformer.cli import main
from tokenformer.data import PreparedData
from tokenformer.models.loading import load_model
from tokenformer.quickstart import job
from tokenformer.quickstart.corpus import write_corpus

TOKENS = 5 * 8 * 256


@pytest.fixture
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every twelfth module of the standard library: enough for a tokenizer of 2048 entries."""

    def write(path: Path) -> int:
        number = write_corpus(path)
        path.write_text("".join(path.read_text().splitlines(keepends=True)[::12]))
        return number

    monkeypatch.setattr(job, "write_corpus", write)


def run(out: Path, *options: str) -> dict[str, Any]:
    assert main(["quickstart", "--out", str(out), "--tokens", str(TOKENS), "--threads", "1", *options]) == 0
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def test_the_corpus_is_the_standard_library(tmp_path: Path) -> None:
    number = write_corpus(tmp_path / "corpus.jsonl")
    documents = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    names = [document["id"] for document in documents]
    assert len(names) == number == len(set(names))
    assert names == sorted(names, key=lambda name: Path(name))
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "/test/" in f"/{name}"]
    source = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_text(encoding="utf-8")
    assert documents[names.index("argparse.py")]["text"] == source


@pytest.mark.slow
def test_quickstart(small_corpus: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(tmp_path / "first")
    printed = capsys.readouterr().out
    base, grown, scratch = (report["models"][name] for name in ("base", "grown", "scratch"))

    # budgets: equal cumulative FLOPs, to half a batch
    budget = base["flops"] + grown["flops"]
    batch = 8 * 256 * load_model(tmp_path / "first/scratch").training_flops_per_token(256)
    assert report["cumulative_flops"] == {"base": base["flops"], "grown": budget, "scratch": scratch["flops"]}
    assert abs(scratch["flops"] - budget) <= batch / 2
    assert grown["parameters"] == scratch["parameters"] > 2 * base["parameters"]

    # growing changed nothing, and what was trained on is what was grown
    assert report["grown_before_training"]["difference_from_base"] == 0
    assert load_model(tmp_path / "first/grown").config.segments[1]["name"] == "grown1"

    # learning rates come from the sweep
    assert {name: model["learning_rate"] for name, model in report["models"].items()} == job.chosen_learning_rates()

    page = (tmp_path / "first/report.html").read_text()
    assert f"{grown['eval_perplexity']:.2f}" in page
    assert f"{scratch['eval_perplexity']:.2f}" in page
    assert 'src="data:image/png;base64,' in page
    assert (tmp_path / "first/growth.png").read_bytes().startswith(b"\x89PNG")
    for verb in ("generate", "grow", "info"):
        assert f"tokenformer {verb} {tmp_path}/first/grown" in printed
    assert printed.rstrip().endswith(f"report: {tmp_path}/first/report.html")

    # the same command again does nothing anew
    trained = (tmp_path / "first/scratch/summary.json").stat().st_mtime_ns
    again = run(tmp_path / "first")
    assert (tmp_path / "first/scratch/summary.json").stat().st_mtime_ns == trained
    assert again["models"] == report["models"]
    assert again["samples"] == report["samples"]

    # the same seed elsewhere gives the same models
    second = run(tmp_path / "second")
    for name in ("base", "grown", "scratch"):
        first_weights = (tmp_path / "first" / name / "model.safetensors").read_bytes()
        assert (tmp_path / "second" / name / "model.safetensors").read_bytes() == first_weights
    assert second["samples"] == report["samples"]

    # another seed does not go into the same folder
    capsys.readouterr()
    assert main(["quickstart", "--out", str(tmp_path / "first"), "--tokens", str(TOKENS), "--seed", "5"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "tokenformer quickstart: error:" in error
    assert json.loads((tmp_path / "first/report.json").read_text())["seed"] == 0


def test_the_sweep_belongs_to_this_plan_and_brackets_its_choices() -> None:
    results = job.sweep_results()
    assert results["plan"] == json.loads(json.dumps(asdict(job.Plan())))
    assert results["seed"] != 0  # the quickstart's, whose held-out documents must not choose the rates
    for stage, rate in job.chosen_learning_rates().items():
        losses = {float(tried): loss for tried, loss in results["held_out_loss"][stage].items()}
        assert len(losses) >= 3
        assert losses[rate] == min(losses.values())
        assert min(losses) < rate < max(losses), f"{stage}: the best rate lies at the edge of what was tried"


@pytest.mark.slow
def test_sweep(small_corpus: None, tmp_path: Path) -> None:
    rates = {stage: [1e-4, 1e-3] for stage in job.STAGES}
    losses = job.sweep(out=str(tmp_path / "sweep"), learning_rates=rates, tokens=TOKENS, threads=1)
    assert {stage: list(rates) for stage, rates in losses.items()} == {
        stage: ["0.0001", "0.001"] for stage in job.STAGES
    }
    # every model from scratch has the budget of the two stages together, to half a batch
    flops = {p.parent.name: json.loads(p.read_text())["flops"] for p in (tmp_path / "sweep").glob("*-*/summary.json")}
    assert flops["scratch-0.0001"] == flops["scratch-0.001"]
    assert flops["scratch-0.001"] == pytest.approx(flops["base-0.001"] + flops["grown-0.001"], rel=0.15)
    # the grown models come from the better base, so before training they have its loss
    best = min(losses["base"], key=losses["base"].__getitem__)
    assert (tmp_path / "sweep/base").resolve().name == f"base-{best}"
    data = PreparedData.load(tmp_path / "sweep/data")
    start = job._held_out_loss(tmp_path / "sweep/grown-start", data)
    assert start == pytest.approx(losses["base"][best], rel=1e-6)
    assert json.loads((tmp_path / "sweep/sweep.json").read_text())["held_out_loss"] == losses


@pytest.mark.parametrize("options", [["--tokens", "0"], ["--tokens", "-5"], ["--tokens", "x"], ["--seeds", "1"]])
def test_bad_options(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--out", str(tmp_path / "out"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert options[0].strip("-")[:4] in line
    assert not (tmp_path / "out").exists()
