"""The ImageNet recipes, without ImageNet: their values are the paper's, and so is the learning rate at every step."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import TrainingArguments

from tokenformer.cli.train import parse
from tokenformer.errors import UserError
from tokenformer.models import TokenFormerForImageClassification
from tokenformer.training.image_building import classifier_config
from tokenformer.training.image_recipe import ImageRecipe
from tokenformer.training.image_schedule import image_schedule, learning_rates
from tokenformer.training.images import ImageTask
from tokenformer.training.run import _arguments
from tokenformer.training.trainer import RunTrainer

RECIPES = Path(__file__).parents[2] / "recipes" / "vision"
IMAGES, CLASSES = 1_281_167, 1000  # of ImageNet-1K

# Paper, Table 2 and the appendix: layers, channels, tokens of query, key, value and output, tokens of the ffn,
# parameters in millions, epochs, drop path
PAPER = {
    "imagenet-b16-matched": (12, 768, 576, 2304, 86, 300, 0.1),
    "imagenet-b16": (12, 768, 768, 3072, 114, 300, 0.1),  # 109 in the table; its sizes make 114
    "imagenet-l16-matched": (24, 1024, 768, 3072, 307, 200, 0.2),
    "imagenet-l16": (24, 1024, 1024, 4096, 407, 200, 0.2),
}


def recipe(name: str, *words: str) -> ImageRecipe:
    found = parse([str(RECIPES / f"{name}.yaml"), *words])
    assert isinstance(found, ImageRecipe)
    return found


def test_every_imagenet_recipe_is_tested_here() -> None:
    assert sorted(path.stem for path in RECIPES.glob("imagenet-*.yaml")) == sorted(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_recipe_has_the_values_of_the_paper(name: str) -> None:
    *_, epochs, drop_path = PAPER[name]
    found = recipe(name)
    found.validate()
    assert (found.training.epochs, found.model.drop_path) == (epochs, drop_path)
    assert (found.training.batch_size, found.training.ema) == (4096, 0.9999)
    optimizer, augmentation = found.optimizer, found.augmentation
    assert found.learning_rate == pytest.approx(1.6e-3)  # 1e-4 x batch / 256
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.3)
    assert (optimizer.schedule, optimizer.warmup_epochs, optimizer.min_ratio) == ("cosine", 20, 0)
    assert (optimizer.schedule_from, optimizer.schedule_to, optimizer.layer_decay) == (0, 1, 1)
    assert optimizer.max_grad_norm == math.inf
    assert (augmentation.randaugment_magnitude, augmentation.randaugment_std) == (9, 0.5)
    assert (augmentation.mixup, augmentation.cutmix, augmentation.label_smoothing) == (0.8, 1.0, 0.1)
    assert (augmentation.crop, augmentation.erasing) == ("resized", 0)
    assert found.data.resize == 256


@pytest.mark.parametrize("name", PAPER)
def test_model_has_the_sizes_of_the_table(name: str) -> None:
    layers, width, tokens, ffn, millions, *_ = PAPER[name]
    config = classifier_config(recipe(name).model, classes=tuple(map(str, range(CLASSES))), image_size=0)
    with torch.device("meta"):
        model = TokenFormerForImageClassification(config)
    patches = (224 // 16) ** 2
    embeddings = width * (3 * 16 * 16 + 1) + width + (patches + 1) * width  # projection, class token, positions
    blocks = 2 * layers * width * (4 * tokens + ffn)
    wanted = blocks + embeddings + 2 * width + (width + 1) * CLASSES
    assert sum(p.numel() for p in model.parameters()) == wanted
    assert wanted / 1e6 == pytest.approx(millions, rel=0.011)


def by_hand(step: int, *, peak: float, warmup: int, steps: int) -> float:
    """Linear from 0 to the peak, then half a cosine down to 0 (He et al. 2022), in float64."""
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


@pytest.mark.parametrize("name", PAPER)
def test_trainer_has_the_published_learning_rate_at_every_step(name: str, tmp_path: Path) -> None:
    """Of the scheduler that the run's own arguments and Trainer make, stepped to the end."""
    found = recipe(name, "--out", str(tmp_path))
    schedule = image_schedule(found, IMAGES)
    epochs = PAPER[name][5]
    assert schedule.steps_per_epoch == 312
    assert schedule.steps == 312 * epochs
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(()))], lr=found.learning_rate)
    trainer = RunTrainer(
        run=tmp_path,
        keep_checkpoints=1,
        autocast=None,
        evaluate_with=lambda model: {},
        schedule=(found.optimizer.schedule_from, found.optimizer.schedule_to),
        model=nn.Linear(1, 1),
        args=arguments(found, schedule.steps, schedule.warmup),
        eval_dataset=[0],  # never looked at
    )
    scheduler = trainer.create_scheduler(schedule.steps, optimizer)
    rate = learning_rates(found, schedule)
    factor = scheduler.lr_lambdas[0]  # stepping 93,600 times one by one takes seconds
    numbers = {"peak": 1.6e-3, "warmup": 20 * 312, "steps": 312 * epochs}
    for step in (0, 1, 312, 3120, 6239, 6240, 6241, 10 * 3120, 15 * 3120, schedule.steps - 1, schedule.steps):
        assert rate(step) == pytest.approx(by_hand(step, **numbers), rel=1e-12, abs=1e-18), step
        assert found.learning_rate * factor(step) == rate(step)
    assert rate(6240) == pytest.approx(1.6e-3)
    assert rate(6240 + (schedule.steps - 6240) // 2) == pytest.approx(0.8e-3)
    # And what reaches the optimizer.
    seen = []
    for _ in range(3):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([by_hand(step, **numbers) for step in range(3)])


def arguments(found: ImageRecipe, steps: int, warmup: float) -> TrainingArguments:
    """What a run makes of this recipe, without its images."""

    class Task:
        learning_rate = found.learning_rate

    task: Any = Task()
    task.steps, task.warmup = steps, warmup
    return _arguments(found, task, "fp32", torch.device("cpu"))


@settings(max_examples=60)
@given(
    batch=st.integers(1, 500),
    images=st.integers(1, 20_000),
    epochs=st.floats(0.1, 50),
    warmup_epochs=st.none() | st.floats(0, 5),
    part=st.sampled_from([(0.0, 1.0), (0.0, 0.5), (0.25, 1.0), (0.5, 0.75)]),
)
def test_steps_and_warm_up_are_counted_in_whole_batches(
    batch: int, images: int, epochs: float, warmup_epochs: float | None, part: tuple[float, float]
) -> None:
    found = ImageRecipe(out="run")
    found.training.batch_size, found.training.epochs = batch, epochs
    found.optimizer.warmup_epochs, found.optimizer.warmup = warmup_epochs, 0.25
    found.optimizer.schedule_from, found.optimizer.schedule_to = part
    per_epoch = images // batch
    if images < batch:
        with pytest.raises(UserError, match=r"fewer than training.batch_size"):
            image_schedule(found, images)
        return
    whole = math.ceil(epochs * per_epoch) / (part[1] - part[0])
    if warmup_epochs is not None and warmup_epochs * per_epoch > whole:
        with pytest.raises(UserError, match=r"warmup_epochs .* of the schedule"):
            image_schedule(found, images)
        return
    schedule = image_schedule(found, images)
    assert schedule.steps_per_epoch * batch <= images < (schedule.steps_per_epoch + 1) * batch
    assert schedule.steps - 1 < epochs * schedule.steps_per_epoch <= schedule.steps
    warm = 0.25 * whole if warmup_epochs is None else warmup_epochs * schedule.steps_per_epoch
    assert schedule.warmup * whole == pytest.approx(warm)
    rate = learning_rates(found, schedule)
    rates = [rate(step) for step in {0, schedule.steps // 3, schedule.steps // 2, schedule.steps}]
    assert all(-1e-12 <= one <= found.learning_rate * (1 + 1e-12) for one in rates)
    if part[1] == 1 and round(warm) + 1 <= whole:
        assert rate(schedule.steps) == pytest.approx(found.learning_rate * found.optimizer.min_ratio)


def test_an_epoch_of_the_trainer_has_the_steps_of_the_schedule(tmp_path: Path) -> None:
    """In micro-batches too: 29 steps of 3 x 16 from 1438 digits, not 30 of which the last is smaller."""
    found = ImageRecipe(out=str(tmp_path))
    found.training.batch_size, found.training.micro_batch_size, found.training.epochs = 48, 16, 2
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    for name, size in sizes.items():
        setattr(found.model, name, size)
    task = ImageTask(found)
    assert task.steps == 2 * 29
    trainer = task.trainer(
        lambda model: {},
        run=tmp_path,
        keep_checkpoints=1,
        autocast=None,
        model=task.model,
        args=_arguments(found, task, "fp32", torch.device("cpu")),
        train_dataset=task.train_rows,
        eval_dataset=task.held_out_rows,
    )
    sampler = trainer._get_train_sampler()
    assert sampler is not None
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert [len(rows) for rows in epochs] == [29 * 48, 29 * 48]
    positions = [position for rows in epochs for _, position in rows]
    assert positions == list(range(2 * 29 * 48))
    for rows in epochs:
        assert len({row for row, _ in rows}) == 29 * 48
    assert epochs[0][0][0] != epochs[1][0][0]


def test_budget_in_images_and_constant_rate() -> None:
    found = ImageRecipe(out="run")
    found.training.batch_size, found.training.images = 100, 2050
    found.optimizer.schedule, found.optimizer.warmup_epochs = "constant", 1.0
    schedule = image_schedule(found, 1099)
    assert (schedule.steps_per_epoch, schedule.steps) == (10, 21)
    rate = learning_rates(found, schedule)
    assert [rate(step) for step in (0, 5, 10, 21)] == pytest.approx([0, 5e-4, 1e-3, 1e-3])


def test_too_few_images_and_too_long_a_warm_up_are_named() -> None:
    found = recipe("imagenet-b16")
    with pytest.raises(UserError, match=r"has 4095 training images, fewer than training.batch_size 4096"):
        image_schedule(found, 4095)
    found.training.epochs = 10
    with pytest.raises(UserError, match=r"optimizer.warmup_epochs 20 are more than the 10 epochs of the schedule"):
        image_schedule(found, IMAGES)
