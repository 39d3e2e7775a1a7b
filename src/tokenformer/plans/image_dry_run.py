"""What training an image classifier will cost, before any of it is spent and without its images."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification, PreTrainedModel

from tokenformer.errors import UserError
from tokenformer.hardware import set_threads
from tokenformer.images import open_images
from tokenformer.models.cost import tokens_per_image, training_flops_per_image, trunk_parameters
from tokenformer.plans.estimate import (
    CPU,
    assumed_precision,
    assumed_rate,
    check_rate,
    checkpoint_bytes,
    image_training_memory,
    measured_image_rate,
)
from tokenformer.plans.units import bytes_text, count_text, flops_text, hours_text, rate_text
from tokenformer.training.image_building import classifier_config, load_any_classifier
from tokenformer.training.image_recipe import ImageRecipe
from tokenformer.training.image_schedule import ImageSchedule, image_schedule, learning_rates

# Of ImageNet-1K, which stand for images that are not there.
_IMAGES, _CLASSES = 1_281_167, 1000


def image_dry_run(
    recipe: ImageRecipe,
    *,
    images: int | None = None,
    classes: int | None = None,
    gpu: str = "a100",
    mfu: float = 0.4,
    rate: float | None = None,
) -> dict[str, Any]:
    """Work out a recipe of an image classifier and estimate its cost; trains nothing and writes nothing.

    Args:
        recipe: to be carried out.
        images: training images. If not given: those of `data.train` where they are there, otherwise as many as
            ImageNet-1K has (1,281,167).
        classes: that they belong to; likewise (1000).
        gpu: an accelerator whose peak is known, such as `a100` or `h100`; or `cpu`: a few steps of training on this
            machine then measure its speed.
        mfu: share of the accelerator's peak that training is assumed to reach. An assumption: measure yours.
        rate: FLOP/s that training reaches, where that is known; in place of a peak and a share of it.

    Returns:
        `data` (images, classes, and whether they are assumed), `model` (sizes), `schedule` (steps, and the learning
        rate at some of them), `cost` (FLOPs, images per second, hours of one device without compiling, augmenting,
        evaluating and saving), `memory` and `checkpoint_bytes`, and `rate`, the speed behind the hours.

    Raises:
        UserError: an accelerator that is not known, a share outside (0, 1], a recipe that cannot be carried out.
    """
    check_rate(gpu, mfu, rate)
    dataclasses.replace(recipe, out=recipe.out or "unused").validate()
    data = _data(recipe, images, classes)
    schedule = image_schedule(recipe, data["images"])
    model = _model(recipe, data)
    training = recipe.training
    flops_per_image = training_flops_per_image(model)
    on_cpu = gpu.lower() == CPU
    precision = assumed_precision(training.precision, on_cpu=on_cpu)

    def measure() -> float:
        set_threads(training.threads)
        return measured_image_rate(model.config, flops_per_image=flops_per_image, precision=precision)

    speed = assumed_rate(gpu, mfu, rate, measure=measure)
    micro = training.micro_batch_size or training.batch_size
    memory = image_training_memory(
        model,
        images=micro,
        precision=precision,
        gradient_checkpointing=training.gradient_checkpointing,
        average=training.ema > 0,
    )
    flops = schedule.steps * training.batch_size * flops_per_image
    return {
        "data": data,
        "model": {
            "family": recipe.model.family,
            "parameters": model.num_parameters(),
            "trunk_parameters": trunk_parameters(model),
            "image_size": model.config.image_size,
            "patch_size": model.config.patch_size,
            "tokens_per_image": tokens_per_image(model.config),
        },
        "schedule": {
            "steps_per_epoch": schedule.steps_per_epoch,
            "steps": schedule.steps,
            "warmup_steps": _warmup_steps(recipe, schedule),
            "batch_size": training.batch_size,
            "learning_rate": recipe.learning_rate,
            "learning_rates": _milestones(recipe, schedule),
        },
        "cost": {
            "flops_per_image": flops_per_image,
            "flops": flops,
            "images_per_second": speed["flops_per_second"] / flops_per_image,
            "hours": flops / speed["flops_per_second"] / 3600,
        },
        "micro_batch_size": micro,
        "precision": precision,
        "memory": {**dataclasses.asdict(memory), "total": memory.total},
        "checkpoint_bytes": checkpoint_bytes(model.num_parameters()),
        "rate": speed,
    }


def _data(recipe: ImageRecipe, images: int | None, classes: int | None) -> dict[str, Any]:
    given = recipe.data
    size = None
    if (images is None or classes is None) and (given.train == "digits" or Path(given.train).exists()):
        opened = open_images(
            given.train,
            held_out=given.held_out,
            image_column=given.image_column,
            label_column=given.label_column,
            on_bad_image=given.bad_images,
        )
        images = len(opened.train) if images is None else images
        classes = len(opened.classes) if classes is None else classes
        size = max(opened.image_size)
    assumed = images is None or classes is None
    images, classes = _IMAGES if images is None else images, _CLASSES if classes is None else classes
    for name, number in (("images", images), ("classes", classes)):
        if number < 1:
            raise UserError(f"the number of {name} must be at least 1, got {number}")
    return {"train": given.train, "images": images, "classes": classes, "image_size": size, "assumed": assumed}


def _model(recipe: ImageRecipe, data: dict[str, Any]) -> PreTrainedModel:
    """The model without memory for its parameters, or the one in model.path."""
    given = recipe.model
    if given.path:
        return load_any_classifier(given.path)
    size = given.image_size or data["image_size"]
    if size is None and given.preset is None:
        raise UserError("model.image_size: give it, as there are no images to tell it")
    names = tuple(str(number) for number in range(data["classes"]))
    config = classifier_config(given, classes=names, image_size=size or 0)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForImageClassification.from_config(config)
    return model


def _warmup_steps(recipe: ImageRecipe, schedule: ImageSchedule) -> int:
    """Those of the whole schedule that fall into this run."""
    optimizer = recipe.optimizer
    whole = schedule.steps / (optimizer.schedule_to - optimizer.schedule_from)
    return max(0, round(schedule.warmup * whole) - round(optimizer.schedule_from * whole))


def _milestones(recipe: ImageRecipe, schedule: ImageSchedule) -> list[dict[str, float]]:
    """The learning rate at the beginning, halfway through the warm-up, at its end, and at each quarter of the rest."""
    rate, warmup = learning_rates(recipe, schedule), min(_warmup_steps(recipe, schedule), schedule.steps)
    rest = schedule.steps - warmup
    steps = sorted({0, warmup // 2, *(warmup + rest * quarter // 4 for quarter in range(5))})
    return [
        {"step": step, "epoch": step / schedule.steps_per_epoch, "learning_rate": rate(min(step, schedule.steps))}
        for step in steps
    ]


def print_image_dry_run(report: dict[str, Any]) -> None:
    """Show what `image_dry_run` returned."""
    from rich.console import Console

    console = Console(highlight=False)
    for line in describe(report):
        console.print(line, soft_wrap=True)


def describe(report: dict[str, Any]) -> list[str]:
    """What `image_dry_run` returned as lines of text."""
    data, model, schedule, cost = report["data"], report["model"], report["schedule"], report["cost"]
    memory = report["memory"]
    source = f"none at {data['train']}: those of ImageNet-1K are assumed" if data["assumed"] else data["train"]
    parts = [
        f"{name} {bytes_text(memory[name])}"
        for name in ("weights", "gradients", "moments", "average", "activations")
        if memory[name]
    ]
    return [
        f"images    {data['images']:,} in {data['classes']:,} classes ({source})",
        f"model     {model['family']}, {count_text(model['parameters'])} parameters, "
        f"{count_text(model['trunk_parameters'])} of them in blocks",
        f"sequence  {model['tokens_per_image']} tokens: {model['image_size']} x {model['image_size']} pixels in "
        f"patches of {model['patch_size']}",
        f"steps     {schedule['steps']:,} of {schedule['batch_size']:,} images, {schedule['steps_per_epoch']:,} an "
        f"epoch, the first {schedule['warmup_steps']:,} to warm up",
        "rate      "
        + "\n          ".join(
            f"{at['learning_rate']:.3e} after {at['step']:>7,} steps, {at['epoch']:.4g} epochs"
            for at in schedule["learning_rates"]
        ),
        f"FLOPs     {flops_text(cost['flops_per_image'])} to train on an image, {flops_text(cost['flops'])} in all",
        f"time      {hours_text(cost['hours'])} hours, {count_text(cost['images_per_second'])} images/s, "
        f"{rate_text(report['rate'])}",
        f"memory    {bytes_text(memory['total'])} of one device for micro-batches of {report['micro_batch_size']} in "
        f"{report['precision']}, without torch.compile: {', '.join(parts)}",
        f"disk      {bytes_text(report['checkpoint_bytes'])} for each checkpoint",
    ]
