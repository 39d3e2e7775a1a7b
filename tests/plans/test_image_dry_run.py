"""The dry run of an image recipe against sums by hand, with and without images."""

import math
from pathlib import Path
from typing import Any

import pytest

from tokenformer import UserError
from tokenformer.cli.train import parse
from tokenformer.plans import estimate
from tokenformer.plans.image_dry_run import describe, image_dry_run
from tokenformer.training.image_recipe import ImageRecipe

RECIPES = Path(__file__).parents[2] / "recipes" / "vision"
IMAGENET = 1_281_167

# layers, channels, parameter tokens of a block, epochs
SIZES = {
    "imagenet-b16-matched": (12, 768, 4 * 576 + 2304, 300),
    "imagenet-b16": (12, 768, 4 * 768 + 3072, 300),
    "imagenet-l16-matched": (24, 1024, 4 * 768 + 3072, 200),
    "imagenet-l16": (24, 1024, 4 * 1024 + 4096, 200),
}


def recipe(*words: str) -> ImageRecipe:
    found = parse([*words])
    assert isinstance(found, ImageRecipe)
    return found


def tiny(**fields: Any) -> ImageRecipe:
    """Two blocks of 16 channels on 8 x 8 pixels of images that are not there, in batches of 100."""
    found = ImageRecipe()
    found.data.train = "nowhere"
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    for name, value in {**sizes, "qkv": 8, "output": 8, "ffn": 24}.items():
        setattr(found.model, name, value)
    found.training.batch_size, found.training.precision = 100, "fp32"
    for name, value in fields.items():
        section, _, field = name.partition("__")
        setattr(getattr(found, section), field, value)
    return found


@pytest.mark.parametrize("name", SIZES)
def test_imagenet_by_hand(name: str) -> None:
    layers, width, tokens, epochs = SIZES[name]
    report = image_dry_run(recipe(str(RECIPES / f"{name}.yaml")), gpu="h100", mfu=0.5)
    assert report["data"] == {
        "train": "imagenet",
        "images": IMAGENET,
        "classes": 1000,
        "image_size": None,
        "assumed": True,
    }
    patches = 14 * 14
    weights = 2 * layers * width * tokens
    parameters = weights + width * (3 * 16 * 16 + 1 + 1 + patches + 1 + 2) + (width + 1) * 1000
    assert report["model"]["parameters"] == parameters
    assert report["model"]["trunk_parameters"] == weights
    assert report["model"]["tokens_per_image"] == 197
    schedule = report["schedule"]
    assert (schedule["steps_per_epoch"], schedule["steps"], schedule["warmup_steps"]) == (312, 312 * epochs, 6240)
    assert schedule["learning_rate"] == pytest.approx(1.6e-3)
    found = {at["epoch"]: at["learning_rate"] for at in schedule["learning_rates"]}
    middle = 20 + (epochs - 20) / 2
    # Quarters of a cosine: (1 + cos(pi / 4)) / 2 and its mirror image.
    wanted = {0: 0, 10: 0.8e-3, 20: 1.6e-3, middle: 0.8e-3, epochs: 0, (20 + middle) / 2: 1.6e-3 * (2 + 2**0.5) / 4}
    for epoch, rate in wanted.items():
        assert found[epoch] == pytest.approx(rate, abs=1e-15)
    # Twice for every weight and token, attention 4 L D T^2, the head once an image; backward twice that, but for the
    # gradient of the pixels, which nobody asks for.
    projection = 2 * patches * width * 3 * 16 * 16
    forward = 2 * 197 * weights + 4 * layers * width * 197**2 + 2 * width * 1000 + projection
    assert report["cost"]["flops_per_image"] == 3 * forward - projection
    flops = 312 * epochs * 4096 * report["cost"]["flops_per_image"]
    assert report["cost"]["flops"] == flops
    assert report["cost"]["hours"] == pytest.approx(flops / (989e12 / 2) / 3600)
    assert report["cost"]["images_per_second"] == pytest.approx(989e12 / 2 / report["cost"]["flops_per_image"])
    assert report["memory"]["average"] == 4 * parameters
    assert report["memory"]["total"] == sum(size for part, size in report["memory"].items() if part != "total")
    assert report["memory"]["total"] < 40e9  # the micro-batch is for an A100 of 40 GB
    assert report["checkpoint_bytes"] == 12 * parameters
    assert report["precision"] == "bf16"


