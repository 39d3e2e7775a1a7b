"""How many steps an image classifier is trained for, and the learning rate at each."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from tokenformer.errors import UserError
from tokenformer.training.image_recipe import ImageRecipe


@dataclass(frozen=True)
class ImageSchedule:
    """The steps of a run.

    Attributes:
        steps_per_epoch: whole batches in the training images; the rest is left for another epoch's order.
        steps: of the run.
        warmup: share of the schedule spent warming up. A run whose recipe takes a part of a schedule, from
            `schedule_from` to `schedule_to`, has a schedule that is longer than the run.
    """

    steps_per_epoch: int
    steps: int
    warmup: float


def image_schedule(recipe: ImageRecipe, images: int) -> ImageSchedule:
    """The steps of a recipe on a number of training images.

    Raises:
        UserError: fewer images than a batch, a warm-up that is longer than the schedule.
    """
    batch, optimizer, training = recipe.training.batch_size, recipe.optimizer, recipe.training
    if images < batch:
        raise UserError(
            f"{recipe.data.train} has {images} training images, fewer than training.batch_size {batch}: "
            "use a smaller batch or more images"
        )
    per_epoch = images // batch
    steps = math.ceil(training.epochs * per_epoch if training.images is None else training.images / batch)
    warmup = optimizer.warmup
    if optimizer.warmup_epochs is not None:
        whole = steps / (optimizer.schedule_to - optimizer.schedule_from)
        warmup = optimizer.warmup_epochs * per_epoch / whole
        if warmup > 1:
            raise UserError(
                f"optimizer.warmup_epochs {optimizer.warmup_epochs:g} are more than the {whole / per_epoch:g} epochs "
                "of the schedule: lower them, or train longer"
            )
    return ImageSchedule(per_epoch, steps, warmup)


def learning_rates(recipe: ImageRecipe, schedule: ImageSchedule) -> Callable[[int], float]:
    """The learning rate of a step, by how many steps came before it: 0 for the first, `schedule.steps` at the end.

    It is made by the scheduler that the Trainer makes.
    """
    optimizer = recipe.optimizer
    whole = schedule.steps / (optimizer.schedule_to - optimizer.schedule_from)
    cosine = optimizer.schedule == "cosine"
    scheduler = get_scheduler(
        "cosine_with_min_lr" if cosine else "constant_with_warmup",
        optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=recipe.learning_rate),
        num_warmup_steps=round(schedule.warmup * whole),
        num_training_steps=cast(int, whole),  # a fraction too: schedules only divide by it
        scheduler_specific_kwargs={"min_lr_rate": optimizer.min_ratio} if cosine else None,
    )
    (factor,) = cast(LambdaLR, scheduler).lr_lambdas
    first = optimizer.schedule_from * whole

    def rate(step: int) -> float:
        return recipe.learning_rate * float(factor(cast(int, first + step)))

    return rate
