"""Tasks for lm-eval that need no network: one YAML file for each way in which lm-eval asks a model, and their data."""

import json
from pathlib import Path
from typing import Any

import yaml

DOCUMENTS = [
    {"text": "the quick brown fox", "choices": ["jumps over", "the lazy dog and the", "naïve"], "gold": 0},
    {"text": "größer als", "choices": ["日本語", "the dog", "café"], "gold": 1},
    {"text": "over the lazy", "choices": ["dog", "fox fox fox", "東京 🦊"], "gold": 2},
    {"text": "a fox", "choices": ["a", "b", "the"], "gold": 0},
    {"text": "naïve café, 東京", "choices": ["🦊", "jumps", "als"], "gold": 1},
]
NAMES = ["local_choice", "local_likelihood", "local_rolling", "local_generate"]

_METRICS: dict[str, Any] = {
    "local_choice": ["acc", "acc_norm"],
    "local_likelihood": ["perplexity", "acc"],
    "local_rolling": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
    "local_generate": ["exact_match"],
}


def write_tasks(folder: Path, documents: list[dict[str, Any]] | None = None) -> Path:
    """Write the tasks and `documents.jsonl`; returns the folder, for --include-path.

    Args:
        folder: to be made.
        documents: with `text`, `choices`, `gold`, and optionally `answer` (what the model is to generate).
    """
    folder.mkdir()
    data = folder / "documents.jsonl"
    rows = [{"answer": "", **document} for document in documents or DOCUMENTS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked: dict[str, dict[str, Any]] = {
        "local_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_target": "gold",
            "doc_to_choice": "{{choices}}",
        },
        "local_likelihood": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text}}",
            "doc_to_target": " {{choices[gold]}}",
        },
        "local_rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
        "local_generate": {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        },
    }
    for name, how in asked.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data), "train": str(data)}},
            "training_split": "train",
            "test_split": "test",
            "metric_list": [{"metric": metric} for metric in _METRICS[name]],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | how), encoding="utf-8")
    return folder
