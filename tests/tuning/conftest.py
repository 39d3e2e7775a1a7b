"""Trained bases and their data: a language model of 40 steps, and an image classifier that is random."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tiny_vision import save_classifier
from tokenformer.data import prepare
from tokenformer.training import Recipe, train
from tokenformer.training.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, TrainingRecipe

OLD = ["def", "self", "return", "value", "for", "in", "(", ")", ":", "x", "token", "if", "not", "None"]
NEW = ["whereas", "party", "shall", "court", "x", "if", "not", "clause", "the", "said"]
COLOURS = {"ant": (250, 20, 20), "bee": (20, 250, 20), "cat": (20, 20, 250)}


@dataclass(frozen=True)
class Base:
    """A model, data that are new to it, and the data it was trained on."""

    model: Path
    new: Path
    old: Path


def _documents(path: Path, words: list[str], seed: int) -> str:
    """Random sequences in which a word is followed by one of two others."""
    draw = random.Random(seed)
    follow = {word: draw.sample(words, 2) for word in words}
    lines = []
    for _ in range(60):
        text = [draw.choice(words)]
        while len(text) < 60:
            text.append(draw.choice(follow[text[-1]]))
        lines.append(json.dumps({"text": " ".join(text)}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def language(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("language")
    options = {"sequence_length": 32, "held_out": 0.1, "progress": False}
    old = _documents(folder / "old.jsonl", OLD, 0)
    prepare([old], tokenizer="train:300", out=str(folder / "old"), **options)
    model = str(folder / "base")
    train(
        Recipe(
            out=model,
            model=ModelRecipe(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, qkv=16, output=16, ffn=48, rotary_pct=0.5
            ),
            data=DataRecipe(path=str(folder / "old")),
            optimizer=OptimizerRecipe(learning_rate=1e-2, warmup=0.1),
            training=TrainingRecipe(tokens=40 * 4 * 32, batch_size=4, save_every=0, precision="fp32", threads=1),
        ),
        progress=False,
    )
    new = _documents(folder / "new.jsonl", NEW, 1)
    prepare([new], tokenizer=model, out=str(folder / "new"), **options)
    return Base(folder / "base", folder / "new", folder / "old")


@pytest.fixture(scope="session")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("vision")
    draw = random.Random(0)
    for name, colour in COLOURS.items():
        for i in range(16):
            shade = tuple(max(0, min(255, channel + draw.randint(-60, 60))) for channel in colour)
            (folder / "images" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 12), shade).save(folder / "images" / name / f"{i}.png")
    names = dict(enumerate(COLOURS))
    save_classifier(folder / "base", id2label=names, label2id={name: i for i, name in names.items()})
    return Base(folder / "base", folder / "images", folder / "images")
