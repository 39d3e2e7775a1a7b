"""Mixup, CutMix, soft targets and their loss.

Mixup: Zhang et al., https://arxiv.org/abs/1710.09412. CutMix: Yun et al., https://arxiv.org/abs/1905.04899. As
published in timm's training recipe: one draw for the whole batch, and image i is mixed with image B - 1 - i, the batch
in reverse order (the middle one of an odd batch with itself).
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def soft_targets(labels: Tensor, num_labels: int, smoothing: float = 0.0) -> Tensor:
    """Class indices as distributions: (1 - smoothing) on the label, and smoothing spread over all C classes.

    Args:
        labels: class indices (B).
        num_labels: C.
        smoothing: label smoothing, 0 to 1.

    Returns:
        float32 (B, C); rows sum to one.
    """
    elsewhere = smoothing / num_labels
    targets = torch.full((len(labels), num_labels), elsewhere, device=labels.device)
    return targets.scatter_(1, labels.long()[:, None], 1 - smoothing + elsewhere)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of -sum_c targets_c log softmax(logits)_c, in nats; at least in float32.

    Args:
        logits: (B, C).
        targets: distributions (B, C).
    """
    return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.to(logits.device))


def cutmix_box(height: int, width: int, share: float, center: tuple[int, int]) -> tuple[int, int, int, int]:
    """The rectangle that comes from the other image: of the image's shape, clipped at its borders.

    Args:
        height: of the images, in pixels.
        width: of the images, in pixels.
        share: of its own pixels that an image keeps, before clipping.
        center: row and column of the rectangle's centre.

    Returns:
        first row, row after the last, first column, column after the last.
    """
    side = math.sqrt(1 - share)
    half = int(height * side) // 2, int(width * side) // 2
    (row, column), (high, wide) = center, half
    return max(row - high, 0), min(row + high, height), max(column - wide, 0), min(column + wide, width)


class Mixing:
    """Mixes each image of a batch with another of it; the share that it keeps is that of its target too.

    Args:
        mixup: alpha of Beta(alpha, alpha), the share an image keeps in a blend of two; 0 never blends.
        cutmix: alpha of Beta(alpha, alpha), the share of its pixels an image keeps around a rectangle of another; 0
            never cuts.
        switch: probability of CutMix where both are on.
    """

    def __init__(self, mixup: float = 0.8, cutmix: float = 1.0, switch: float = 0.5) -> None:
        self.mixup, self.cutmix, self.switch = mixup, cutmix, switch

    def draw(self, generator: torch.Generator) -> tuple[Literal["mixup", "cutmix"], float]:
        """How this batch is mixed, and the share that an image keeps (of CutMix: before clipping)."""
        assert self.mixup or self.cutmix, "nothing to draw: mixing is off"
        cut = not self.mixup
        if self.mixup and self.cutmix:
            cut = _uniform(generator) < self.switch
        alpha = self.cutmix if cut else self.mixup
        return "cutmix" if cut else "mixup", _beta(alpha, generator)

    def __call__(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: (B, C, H, W), floating point.
            targets: distributions (B, K).
            generator: the only source of randomness.

        Returns:
            images and targets, mixed; the given ones are not changed.
        """
        if not (self.mixup or self.cutmix):
            return images, targets
        kind, share = self.draw(generator)
        if kind == "mixup":
            images = torch.lerp(images.flip(0), images, share)
        else:
            height, width = images.shape[-2:]
            center = int(_uniform(generator) * height), int(_uniform(generator) * width)
            top, bottom, left, right = cutmix_box(height, width, share, center)
            others = images[..., top:bottom, left:right].flip(0)
            images = images.clone()
            images[..., top:bottom, left:right] = others
            share = 1 - (bottom - top) * (right - left) / (height * width)
        return images, share * targets + (1 - share) * targets.flip(0)


def _uniform(generator: torch.Generator) -> float:
    # In float64: the float32 below 1 times a side could round up to the side itself.
    return torch.rand((), generator=generator, device=generator.device, dtype=torch.float64).item()


def _beta(alpha: float, generator: torch.Generator) -> float:
    """One draw of Beta(alpha, alpha). PyTorch's own takes no generator, NumPy's is seeded from the one given."""
    import numpy as np

    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    return float(np.random.default_rng(seed).beta(alpha, alpha))
