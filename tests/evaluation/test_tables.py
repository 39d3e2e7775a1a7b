"""Markdown of the results, and the paper's rows."""

import pytest

from tokenformer.evaluation.tables import markdown, paper, paper_table, paper_tasks, perplexity_table, task_table


def cells(table):
    """The cells of each line of a Markdown table."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def lm_eval_results(values, **more):
    return {
        "results": {task: {"alias": task, **metrics} for task, metrics in values.items()},
        "n-shot": dict.fromkeys(values, 0),
        "higher_is_better": {"lambada_openai": {"perplexity": False, "acc": True}},
        "config": {"limit": None},
        **more,
    }


ALL_SIX = {
    "lambada_openai": {"perplexity,none": 16.384, "acc,none": 0.45},
    "hellaswag": {"acc,none": 0.1, "acc_norm,none": 0.355},
    "piqa": {"acc,none": 0.649, "acc_norm,none": 0.1},
    "arc_easy": {"acc,none": 0.473, "acc_norm,none": 0.1},
    "arc_challenge": {"acc,none": 0.1, "acc_norm,none": 0.249},
    "winogrande": {"acc,none": 0.504},
}


def test_rows_of_the_paper_agree_with_their_averages():
    accuracies = [i for i, column in enumerate(paper()["columns"]) if column["metric"] != "perplexity"]
    rows = [row for row in paper()["rows"] if row["values"]]
    assert [row["model"] for row in rows] == [f"TokenFormer {size}" for size in ("150M", "450M", "900M", "1.5B")]
    for row in rows:
        assert len(row["values"]) == len(paper()["columns"]) == 7
        mean = sum(row["values"][i] for i in accuracies) / 6
        assert row["average"] == pytest.approx(mean, abs=0.06)  # printed with one decimal


def test_a_model_with_the_figures_of_the_paper_has_its_row():
    heads, _, own, published, *others = cells(paper_table(lm_eval_results(ALL_SIX), "mine"))
    assert heads == [
        "model",
        "LAMBADA ppl",
        "LAMBADA",
        "HellaSwag",
        "PIQA",
        "Arc-E",
        "Arc-C",
        "WinoGrande",
        "average",
    ]
    assert own == ["mine", *published[1:]]
    assert [row[0] for row in others[3:]] == [
        *("Pythia 160M", "Pythia 410M", "Pythia 1B", "Pythia 1.4B"),
        *("Mamba 130M", "Mamba 370M", "Mamba 790M", "Mamba 1.4B"),
    ]
    assert others[-1] == ["Mamba 1.4B", *["-"] * 7, "59.7"]


def test_some_tasks_only():
    table = paper_table(lm_eval_results({"piqa": {"acc,none": 0.5}, "other": {"acc,none": 1.0}}), "mine")
    assert cells(table)[2] == ["mine", "-", "-", "-", "50.0", "-", "-", "-", "-"]
    assert "not comparable" not in table
    assert paper_table(lm_eval_results({"other": {"acc,none": 1.0}}), "mine") is None


def test_what_makes_figures_incomparable_is_said():
    results = lm_eval_results(ALL_SIX, config={"limit": 100.0})
    results["n-shot"]["piqa"] = 5
    table = paper_table(results, "mine")
    assert "limit 100" in table
    assert "0, 5 examples" in table


def test_tasks():
    results = lm_eval_results(
        {
            "lambada_openai": {"sample_len": 4, "perplexity,none": 2e7, "perplexity_stderr,none": "N/A"},
            "gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.01},
        }
    )
    assert cells(task_table(results))[2:] == [
        ["lambada_openai", "perplexity ↓", "2e+07", "-", "0"],
        ["gsm8k", "exact_match (strict-match)", "0.2500", "0.0100", "0"],
    ]


def test_perplexity_of_several_texts():
    figures = {"loss": 2.5, "perplexity": 12.182, "bits_per_byte": 1.2, "documents": 1, "tokens": 1234, "words": 500}
    first = {"name": "a|b.txt", **figures, "bytes": 3000}
    ids = {"name": "ids.idx", **figures, "bits_per_byte": None, "words": None, "bytes": None}
    table = perplexity_table({**ids, "tokens": 2468, "sources": [first, ids]})
    assert "a\\|b.txt" in table
    heads, _, one, two, total = cells(table.replace("\\|", "/"))
    assert heads == ["text", "documents", "tokens", "bytes", "words", "nats/token", "perplexity", "bits/byte"]
    assert one == ["a/b.txt", "1", "1,234", "3,000", "500", "2.5000", "12.1820", "1.2000"]
    assert two == ["ids.idx", "1", "1,234", "-", "-", "2.5000", "12.1820", "-"]
    assert total[:3] == ["all", "1", "2,468"]
    (single,) = cells(
        perplexity_table({**first, "word_perplexity": 3.0, "sources": [{**first, "word_perplexity": 3.0}]})
    )[2:]
    assert single[-1] == "3.0000"


def test_markdown_is_aligned():
    assert markdown(["name", "n"], [["a", "1"], ["longer", "10"]]) == (
        "| name   |   n |\n| ------ | --: |\n| a      |   1 |\n| longer |  10 |\n"
    )
    assert paper_tasks()[0] == "lambada_openai"
    assert len(paper_tasks()) == 6
