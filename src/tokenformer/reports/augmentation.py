"""What the augmentation makes of an image and of a batch, as a picture."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenformer.images.mixing import Mixing
from tokenformer.images.randaugment import OPERATIONS, apply_operation, operation_argument

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 8
_GREY = (0.5, 0.5, 0.5)


def draw_augmentation(images: Tensor, magnitude: float = 9.0, seed: int = 0) -> "Figure":
    """The first image under every operation of RandAugment, then all of them by mixup and by CutMix.

    Operations with two directions are shown in the positive one. Needs kornia.

    Args:
        images: uint8 (B, 3, H, W); up to 8 of them are mixed.
        magnitude: strength of the operations, 0 to 10.
        seed: of the mixing.
    """
    from matplotlib.figure import Figure

    image, batch = images[:1], images[:_COLUMNS]
    one = torch.ones(1)
    panels = {"unchanged": image[0]}
    for name in OPERATIONS:
        argument = operation_argument(name, magnitude * one, one)
        panels[name] = apply_operation(name, image, argument, _GREY)[0]
    figure = Figure(figsize=(_COLUMNS * 1.35, 7), dpi=80, layout="constrained")
    above, *below = figure.subfigures(3, 1, squeeze=False, height_ratios=(2, 1, 1))[:, 0]
    above.suptitle(f"RandAugment: each operation at magnitude {magnitude:g}", fontsize=11)
    for axes, (name, panel) in zip(above.subplots(2, _COLUMNS).flat, panels.items(), strict=True):
        _show(axes, panel, name)
    for part, name, mixing in zip(below, ("mixup", "CutMix"), (Mixing(cutmix=0.0), Mixing(mixup=0.0)), strict=True):
        mixed, targets = mixing(batch.float(), torch.eye(len(batch)), torch.Generator().manual_seed(seed))
        part.suptitle(f"{name}: each image keeps {100 * targets[0, 0]:.0f} %", fontsize=11)
        for axes, panel in zip(part.subplots(1, len(batch), squeeze=False)[0], mixed, strict=True):
            _show(axes, panel.round().to(torch.uint8))
    return figure


def _show(axes: "Axes", panel: Tensor, title: str = "") -> None:
    axes.imshow(panel.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=8)
    axes.set_axis_off()
