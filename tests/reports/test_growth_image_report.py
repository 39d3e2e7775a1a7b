"""The report of a plan for images: errors in percent, compared in points, against figures worked out by hand."""

import dataclasses
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from matplotlib.collections import PathCollection

from made_up_plan import LOSSES, a_plan, results_of, summed
from tokenformer.plans.quality import TOP1_ERROR
from tokenformer.reports.growth import markdown_table, write_growth_report
from tokenformer.reports.growth.fairness import fairness
from tokenformer.reports.growth.figures import draw_costs, draw_curves
from tokenformer.reports.growth.findings import answer, comparisons
from tokenformer.reports.growth.tables import all_tables

# At every point that is measured, one list for each seed; they do not follow the losses.
ERRORS = {
    "base": [[90.0, 80.0, 70.0, 60.0], [90.0, 80.0, 70.0, 61.0]],
    "medium": [[55.0, 50.0], [55.0, 51.0]],
    "large": [[45.0, 40.0], [46.0, 42.0]],
    "transformer": [[80.0, 60.0, 50.0, 45.0], [80.0, 60.0, 50.0, 45.4]],
    "scratch": [[60.0, 41.5], [60.0, 41.7]],
}


@pytest.fixture
def results() -> dict[str, Any]:
    plan = a_plan()
    plan.baselines = plan.baselines[:2]
    made = results_of(plan, {name: LOSSES[name] for name in ERRORS})
    made["quality"] = dataclasses.asdict(TOP1_ERROR)
    made["plan"]["data"] = {"train": "train.parquet", "held_out": "test.parquet", "held_out_images": 2000}
    made["plan"]["augmentation"] = {"crop": "pad", "mixup": 0.0}
    made["stages"]["transformer"]["family"] = "vit"
    for name, stage in made["stages"].items():
        stage["images"], stage["cumulative_images"] = stage["tokens"] // 100, stage["cumulative_tokens"] // 100
        for run, errors in zip(stage["runs"], ERRORS[name], strict=True):
            for old in ("eval_perplexity", "eval_bits_per_byte", "tokens_per_second"):
                del run[old]
            run |= {"eval_error": errors[-1], "eval_top5_error": errors[-1] / 10, "images_per_second": 250.0}
            for point, error in zip(run["held_out"], errors, strict=True):
                point["eval_error"] = error
        del stage["eval_perplexity"]
        stage["eval_error"] = summed([errors[-1] for errors in ERRORS[name]])
    return made


def test_comparisons_by_hand(results: dict[str, Any]) -> None:
    vit, scratch = comparisons(results)
    assert vit["error_change"] == pytest.approx(41.0 - 45.2)
    assert vit["error_spread"] == pytest.approx(math.hypot(stdev([40.0, 42.0]), stdev([45.0, 45.4])))
    assert (vit["clear"], scratch["clear"]) == (True, False)
    assert scratch["error_change"] == pytest.approx(41.0 - 41.6)
    # 45.5 is not below 45.2: it is the end that reaches it, at the cost of all three stages
    assert vit["subject_reaches"] == {"flops": 1.8e14, "share": 0.45}
    assert vit["baseline_reaches"] is None
    assert scratch["baseline_reaches"] is None


def test_the_answer_in_words(results: dict[str, Any]) -> None:
    said = answer(results)
    assert said.startswith(
        "large ends at held-out top-1 error 41.00 ± 1.41 % (2 seeds) after 1.8e14 training FLOPs, all 3 stages counted."
    )
    assert "Against Transformer with 45.20 ± 0.28 % (2 seeds): 4.20 points lower, at 0.45 times the FLOPs" in said
    assert "it reaches that top-1 error after 45 % of that model's FLOPs." in said
    assert "0.60 points lower, within the spread over seeds, at 0.90 times the FLOPs" in said
    assert "perplexity" not in said


def test_an_error_of_nothing_can_be_compared(results: dict[str, Any]) -> None:
    results["stages"]["scratch"]["eval_error"] = summed([0.0, 0.0])
    _, scratch = comparisons(results)
    assert scratch["error_change"] == pytest.approx(41.0)
    assert scratch["subject_reaches"] is None
    assert "41.00 points higher" in answer(results)


def test_the_tables_by_hand(results: dict[str, Any]) -> None:
    tables = {table.title: table for table in all_tables(results)}
    reached = tables["What every stage reached"]
    row = dict(zip(reached.header, next(row for row in reached.rows if row[0] == "large"), strict=True))
    assert (row["top-1 error (%)"], row["top-5 error (%)"]) == ("41.00 ± 1.41", "4.10 ± 0.14")
    assert "Parameters in the blocks. Losses in nats per image, on held-out images;" in reached.note
    cost = tables["What every stage cost"]
    assert cost.header[2:4] == ["images", "cumulative"]
    assert cost.header[-2] == "images/s"
    row_of_medium = next(row for row in cost.rows if row[0] == "medium")
    assert row_of_medium[2:4] == ["20,000", "120,000"]
    assert row_of_medium[-2] == "250"
    against = tables["large against every baseline"]
    assert against.header[1] == "top-1 error (%)"
    assert against.rows[0][:3] == ["Transformer", "45.20 ± 0.28", "4.20 points lower"]


def test_what_a_sceptic_asks(results: dict[str, Any]) -> None:
    said = " ".join(fairness(results))
    assert "trained on train.parquet and measured on 2,000 held-out images, evenly spaced, of test.parquet." in said
    assert "Augmentation of every stage: crop pad, mixup 0.0." in said
    assert "order of the training images" in said
    assert "Parameters in the blocks, large = 1: Transformer 1.000" in said
    assert "embedding" not in said.replace("patch embedding", "")


def test_the_page_and_its_figures(results: dict[str, Any], tmp_path: Path) -> None:
    figure = draw_costs(results)
    assert figure is not None
    assert figure.axes[0].get_ylabel() == "held-out top-1 error (%)"
    points = [drawn for drawn in figure.axes[0].collections if isinstance(drawn, PathCollection)]
    heights = [point.get_offsets()[0][1] for point in points]
    assert heights == pytest.approx([mean([errors[-1] for errors in ERRORS[name]]) for name in results["stages"]])
    losses = draw_curves(results, "held_out")
    assert losses is not None
    assert losses.axes[0].get_ylabel() == "held-out loss (nats per image)"
    page = write_growth_report(results, tmp_path)[0].read_text()
    assert "square a ViT" in page
    for text in (page, markdown_table(results)):
        assert "top-1 error" in text
        for word in ("perplexity", "per token", "without embeddings", "tokens/s"):
            assert word not in text
