"""Prepared text, and plans of two stages and two baselines, for language and for images, that run in seconds."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenformer.data import prepare
from tokenformer.plans.plan import Growth, ImagePlan, Plan, Stage, Start
from tokenformer.training.image_recipe import (
    AugmentationRecipe,
    ImageDataRecipe,
    ImageModelRecipe,
    ImageOptimizerRecipe,
    ImageTrainingRecipe,
)
from tokenformer.training.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, TrainingRecipe

STEP = 4 * 32  # tokens


def prepare_words(folder: Path, tokenizer: str, seed: int, words: str) -> Path:
    draw = random.Random(seed)
    texts = (" ".join(draw.choices(words.split(), k=60)) for _ in range(60))
    folder.mkdir(exist_ok=True)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    prepare(
        [str(folder / "text.jsonl")],
        tokenizer=tokenizer,
        out=str(folder / "data"),
        sequence_length=32,
        held_out=0.2,
        progress=False,
    )
    return folder / "data"


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_words(tmp_path_factory.mktemp("words"), "train:300", 0, "def self return value for in x token if")


@pytest.fixture(scope="session")
def other_words(tmp_path_factory: pytest.TempPathFactory, words: Path) -> Path:
    return prepare_words(tmp_path_factory.mktemp("other"), str(words / "tokenizer"), 1, "value token while x None not")


@pytest.fixture
def make_plan(words: Path, tmp_path: Path) -> Callable[..., Plan]:
    """A plan in tmp_path/plan; keyword arguments replace its fields."""

    def make(**fields: Any) -> Plan:
        plan: dict[str, Any] = {
            "out": str(tmp_path / "plan"),
            "data": DataRecipe(path=str(words), held_out_rows=8),
            "model": ModelRecipe(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, rotary_pct=0.5),
            "optimizer": OptimizerRecipe(warmup=0.1),
            "training": TrainingRecipe(
                batch_size=4, save_every=2, log_every=1, eval_every=3, precision="fp32", compile="off", threads=1
            ),
            "stages": [
                Stage(name="base", train=Start(qkv=16, output=16, ffn=48), tokens=6 * STEP, learning_rate=[1e-3, 3e-3]),
                Stage(name="grown", grow=Growth(qkv=24, output=24, ffn=64), tokens=4 * STEP, learning_rate=2e-3),
            ],
            "baselines": [
                Stage(name="scratch", train=Start(like="grown"), flops_of="grown", learning_rate=2e-3),
                Stage(
                    name="transformer", family="gpt_neox", train=Start(like="grown"), flops_of="grown", flops_times=2.0
                ),
            ],
        }
        return Plan(**(plan | fields))

    return make


def image_plan(out: Path, **fields: Any) -> ImagePlan:
    """A plan for handwritten digits; keyword arguments replace its fields."""
    plan: dict[str, Any] = {
        "out": str(out),
        "data": ImageDataRecipe(train="digits", held_out_images=60, mean=[0.3] * 3, std=[0.35] * 3),
        "model": ImageModelRecipe(
            image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
        ),
        "augmentation": AugmentationRecipe(crop="pad", flip=0.0, randaugment_ops=0, mixup=0.0, cutmix=0.0),
        "optimizer": ImageOptimizerRecipe(warmup=0.1),
        "training": ImageTrainingRecipe(
            batch_size=16, save_every=2, log_every=1, eval_every=3, precision="fp32", compile="off", threads=1
        ),
        "stages": [
            Stage(name="base", train=Start(qkv=16, output=16, ffn=48), images=96, learning_rate=[1e-3, 3e-3]),
            Stage(name="grown", grow=Growth(qkv=24, output=24, ffn=64), images=64, learning_rate=2e-3),
        ],
        "baselines": [
            Stage(name="vit", family="vit", train=Start(like="grown"), flops_of="grown"),
            Stage(name="scratch", train=Start(like="grown"), flops_of="grown", flops_times=0.5),
        ],
    }
    return ImagePlan(**(plan | fields))


@pytest.fixture
def make_image_plan(tmp_path: Path) -> Callable[..., ImagePlan]:
    """`image_plan` in tmp_path/plan."""
    return lambda **fields: image_plan(tmp_path / "plan", **fields)
