"""The classes of images and those of a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tokenformer.errors import UserError


def class_names(model: nn.Module) -> list[str]:
    """Names of a classifier's classes, in their order, by `config.id2label`."""
    config: Any = model.config
    return [str(config.id2label[i]) for i in range(len(config.id2label))]


def match_classes(id2label: Mapping[int, str], classes: Sequence[str]) -> tuple[list[str], torch.Tensor]:
    """Bring the classes of images to those of a model.

    The same names in another order are matched by name. Where one side has no names (LABEL_0, LABEL_1, ... of the
    model; 0, 1, ... of the images) and the numbers are equal, they are matched by position, with the names of the
    other side.

    Args:
        id2label: names of the model's classes.
        classes: names of the images' classes.

    Returns:
        The names in the order of the model, and the model's class of each class of the images.

    Raises:
        UserError: the classes are not the same.
    """
    own, theirs = [str(id2label[i]) for i in range(len(id2label))], list(classes)
    in_order = torch.arange(len(own))
    if own == theirs:
        return own, in_order
    if len(own) == len(theirs):
        if set(own) == set(theirs) and len(set(own)) == len(own):
            return own, torch.tensor([own.index(name) for name in theirs])
        if own == [f"LABEL_{i}" for i in range(len(own))]:
            return theirs, in_order
        if theirs == [str(i) for i in range(len(own))]:
            return own, in_order
    lacks, surplus = _only(theirs, own), _only(own, theirs)
    raise UserError(
        f"the model has {len(own)} classes and the images {len(theirs)}, which are not the same: "
        + "; ".join([f"only the images have {lacks}"] * bool(lacks) + [f"only the model has {surplus}"] * bool(surplus))
        + ("" if lacks or surplus else "one name stands for two classes")
        + ": give images of the model's classes, or correct id2label in its config.json"
    )


def _only(names: list[str], others: list[str]) -> str:
    known = set(others)
    only = [f"'{name}'" for name in names if name not in known]
    return ", ".join(only[:3]) + (f" and {len(only) - 3} more" if len(only) > 3 else "")