def test_lines_name_what_is_assumed() -> None:
    lines = describe(image_dry_run(recipe(str(RECIPES / "imagenet-b16.yaml"))))
    text = "\n".join(lines)
    for words in (
        "1,281,167 in 1,000 classes (none at imagenet: those of ImageNet-1K are assumed)",
        "114.8M parameters, 113.2M of them in blocks",
        "197 tokens: 224 x 224 pixels in patches of 16",
        "93,600 of 4,096 images, 312 an epoch, the first 6,240 to warm up",
        "1.600e-03 after   6,240 steps, 20 epochs",
        "0.4 of its peak (MFU), which is an assumption",
        "micro-batches of 128 in bf16",
    ):
        assert words in text, words


def test_images_that_are_there_are_counted() -> None:
    found = tiny(data__train="digits", model__image_size=None)  # 359 of 1797 digits are held out
    report = image_dry_run(found)
    assert report["data"] == {"train": "digits", "images": 1438, "classes": 10, "image_size": 8, "assumed": False}
    assert report["model"]["image_size"] == 8
    assert report["schedule"]["steps_per_epoch"] == 14


def test_numbers_given_stand_for_images() -> None:
    report = image_dry_run(tiny(data__train="digits"), images=1000, classes=7)
    assert (report["data"]["images"], report["data"]["classes"]) == (1000, 7)
    assert report["schedule"]["steps"] == 100


def test_vit_is_counted_alike() -> None:
    found = tiny(model__family="vit", model__intermediate_size=32, training__ema=0.9, training__micro_batch_size=50)
    report = image_dry_run(found, images=1000, classes=5)
    trunk = 2 * (4 * 16 * 16 + 2 * 16 * 32 + 4 * 16 + 32 + 16 + 4 * 16)
    assert report["model"]["trunk_parameters"] == trunk
    assert report["model"]["tokens_per_image"] == 5
    assert report["memory"]["average"] == 4 * report["model"]["parameters"]
    assert report["micro_batch_size"] == 50


def test_part_of_a_schedule_shows_its_own_rates() -> None:
    found = tiny(optimizer__schedule_from=0.5, optimizer__min_ratio=0.0, optimizer__warmup=0.1)
    schedule = image_dry_run(found, images=1000, classes=5)["schedule"]
    assert schedule["warmup_steps"] == 0
    rates = [at["learning_rate"] for at in schedule["learning_rates"]]
    # 200 steps in all, 20 of them warm-up: this run begins 80 steps into a cosine of 180.
    assert rates[0] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 80 / 180)) / 2)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-18)


def test_rate_of_the_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_PROBE_FLOPS", 1e7)
    report = image_dry_run(tiny(training__threads=1), images=1000, classes=5, gpu="cpu")
    assert report["rate"]["how"] == "measured"
    assert report["cost"]["hours"] * 3600 * report["rate"]["flops_per_second"] == pytest.approx(report["cost"]["flops"])


@pytest.mark.parametrize(
    ("fields", "options", "words"),
    [
        ({}, {"gpu": "h1000"}, "unknown accelerator 'h1000'"),
        ({}, {"mfu": 1.4}, r"mfu must lie in \(0, 1\], got 1.4"),
        ({}, {"rate": 0.0}, "rate must be positive and finite"),
        ({}, {"images": 99}, "nowhere has 99 training images, fewer than training.batch_size 100"),
        ({}, {"classes": 0}, "the number of classes must be at least 1"),
        ({"model__image_size": None}, {}, "model.image_size: give it"),
        ({"model__patch_size": 3}, {}, "8 x 8 pixels is not divisible into patches of 3"),
        ({"optimizer__warmup_epochs": 11.0}, {"images": 1000}, "warmup_epochs 11 are more than the 10 epochs"),
        ({"training__ema": 1.0}, {}, "training.ema must be below 1"),
    ],
)
def test_recipe_that_cannot_be_carried_out(fields: dict[str, Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        image_dry_run(tiny(**fields), **options)
    assert "\n" not in str(error.value)
