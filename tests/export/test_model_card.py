"""The model card of an export: its header as the Hub reads it, and figures equal to counts by hand."""

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from saved_model import save_model
from tokenformer.cli import main
from tokenformer.evaluation import evaluate_sources, read_sources
from tokenformer.evaluation.record import new_record, write_record
from tokenformer.models.loading import load_model, load_tokenizer

# Two layers of 32 channels, 320 entries, segments of (12, 10, 20) and (0, 0, 12) tokens for qkv, output and ffn.
BASE, GROWN, EMBEDDING, NORM = 2 * 2 * 32 * (3 * 12 + 10 + 20), 2 * 2 * 32 * 12, 320 * 32, 2 * 32
TOTAL = BASE + GROWN + EMBEDDING + NORM
FORWARD = 2 * (BASE + GROWN + EMBEDDING) + 4 * 2 * 32 * 64

TASKS: dict[str, Any] = {
    "kind": "tasks",
    "model": {"name": "x", "path": "x", "model_type": "tokenformer", "parameters": TOTAL, "dtype": "float32"},
    "results": {
        "arc_easy": {
            "name": "arc_easy",
            "alias": "arc_easy",
            "sample_len": 2376,
            "acc,none": 0.4731,
            "acc_stderr,none": 0.0102,
            "acc_norm,none": 0.4012,
            "acc_norm_stderr,none": "N/A",
        },
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.5},
    },
    "n-shot": {"arc_easy": 0, "gsm8k": 5},
    "config": {"limit": None},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    assert save_model(tmp_path / "model", grown=True).num_parameters() == TOTAL
    return tmp_path / "model"


def export(model: Path, *options: str) -> ModelCard:
    out = model.parent / "out"
    assert main(["export-hub", str(model), str(out), *options]) == 0
    return ModelCard.load(out / "README.md")


def table_rows(card: ModelCard) -> list[list[str]]:
    """The cells of each line of each table."""
    lines = [line for line in card.text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def rows(card: ModelCard) -> dict[str, list[str]]:
    """First cell of each line of a table: the others."""
    return {cells[0]: cells[1:] for cells in table_rows(card)}


def test_sizes_and_segments(model) -> None:
    card = export(model, "--name", "owner/small", "--license", "apache-2.0")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["tokenformer", "pattention"],
    }
    assert "# small\n" in card.text
    found = rows(card)
    assert found["parameters"] == [f"{TOTAL:,}"]
    assert found["in parameter tokens"] == [f"{BASE + GROWN:,}"]
    assert found["in the embedding"] == [f"{EMBEDDING:,}"]
    assert found["FLOPs per token, forward, at length 64"] == [f"{FORWARD:.3g}"]
    assert found["FLOPs per token, training"] == [f"{3 * FORWARD:.3g}"]
    assert found["base"] == ["12", "10", "20", f"{BASE:,}", f"{BASE:,}"]
    assert found["grown1"] == ["0", "0", "12", f"{GROWN:,}", f"{BASE + GROWN:,}"]
    assert "grown once from `base`" in card.text
    assert "4.47214 = sqrt(20) for ffn" in card.text, "the scale was kept while growing"
    assert "## Training" not in card.text
    assert "## Evaluation" not in card.text


def test_a_model_of_one_segment_was_not_grown(tmp_path) -> None:
    save_model(tmp_path / "model")
    card = export(tmp_path / "model")
    assert "\n## Segments\n" in card.text
    assert "license" not in card.data.to_dict()
    assert "# out\n" in card.text


def test_the_command_to_grow_works(model, tmp_path) -> None:
    card = export(model, "--name", "owner/small")
    (line,) = re.findall(r"^tokenformer (grow .*)$", card.text, re.MULTILINE)
    folders = {"owner/small": str(tmp_path / "out"), "grown": str(tmp_path / "grown")}
    words = [folders.get(word, word) for word in shlex.split(line)]
    assert main(words) == 0
    assert load_model(tmp_path / "grown").num_token_parameters() == 2 * (BASE + GROWN)


def test_the_figures_of_a_run(model) -> None:
    summary = {
        "parameters": TOTAL,
        "tokens": 7_000_064,
        "flops": 1.2345e15,
        "eval_perplexity": 12.3456,
        "mfu": None,
        "eval_bits_per_byte": None,
    }
    (model / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    found = rows(export(model))
    assert found["tokens"] == ["7,000,064"]
    assert found["FLOPs"] == ["1.23e+15"]
    assert found["held-out perplexity"] == ["12.35"]
    assert "held-out bits per byte" not in found


def test_the_figures_of_perplexity(model, tmp_path) -> None:
    (tmp_path / "book.txt").write_text("the quick brown fox | jumps over the lazy dog", encoding="utf-8")
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    record = new_record("perplexity", loaded, str(model), command=None, threads=1)
    sources = read_sources([str(tmp_path / "book.txt")], tokenizer)
    record["results"] = evaluate_sources(loaded, tokenizer, sources, context=8, stride=4)
    write_record(record, str(tmp_path / "eval.json"))
    card = export(model, "--eval", str(tmp_path / "eval.json"))
    (source,) = record["results"]["sources"]
    assert math.exp(source["loss"]) == pytest.approx(source["perplexity"])
    heads, cells = rows(card)["text"], rows(card)["book.txt"]
    shown = float(cells[heads.index("perplexity")].replace(",", ""))
    assert shown == pytest.approx(source["perplexity"], rel=1e-4)
    assert str(tmp_path) not in card.content, "where the text lay concerns nobody"
    assert "Context of 8 tokens, moved on by 4." in card.text
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["perplexity"].metric_value == source["perplexity"]
    assert results["bits_per_byte"].metric_value == source["bits_per_byte"]
    assert results["perplexity"].dataset_name == "book.txt"
    assert card.data.model_name == "out"


def test_the_figures_of_tasks(model, tmp_path) -> None:
    for name, limit in (("all", None), ("part", 10.0)):
        record = {**TASKS, "config": {"limit": limit}}
        (tmp_path / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    card = export(model, "--eval", str(tmp_path / "all.json"), str(tmp_path / "part.json"), "--name", "owner/small")
    found = table_rows(card)
    whole = [["arc_easy", "acc", "0.4731", "0.0102", "0"], ["arc_easy", "acc_norm", "0.4012", "-", "0"]]
    assert [cells for cells in found if cells[0] == "arc_easy"] == whole * 2
    assert ["gsm8k", "exact_match (strict-match)", "0.2500", "0.5000", "5"] in found
    # 47.3 stands in the paper's table too.
    (paper,) = {tuple(cell for cell in cells if cell != "-") for cells in found if cells[0] == "owner/small"}
    assert paper == ("owner/small", "47.3")
    assert "limit 10" in card.text
    # The header is what the Hub compares: a part of a task does not go there.
    assert [(r.dataset_type, r.metric_type, r.metric_value) for r in card.data.eval_results] == [
        ("arc_easy", "acc", 0.4731),
        ("arc_easy", "acc_norm", 0.4012),
        ("gsm8k", "exact_match", 0.25),
    ]
