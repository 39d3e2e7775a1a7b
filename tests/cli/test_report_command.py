"""`tokenformer report`, on the folder of a plan whose runs were written by hand."""

import json
import math
from pathlib import Path

import pytest

from tokenformer.cli import main
from tokenformer.models.configuration_tokenformer import TokenFormerConfig
from tokenformer.plans.plan import Growth, Plan, Stage, Start
from tokenformer.plans.resolve import ResolvedStage, resolve
from tokenformer.plans.results import describe

LOSSES = {"base": {0.001: 5.0, 0.002: 4.0, 0.004: 4.5}, "grown": {0.002: 3.5}, "scratch": {0.002: 3.6}}


def write_plan(folder: Path, *, leave_out: tuple[str, ...] = ()) -> dict[str, ResolvedStage]:
    """A plan's folder with one finished run for each loss, and what the plan comes to."""
    plan = Plan(
        title="By hand",
        stages=[
            Stage(
                name="base", train=Start(qkv=16, output=16, ffn=64), tokens=1_000, learning_rate=list(LOSSES["base"])
            ),
            Stage(name="grown", grow=Growth(qkv=32, output=32, ffn=128), tokens=1_000, learning_rate=0.002),
        ],
        baselines=[
            Stage(name="scratch", train=Start(like="grown"), flops_of="grown", flops_times=2.0, learning_rate=0.002)
        ],
    )
    plan.data.path = "data/books"
    plan.model.hidden_size, plan.model.num_hidden_layers, plan.model.num_attention_heads = 16, 2, 2
    plan.training.batch_size = 2
    resolved = resolve(plan, vocab_size=64, sequence_length=8)
    folder.mkdir()
    (folder / "plan.yaml").write_text(plan.to_yaml())
    stages = {name: describe(plan, stage) for name, stage in resolved.items()}
    (folder / "stages.json").write_text(json.dumps({"machine": {"cpu": "a processor", "jobs": 1}, "stages": stages}))
    for name, losses in LOSSES.items():
        for rate, loss in losses.items():
            if name in leave_out:
                continue
            run = folder / name / "seed-0" / f"lr-{rate:g}"
            run.mkdir(parents=True)
            ends = {"eval_loss": loss, "eval_perplexity": math.exp(loss), "eval_bits_per_byte": loss / 2}
            flops = resolved[name].flops
            lines = [
                {"step": i, "tokens": i, "flops": flops * i // 4, "seconds": 2.0 * i, "loss": 9.0 - i, **more}
                for i, more in ((2, {"eval_loss": loss + 1}), (3, {}), (4, {"eval_loss": loss}))
            ]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            summary = {"seconds": 8.0, "tokens_per_second": 100.0, "mfu": None, "threads": 1, "compile_seconds": 0.0}
            summary |= {"precision": "float32", "device": "cpu", "skips": []} | ends
            (run / "summary.json").write_text(json.dumps(summary))
            (run / "measures.json").write_text(json.dumps({"measures": {}}))
    return resolved


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["report", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tokenformer report: error: ")
    assert err.count("\n") == 1
    return err


def test_report_of_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resolved = write_plan(tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "--markdown", str(tmp_path / "tables.md")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    record = json.loads((tmp_path / "run" / "report.json").read_text())
    cost = resolved["base"].flops + resolved["grown"].flops
    (against,) = record["comparisons"]
    assert against["perplexity_change"] == pytest.approx(math.exp(3.5 - 3.6) - 1)
    assert against["flops"] == pytest.approx(cost / resolved["scratch"].flops)
    assert against["subject_reaches"]["flops"] == cost
    sentence = next(line for line in out.splitlines() if line.startswith("grown ends at"))
    assert "Against scratch with 36.60 (1 seed): 9.5 % lower" in sentence
    assert sentence == record["answer"]
    assert [float(rate) for rate in record["stages"]["base"]["sweep"]] == list(LOSSES["base"])
    row = next(line for line in out.splitlines() if line.startswith(" base") or line.startswith("base"))
    assert "54.60" in row  # exp(4)
    for file in ("report.html", "report.json", "growth.png", "growth-seconds.png", "held-out.png", "training.png"):
        assert str(tmp_path / "run" / file) in out
        assert (tmp_path / "run" / file).stat().st_size > 1000
    assert sentence in (tmp_path / "tables.md").read_text()
    assert isinstance(resolved["base"].config, TokenFormerConfig)


def test_report_elsewhere_of_half_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_plan(tmp_path / "run", leave_out=("grown", "scratch"))
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page")]) == 0
    assert "Not finished: 1 of 3 stages have a finished run." in capsys.readouterr().out
    assert "grown/seed-0/lr-0.002" in (tmp_path / "page" / "report.html").read_text()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_what_is_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no plan: give the folder that `tokenformer run` wrote" in refused(capsys, tmp_path)
    assert not list(tmp_path.iterdir())
    assert "there is no folder" in refused(capsys, tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "there is no folder" in refused(capsys, tmp_path / "file")


def test_targets_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_plan(tmp_path / "run")
    (tmp_path / "file").write_text("")
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    assert "is a file: give a folder" in refused(capsys, tmp_path / "run", "--out", tmp_path / "file")
    message = "give a file in a folder that exists"
    assert message in refused(capsys, tmp_path / "run", "--markdown", tmp_path / "absent" / "tables.md")
    assert message in refused(capsys, tmp_path / "run", "--markdown", tmp_path)
    assert "did you mean '--out'" in refused(capsys, tmp_path / "run", "--ouf", "x")
    assert "run" in refused(capsys)
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before
