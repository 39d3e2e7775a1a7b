"""A prepared corpus shared by the training tests, and a recipe small enough to run in a second."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tokenformer.data import prepare
from tokenformer.training import Recipe
from tokenformer.training.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, TrainingRecipe


def write_text(path: Path, documents: int = 60, seed: int = 0) -> str:
    draw = random.Random(seed)
    words = ["def", "self", "return", "value", "for", "in", "(", ")", ":", "\n    ", "x", "token", "if", "not", "None"]
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=60))}) for _ in range(documents)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(
        [write_text(folder / "text.jsonl")],
        tokenizer="train:300",
        out=str(folder / "data"),
        sequence_length=32,
        held_out=0.1,
        progress=False,
    )
    return folder / "data"


@pytest.fixture(scope="session")
def recipe_in(prepared: Path) -> Callable[..., Recipe]:
    """Twelve steps of 4 rows on a model of two layers and 32 channels; keyword arguments are dotted fields."""

    def make(out: Path, **fields: Any) -> Recipe:
        recipe = Recipe(
            out=str(out),
            model=ModelRecipe(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, qkv=16, output=16, ffn=48, rotary_pct=0.5
            ),
            data=DataRecipe(path=str(prepared)),
            optimizer=OptimizerRecipe(learning_rate=3e-3, warmup=0.1),
            training=TrainingRecipe(
                tokens=12 * 4 * 32, batch_size=4, save_every=4, log_every=2, precision="fp32", threads=1
            ),
        )
        for name, value in fields.items():
            section, _, field = name.partition("__")
            setattr(getattr(recipe, section), field, value)
        return recipe

    return make


@pytest.fixture
def make_recipe(recipe_in: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    """The recipe of `recipe_in` in a folder of this test."""
    return lambda out="run", **fields: recipe_in(tmp_path / out, **fields)


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., str]:
    """A recipe as a YAML file; returns its path."""

    def write(recipe: Recipe, name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(yaml.safe_load(recipe.to_yaml())), encoding="utf-8")
        return str(path)

    return write
