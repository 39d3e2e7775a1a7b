"""The report of a plan: its answer, tables and statements, against figures worked out by hand."""

import base64
import dataclasses
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.image
import pytest
from matplotlib.collections import PathCollection

from made_up_plan import LOSSES, a_plan, results_of, stage
from tokenformer.plans.plan import Growth
from tokenformer.reports.growth import markdown_table, write_growth_report
from tokenformer.reports.growth.fairness import fairness
from tokenformer.reports.growth.figures import draw_costs, draw_measures
from tokenformer.reports.growth.findings import answer, chains, comparisons
from tokenformer.reports.growth.tables import all_tables

HOSTILE = "<script>alert('x')</script> $\\frac{ [red] | \"quoted\""


class Reader(HTMLParser):
    """Collects tags, the text of the page, and that of bold cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.bold: list[str] = []
        self.pictures: list[bytes] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.pictures.append(base64.b64decode(str(dict(attrs)["src"]).partition(",")[2]))

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags and self.tags[-1] == "b":
            self.bold.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.tags.append("/" + tag)


def table_of(results: dict[str, Any], title: str) -> dict[str, dict[str, str]]:
    """Rows of a table by their first cell; a heading that stands twice is told apart by the one before it."""
    (table,) = [table for table in all_tables(results) if table.title == title]
    before = ["", *table.header[:-1]]
    pairs = zip(before, table.header, strict=True)
    header = [f"{last} {name}" if name == "cumulative" else name for last, name in pairs]
    return {row[0]: dict(zip(header, row, strict=True)) for row in table.rows}


def in_words(results: dict[str, Any]) -> str:
    return " ".join(fairness(results))


def test_comparisons_by_hand() -> None:
    found = {each["baseline"]: each for each in comparisons(results_of(a_plan(), LOSSES))}
    assert list(found) == ["transformer", "scratch", "hyper", "net2net"]  # neox is no end: two stages go on from it
    assert [each["from_scratch"] for each in found.values()] == [True, True, False, False]
    large = [math.exp(4.05), math.exp(4.07)]
    against = found["transformer"]
    assert against["perplexity_change"] == pytest.approx(mean(large) / math.exp(4.1) - 1)
    assert against["perplexity_spread"] == pytest.approx(stdev(large) / math.exp(4.1))
    assert against["clear"] is True
    assert against["flops"] == pytest.approx(1.8e14 / 4e14)
    assert against["stage_flops"] == pytest.approx(4e13 / 4e14)
    assert against["seconds"] == pytest.approx(1.8 / 4)
    # 4.1: the mean of exp(4.08) and exp(4.10) lies below, half through the last stage
    assert against["subject_reaches"] == {"flops": 1.6e14, "share": 0.4}
    assert against["baseline_reaches"] is None
    scratch = found["scratch"]
    assert scratch["subject_reaches"] is None
    assert scratch["baseline_reaches"] == {"flops": 2e14, "share": 1.0}
    both = math.hypot(stdev(large), stdev([math.exp(4.0), math.exp(4.02)]))
    assert scratch["perplexity_spread"] == pytest.approx(both / mean([math.exp(4.0), math.exp(4.02)]))
    assert found["hyper"]["flops"] == pytest.approx(1.8e14 / 2.4e14)
    assert (found["net2net"]["clear"], found["net2net"]["perplexity_spread"]) == (None, None)


def test_what_is_reached_between_measurements_counts_from_the_next_one() -> None:
    results = results_of(a_plan(), LOSSES)
    for run in results["stages"]["large"]["runs"]:
        run["held_out"] = []  # nothing but the end is known
    (against, *_) = comparisons(results)
    assert against["subject_reaches"] == {"flops": 1.8e14, "share": 0.45}


def test_the_answer_in_words() -> None:
    said = answer(results_of(a_plan(), LOSSES))
    assert said.startswith(
        f"large ends at held-out perplexity {mean([math.exp(4.05), math.exp(4.07)]):.2f} ± "
        f"{stdev([math.exp(4.05), math.exp(4.07)]):.2f} (2 seeds) after 1.8e14 training FLOPs, all 3 stages counted."
    )
    assert "Against Transformer with 60.34 ± 0.00 (2 seeds): 3.9 % lower, at 0.45 times the FLOPs" in said
    assert "it reaches that perplexity after 40 % of that model's FLOPs." in said
    assert "5.1 % higher, at 0.90 times the FLOPs; it reaches that perplexity at no point measured." in said
    assert "The lowest of the 5 models compared is scratch with " in said
    assert "Where there is a single seed, the spread is unknown." in said
    assert "Net2Net" not in said


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ([4.00, 4.04], "2.0 % lower, within the spread over seeds,"),
        ([4.08, 4.08], "4.1 % higher,"),
        ([4.0399, 4.0401], "equal, within the spread over seeds,"),
        ([4.00], "3.9 % lower,"),
    ],
    ids=["within-the-spread", "worse", "equal", "one-seed"],
)
def test_the_answer_never_says_more_than_the_seeds(ends: list[float], words: str) -> None:
    losses = LOSSES | {"large": [[end] for end in ends], "transformer": [[4.02], [4.06]]}
    if ends == [4.08, 4.08]:
        losses["transformer"] = [[4.04], [4.04]]
    said = answer(results_of(a_plan(), losses))
    against = said[said.index("Against Transformer") : said.index("Against scratch")]
    assert f": {words}" in against


def test_another_size_is_named() -> None:
    results = results_of(a_plan(), LOSSES)
    results["stages"]["transformer"]["non_embedding_parameters"] *= 2
    assert "Against Transformer with 60.34 ± 0.00 (2 seeds), a model 2.00 times its size: 3.9 % lower" in answer(
        results
    )


def test_report_json_holds_everything(tmp_path: Path) -> None:
    results = results_of(a_plan(measure={"specs": "data/specs"}), LOSSES)
    written = write_growth_report(results, tmp_path / "new" / "folder")
    record = json.loads((tmp_path / "new" / "folder" / "report.json").read_text())
    assert {name: record[name] for name in results} == json.loads(json.dumps(results))
    assert record["answer"] == answer(results)
    assert record["comparisons"] == json.loads(json.dumps(comparisons(results)))
    assert record["ends"]["hyper"] == ["neox", "hyper"]
    assert record["fairness"] == fairness(results)
    assert [path.name for path in written] == [
        "report.html", "report.json", "growth.png", "growth-seconds.png", "ends.png", "held-out.png", "training.png",
    ]  # fmt: skip
    page = Reader(written[0].read_text())
    assert page.pictures == [path.read_bytes() for path in written[2:]]
    assert answer(results) in page.text
    for path in written[2:]:
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[1] > 1000
        for colour in ((0x1F, 0x77, 0xB4), (0xD6, 0x27, 0x28)):
            assert (abs(pixels[..., :3] * 255 - colour).max(-1) < 40).sum() > 40, f"{path.name} lacks {colour}"


def test_half_a_plan(tmp_path: Path) -> None:
    results = results_of(a_plan(), {name: LOSSES[name] for name in ("base", "medium", "transformer")})
    assert comparisons(results) == []
    assert answer(results) == (
        "Not finished: 3 of 8 stages have a finished run. "
        "The last one, large, has none, so nothing can be compared yet."
    )
    written = write_growth_report(results, tmp_path)
    text = Reader(written[0].read_text()).text
    assert "Missing runs: large/seed-0, large/seed-1, scratch/seed-0" in text
    assert "Stages without any finished run: large, scratch, neox, hyper, Net2Net." in text
    assert table_of(results, "What every stage reached")["large"]["perplexity"] == "-"


def test_nothing_done_at_all(tmp_path: Path) -> None:
    (tmp_path / "growth.png").write_bytes(b"of an earlier plan")
    written = write_growth_report(results_of(a_plan(), {}), tmp_path)
    assert [path.name for path in written] == ["report.html", "report.json"]
    assert not (tmp_path / "growth.png").exists()
    assert "Not finished: 0 of 8" in written[0].read_text()


def test_no_baselines_and_one_seed(tmp_path: Path) -> None:
    plan = dataclasses.replace(a_plan(baselines=False), seeds=[0])
    results = results_of(plan, {name: LOSSES[name][:1] for name in ("base", "medium", "large")})
    assert answer(results) == (
        f"large ends at held-out perplexity {math.exp(4.05):.2f} (1 seed) after 1.8e14 training FLOPs, all 3 stages "
        "counted. The plan has no baseline from scratch."
    )
    write_growth_report(results, tmp_path)
    assert "Every run of the plan is finished." in in_words(results)


def test_baselines_that_are_not_there_yet() -> None:
    results = results_of(a_plan(), {name: LOSSES[name] for name in ("base", "medium", "large", "neox", "hyper")})
    assert "Nothing from scratch to compare with is finished (Transformer, scratch)." in answer(results)
    assert "It is the lowest of the 2 models compared." in answer(results)
    figure = draw_costs(results)
    assert figure is not None
    # the line to Net2Net has nothing of its own yet
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["small → medium → large", "neox → hyper"]


def test_labels_are_shown_as_they_are(tmp_path: Path) -> None:
    plan = a_plan()
    plan.title = f"title {HOSTILE}"
    plan.stages[0].label = f"label {HOSTILE}"
    plan.baselines[0].label = f"_other {HOSTILE}\nline"
    plan.measure = {HOSTILE: "data/specs"}
    results = results_of(plan, LOSSES)
    for name in results["stages"]:
        for run in results["stages"][name]["runs"]:
            run["measures"] = {HOSTILE: {"start": None, "end": 5.0}}
    results["machine"]["cpu"] = f"cpu {HOSTILE}"
    page = Reader(write_growth_report(results, tmp_path)[0].read_text())
    assert "script" not in page.tags
    for shown in (
        f"title {HOSTILE}",
        f"label {HOSTILE}",
        f"_other {HOSTILE} line",
        f"cpu {HOSTILE}",
        f"{HOSTILE}: end",
    ):
        assert shown in page.text
    figure = draw_costs(results)
    assert figure is not None
    assert f" _other {HOSTILE} line" in [text.get_text() for text in figure.legends[0].get_texts()]
    line = next(line for line in markdown_table(results).splitlines() if line.startswith("| label"))
    assert HOSTILE.replace("|", "\\|") in line


def test_other_data_are_no_match() -> None:
    plan = a_plan()
    plan.stages[2].data = plan.baselines[1].data = "data/specs"
    results = results_of(plan, LOSSES)
    assert [each["baseline"] for each in comparisons(results)] == ["scratch"]
    figure = draw_costs(results)
    assert figure is not None
    assert sum(isinstance(drawn, PathCollection) for drawn in figure.axes[0].collections) == 2
    said = in_words(results)
    assert "Not all stages have the same data: small, medium, Transformer, neox, hyper, Net2Net on data/books; " in said
    assert "only those on data/specs are compared with large" in said


def test_the_tables_by_hand() -> None:
    results = results_of(a_plan(), LOSSES)
    for run in results["stages"]["medium"]["runs"]:
        run["start_loss"] = 4.5 + run["seed"]
    reached = table_of(results, "What every stage reached")
    ends = [math.exp(4.2), math.exp(4.22)]
    assert reached["medium"] == {
        "stage": "medium",
        "seeds": "2 of 2",
        "parameters": "3.33 M",
        "cumulative FLOPs": "1.4e14",
        "learning rate": "0.002",
        "start loss": "5.000 ± 0.707",
        "held-out loss": "4.2100 ± 0.0141",
        "perplexity": f"{mean(ends):.2f} ± {stdev(ends):.2f}",
        "bits/byte": "2.105 ± 0.007",
    }
    assert reached["Net2Net"]["seeds"] == "1 of 2"
    assert reached["Net2Net"]["perplexity"] == f"{math.exp(4.4):.2f}"
    cost = table_of(results, "What every stage cost")["hyper"]
    assert cost["all parameters"] == "4.00 M"
    assert (cost["tokens"], cost["tokens cumulative"]) == ("2,000,000", "12,000,000")
    assert (cost["FLOPs"], cost["FLOPs cumulative"]) == ("4e13", "2.4e14")
    assert (cost["seconds"], cost["seconds cumulative"]) == ("400 ± 0", "2,400 ± 0")
    begins = table_of(results, "How every stage begins")
    assert (begins["medium"]["size"], begins["medium"]["keys or method"], begins["medium"]["scale"]) == (
        "qkv 256", "zero", "keep",
    )  # fmt: skip
    assert (begins["Net2Net"]["keys or method"], begins["Net2Net"]["after"]) == ("net2net", "neox")


def test_learning_rates(tmp_path: Path) -> None:
    plan = a_plan()
    plan.stages[1].learning_rate = [1e-3, 2e-3]
    plan.stages[2].learning_rate = [2e-3, 4e-3, 8e-3]
    plan.baselines[0].learning_rate = 2e-3
    results = results_of(plan, LOSSES)
    results["stages"]["scratch"]["sweep"]["0.004"] = None
    results["stages"]["net2net"] |= {"sweep": {"0.001": 4.5}, "runs": [], "learning_rate": None}
    rates = table_of(results, "Learning rates")
    assert list(rates["small"]) == ["stage", "0.001", "0.002", "0.004", "0.008", "remark"]
    assert [rates["small"][rate] for rate in ("0.001", "0.002", "0.004", "0.008")] == ["4.5000", "4.4000", "4.6000", ""]
    assert rates["small"]["remark"] == "0.002, between others"
    assert rates["medium"]["remark"] == "0.002 is the greatest of those tried: a higher one may be better"
    assert rates["large"]["remark"] == "0.002 is the least of those tried: a lower one may be better"
    assert rates["Transformer"]["remark"] == "one rate, 0.002, not searched for"
    assert rates["Net2Net"]["remark"] == "unfinished: 1 of 3 tried"
    assert rates["scratch"]["0.004"] == "failed"
    page = Reader(write_growth_report(results, tmp_path)[0].read_text())
    assert page.bold == ["4.4000", "4.2000", "4.0500", "4.0000", "4.5000", "4.2500", "4.5000"]
    assert "| **4.4000** |" in markdown_table(results)
    assert table_of(results, "What every stage reached")["medium"]["learning rate"] == "0.002 (edge)"
    said = in_words(results)
    assert "1 for Transformer; 2 for medium; 3 for small, large, scratch, neox, hyper, Net2Net" in said
    assert "Fewer than three, so hardly tuned: medium, Transformer." in said
    assert "a better one may lie beyond it: medium (0.002), large (0.002)." in said
    # further runs: small 2, medium 1, large 2; scratch, neox and hyper 2 each; of 1e14, 4e13, 4e13, 2e14, 2e14, 4e13
    assert "11 further runs, 1.2e15 FLOPs in all, 3.2e14 of them for the subject." in said


def test_what_is_not_alike_is_said() -> None:
    plan = a_plan()
    plan.baselines[0].seeds = [0]
    plan.baselines[1].training = {"batch_size": 8}
    plan.data.held_out_rows = 1024
    results = results_of(plan, LOSSES)
    skip = {"step": 70, "what": "the loss became nan", "checkpoint": 60, "skipped_batches": [61, 70]}
    results["stages"]["medium"]["runs"][1]["skips"] = [skip]
    results["stages"]["hyper"]["runs"][0]["device"] = "NVIDIA H100"
    results["machine"]["jobs"] = 2
    said = in_words(results)
    assert "Seeds differ: small, medium, large, scratch, neox, hyper, Net2Net: 0, 1; Transformer: 0." in said
    assert "reads on where the one before it stopped" in said
    assert "Settings of their own have scratch (last table)" in said
    assert table_of(results, "How every stage begins")["scratch"]["settings of its own"] == "batch_size 8"
    assert "measured on 1,024 held-out rows, evenly spaced, of it" in said
    assert "skipped after collapses: medium, seed 1, step 70 (the loss became nan): batches 61 to 70." in said
    assert "Up to 2 runs shared it" in said
    assert "Not all runs were made alike" in said
    assert "hyper: NVIDIA H100, threads 1, float32" in said
    assert "Parameters without embeddings, large = 1: Transformer 1.000, scratch 1.000" in said


def test_measured_on_other_data() -> None:
    plan = a_plan(baselines=False, measure={"books": "data/books", "specs": "data/specs"})
    results = results_of(plan, LOSSES)
    for run in results["stages"]["large"]["runs"]:
        run["measures"] = {"books": {"start": 4.0 + run["seed"], "end": 5.0}, "specs": {"start": 6.0, "end": 5.5}}
    for run in results["stages"]["base"]["runs"]:
        run["measures"] = {"books": {"start": None, "end": 4.4}}
    rows = table_of(results, "Measured on other data")
    assert list(rows) == ["small", "large"]
    assert rows["large"]["books: start"] == "4.5000 ± 0.7071"
    assert rows["large"]["books: change"] == "+0.5000"
    assert rows["large"]["specs: change"] == "-0.5000"
    assert (rows["small"]["books: start"], rows["small"]["books: end"]) == ("-", "4.4000 ± 0.0000")
    assert rows["small"]["specs: end"] == "-"
    figure = draw_measures(results)
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["Measured on books", "Measured on specs"]
    (line,) = [line for line in figure.axes[1].get_lines() if len(line.get_xdata()) == 2]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1.4e14, 1.8e14], [6.0, 5.5])


def test_markdown_has_the_figures_of_the_tables() -> None:
    results = results_of(a_plan(), LOSSES)
    text = markdown_table(results)
    assert text.startswith(answer(results))
    rows = [
        [cell.strip().strip("*") for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if "|" in line
    ]
    for table in all_tables(results):
        assert f"## {table.title}" in text
        for row in table.rows:
            assert [cell.strip() for cell in row if cell] == [cell for cell in rows[_index(rows, row)] if cell]
    for statement in fairness(results):
        assert f"- {statement}" in text


def _index(rows: list[list[str]], row: list[str]) -> int:
    return next(i for i, other in enumerate(rows) if [c for c in other if c] == [c for c in row if c])


def test_chains_of_baselines_that_go_on_from_the_subject() -> None:
    plan = a_plan(baselines=False)
    plan.baselines = [stage("other", after="base", grow=Growth(keys="random"))]
    results = results_of(plan, LOSSES | {"other": [[4.5], [4.5]]})
    assert chains(results) == {"large": ["base", "medium", "large"], "other": ["base", "other"]}
    (against,) = comparisons(results)
    assert (against["from_scratch"], against["flops"]) == (False, pytest.approx(1.8 / 1.4))
