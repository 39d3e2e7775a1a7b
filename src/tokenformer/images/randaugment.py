"""RandAugment for a batch in which every image draws for itself, on the device that holds the images.

RandAugment: Cubuk et al., https://arxiv.org/abs/1909.13719. The set of operations, their ranges and the noise on the
strength are those of the recipe `rand-m9-mstd0.5-inc1` of timm, by which supervised Vision Transformers are trained
(MAE, https://arxiv.org/abs/2111.06377, appendix A.2). With m the strength from 0 to 10 and s a sign by a fair coin:

| operation | argument | at m = 9 | what it does |
| --- | --- | --- | --- |
| AutoContrast | none | | stretches each channel to 0..255 |
| Equalize | none | | flattens the histogram of each channel |
| Invert | none | | 255 - pixel |
| Rotate | 30 s m / 10 | 27 or -27 | degrees about the centre, counter-clockwise |
| Posterize | 4 - int(4 m / 10) | 1 | high bits that are kept; 0 gives black |
| Solarize | 256 - int(256 m / 10) | 26 | inverts pixels from this level on |
| SolarizeAdd | int(110 m / 10) | 99 | is added to pixels below 128 |
| Color | 1 + 0.9 s m / 10 | 0.19 or 1.81 | 0 is the grey image, 1 the image itself |
| Contrast | as Color | 0.19 or 1.81 | 0 is its mean grey level |
| Brightness | as Color | 0.19 or 1.81 | 0 is black |
| Sharpness | as Color | 0.19 or 1.81 | 0 is smoothed, above 1 sharpened |
| ShearX | 0.3 s m / 10 | 0.27 or -0.27 | a pixel comes from so many columns further right for each row down |
| ShearY | 0.3 s m / 10 | 0.27 or -0.27 | a pixel comes from so many rows further down for each column |
| TranslateXRel | 0.45 s m / 10 | 0.405 or -0.405 | of the width further right, where a pixel comes from |
| TranslateYRel | 0.45 s m / 10 | 0.405 or -0.405 | of the height further down, likewise |

Each operation gives what Pillow gives, within a level of 255: Pillow cuts fractions off where we round. The geometric
ones interpolate bicubically; PyTorch's cubic has the slope -0.75 where Pillow's has -1.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from tokenformer.errors import UserError, require_extra

STRONGEST = 10.0
# Of each operation that was drawn: published, and no option there either.
PROBABILITY = 0.5
_LEVELS = 255.0


class _Operation(NamedTuple):
    # (level = m / 10, s) -> argument of each image
    argument: Callable[[Tensor, Tensor], Tensor]
    # (images in 0..1 (B, 3, H, W), arguments (B,)) -> images; None for those that move pixels
    recolour: Callable[[Tensor, Tensor], Tensor] | None = None


def _none(level: Tensor, sign: Tensor) -> Tensor:
    return torch.zeros_like(level)


def _enhance(level: Tensor, sign: Tensor) -> Tensor:
    return 1 + 0.9 * level * sign


def _signed(most: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda level, sign: most * level * sign


def _auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    # A channel of one level has nothing to stretch.
    return torch.where(high > low, (images - low) / (high - low), images)


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    from kornia.enhance import equalize

    return equalize(images)


def _invert(images: Tensor, _: Tensor) -> Tensor:
    from kornia.enhance import invert

    return invert(images)


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    from kornia.enhance import posterize

    return posterize(images, bits.long())


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    from kornia.enhance import solarize

    return solarize(images, threshold / _LEVELS)


def _solarize_add(images: Tensor, addition: Tensor) -> Tensor:
    # kornia's `additions` reach the bright pixels too, and invert; the published operation lifts the dark ones only.
    return torch.where(images < 128 / _LEVELS, (images + _each(addition) / _LEVELS).clamp(max=1), images)


def _color(images: Tensor, factor: Tensor) -> Tensor:
    from kornia.enhance import adjust_saturation_with_gray_subtraction

    return adjust_saturation_with_gray_subtraction(images, factor)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    from kornia.color import rgb_to_grayscale

    # The mean is a whole level, as Pillow's, and summed in integers: in floating point it would depend on the threads.
    grey = (rgb_to_grayscale(images) * _LEVELS).round().long().sum((2, 3), keepdim=True)
    mean = (grey / images[0, 0].numel() + 0.5).floor() / _LEVELS
    return mean + _each(factor) * (images - mean)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    from kornia.enhance import adjust_brightness_accumulative

    return adjust_brightness_accumulative(images, factor)


def _sharpness(images: Tensor, factor: Tensor) -> Tensor:
    from kornia.enhance import sharpness

    return sharpness(images, factor)


_OPERATIONS = {
    "AutoContrast": _Operation(_none, _auto_contrast),
    "Equalize": _Operation(_none, _equalize),
    "Invert": _Operation(_none, _invert),
    "Rotate": _Operation(_signed(30.0)),
    "Posterize": _Operation(lambda level, _: 4 - (4 * level).floor(), _posterize),
    "Solarize": _Operation(lambda level, _: 256 - (256 * level).floor(), _solarize),
    "SolarizeAdd": _Operation(lambda level, _: (110 * level).floor(), _solarize_add),
    "Color": _Operation(_enhance, _color),
    "Contrast": _Operation(_enhance, _contrast),
    "Brightness": _Operation(_enhance, _brightness),
    "Sharpness": _Operation(_enhance, _sharpness),
    "ShearX": _Operation(_signed(0.3)),
    "ShearY": _Operation(_signed(0.3)),
    "TranslateXRel": _Operation(_signed(0.45)),
    "TranslateYRel": _Operation(_signed(0.45)),
}
OPERATIONS = tuple(_OPERATIONS)


def _each(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def operation_argument(name: str, magnitude: Tensor, sign: Tensor) -> Tensor:
    """What an operation is called with at a given strength, by the table above.

    Args:
        name: one of `OPERATIONS`.
        magnitude: strength of each image, 0 to 10 (B).
        sign: 1 or -1 for each image (B); only what has two directions looks at it.

    Returns:
        (B), in the unit of the table; zeros for an operation without argument.
    """
    return _OPERATIONS[name].argument(magnitude / STRONGEST, sign)


def apply_operation(name: str, images: Tensor, argument: Tensor, fill: Sequence[float]) -> Tensor:
    """One operation of RandAugment on a batch.

    Args:
        name: one of `OPERATIONS`.
        images: uint8 (B, 3, H, W).
        argument: of each image (B), from `operation_argument`.
        fill: colour that the geometric operations bring in from outside, red, green and blue from 0 to 1.

    Returns:
        uint8 (B, 3, H, W), on the device of the images.
    """
    argument = argument.to(images.device)
    recolour = _OPERATIONS[name].recolour
    if recolour is None:
        return _moved(images, _affine(name, argument, images.shape[-1] / images.shape[-2]), fill)
    return _recoloured(images, recolour, argument)


def _recoloured(images: Tensor, recolour: Callable[[Tensor, Tensor], Tensor], argument: Tensor) -> Tensor:
    return _levels(recolour(images.float() / _LEVELS, argument))


def _levels(images: Tensor) -> Tensor:
    # Each operation takes and gives whole levels: the histograms and bits of the next are then well defined.
    return (images.clamp(0, 1) * _LEVELS).round().to(torch.uint8)


def _affine(name: str, argument: Tensor, aspect: float) -> Tensor:
    """Where a pixel comes from, in coordinates in which an image spans -1 to 1 both ways: (B, 2, 3)."""
    matrix = torch.eye(2, 3, device=argument.device).repeat(len(argument), 1, 1)
    if name == "Rotate":
        angle = argument * (math.pi / 180)
        matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos()
        matrix[:, 0, 1] = -angle.sin() / aspect
        matrix[:, 1, 0] = angle.sin() * aspect
    elif name == "ShearX":
        # About the upper left corner, not the centre: the top row stays where it is.
        matrix[:, 0, 1] = matrix[:, 0, 2] = argument / aspect
    elif name == "ShearY":
        matrix[:, 1, 0] = matrix[:, 1, 2] = argument * aspect
    else:
        matrix[:, 0 if name == "TranslateXRel" else 1, 2] = 2 * argument
    return matrix


def _moved(images: Tensor, matrix: Tensor, fill: Sequence[float]) -> Tensor:
    grid = affine_grid(matrix, list(images.shape), align_corners=False)
    pixels = images.float() / _LEVELS
    moved = grid_sample(pixels, grid, mode="bicubic", padding_mode="border", align_corners=False)
    inside = ((grid >= -1) & (grid < 1)).all(-1)[:, None]
    return _levels(torch.where(inside, moved, moved.new_tensor(fill)[:, None, None]))


class RandAugment:
    """Operations drawn for each image by itself, each left out with probability 1/2.

    kornia's own class draws one pair for a whole batch. Here every image draws `operations` of `OPERATIONS` (with
    replacement) and for each its strength, normal around `magnitude` and cut to 0..10; then each operation runs once on
    the images that drew it.

    Args:
        operations: for each image.
        magnitude: mean strength, 0 to 10. At 0 the operations without argument still act.
        std: standard deviation of the strength; at 0 nothing is drawn for it.
        fill: colour that moved images bring in from outside: published is the mean of the pixels; red, green and blue
            from 0 to 1.

    Raises:
        UserError: kornia is not installed.
    """

    def __init__(
        self, operations: int = 2, magnitude: float = 9.0, std: float = 0.5, fill: Sequence[float] = (0.5, 0.5, 0.5)
    ) -> None:
        if operations:
            require_extra("vision", "kornia")
        self.operations, self.magnitude, self.std = operations, magnitude, std
        # Published: a colour of whole levels.
        self.fill = [round(_LEVELS * channel) / _LEVELS for channel in fill]

    def draw(self, images: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """What one round of operations does to each image.

        Returns:
            index into `OPERATIONS`, -1 where the image is left as it is; strength; sign; each (images), on the CPU.
        """
        chosen = torch.randint(len(OPERATIONS), (images,), generator=generator, device=generator.device).cpu()
        applied = _uniform(images, generator) < PROBABILITY
        sign = torch.where(_uniform(images, generator) < 0.5, 1.0, -1.0)
        magnitude = torch.full((images,), float(self.magnitude))
        if self.std:
            noise = torch.randn(images, generator=generator, device=generator.device).cpu()
            magnitude = magnitude + self.std * noise
        return torch.where(applied, chosen, -1), magnitude.clamp(0, STRONGEST), sign

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch.

        Args:
            images: uint8 (B, 3, H, W); not changed.
            generator: the only source of randomness; on the CPU, so that the images' device need not be waited for.

        Returns:
            uint8 (B, 3, H, W).

        Raises:
            UserError: the images are not such a tensor.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"images must be uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        if self.operations:
            images = images.clone()
        for _ in range(self.operations):
            index, magnitude, sign = self.draw(len(images), generator)
            self._round(images, index, magnitude, sign)
        return images

    def _round(self, images: Tensor, index: Tensor, magnitude: Tensor, sign: Tensor) -> None:
        moved, matrices = [], []
        aspect = images.shape[-1] / images.shape[-2]
        for number, (name, operation) in enumerate(_OPERATIONS.items()):
            rows = (index == number).nonzero()[:, 0]
            if not len(rows):
                continue
            argument = operation.argument(magnitude[rows] / STRONGEST, sign[rows]).to(images.device)
            rows = rows.to(images.device)
            if operation.recolour is None:
                moved.append(rows)
                matrices.append(_affine(name, argument, aspect))
            else:
                images[rows] = _recoloured(images[rows], operation.recolour, argument)
        if moved:
            # All geometric operations in one: a resampling of few images costs little more than one of a single image.
            rows = torch.cat(moved)
            images[rows] = _moved(images[rows], torch.cat(matrices), self.fill)


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device).cpu()
