"""What happens to a batch of training images between the loader and the model, on the device that holds it.

The order is the published one (timm's, by which the supervised Vision Transformers of MAE are trained): RandAugment on
whole levels, normalisation, random erasing, mixing. Cropping and mirroring come before, in the loader.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenformer.errors import UserError
from tokenformer.images.mixing import Mixing, soft_targets
from tokenformer.images.randaugment import RandAugment

# Random erasing as published (Zhong et al., https://arxiv.org/abs/1708.04896, and timm): share of the image's area,
# shape as height by width, and how often a rectangle that does not fit is drawn again.
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
_ATTEMPTS = 10


class Augment:
    """Augmentation of a batch. Each part is left out, and draws nothing, where its number is 0.

    Args:
        num_labels: classes.
        mean: of the pixels by channel, on a scale of 0 to 1; subtracted.
        std: standard deviation of the pixels by channel; divided by.
        randaugment_ops: operations of RandAugment for each image.
        randaugment_magnitude: their strength, 0 to 10.
        randaugment_std: standard deviation of the strength.
        mixup: alpha of the beta distribution by which two images are blended.
        cutmix: alpha of the beta distribution of the area around a rectangle of another image.
        mix_switch: probability of CutMix where both are on.
        erasing: probability that a random rectangle of an image becomes noise.
        label_smoothing: share of the target that is spread over all classes.

    Raises:
        UserError: RandAugment is on and kornia is not installed.
    """

    def __init__(
        self,
        num_labels: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        randaugment_ops: int = 2,
        randaugment_magnitude: float = 9.0,
        randaugment_std: float = 0.5,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        mix_switch: float = 0.5,
        erasing: float = 0.0,
        label_smoothing: float = 0.1,
    ) -> None:
        self.num_labels, self.label_smoothing, self.erasing = num_labels, label_smoothing, erasing
        self.mean, self.std = list(mean), list(std)
        self.randaugment = RandAugment(randaugment_ops, randaugment_magnitude, randaugment_std, fill=self.mean)
        self.mixing = Mixing(mixup, cutmix, mix_switch)

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            images: uint8 (B, 3, H, W); not changed.
            labels: class indices (B), on the same device.
            generator: the only source of randomness: the same state gives the same batch, whatever the number of
                threads. On the CPU, so that the images' device need not be waited for.

        Returns:
            pixel values, float32 (B, 3, H, W), normalised; targets, float32 (B, num_labels), rows sum to one.

        Raises:
            UserError: images or labels are not such tensors.
        """
        if labels.shape != images.shape[:1]:
            raise UserError(f"{len(images)} images need as many labels, got labels of shape {tuple(labels.shape)}")
        # Autocast, on where a trainer computes its loss, would place pixels by coordinates of eight bits.
        with torch.autocast(images.device.type, enabled=False):
            pixels = normalized(self.randaugment(images, generator), self.mean, self.std)
            if self.erasing:
                pixels = erase(pixels, self.erasing, generator)
            targets = soft_targets(labels, self.num_labels, self.label_smoothing)
            return self.mixing(pixels, targets, generator)


def normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images / 255 - mean) / std by channel: uint8 (B, C, H, W) to float32."""
    scale = torch.tensor([1 / (255 * each) for each in std], device=images.device)[:, None, None]
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=images.device)[:, None, None]
    return (images * scale).sub_(shift)


def erase(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Random erasing: a rectangle of an image becomes noise, standard normal for each pixel and channel.

    An image in which none of ten rectangles fits stays as it is, as published.

    Args:
        images: normalised (B, C, H, W); not changed.
        probability: of each image.
        generator: the only source of randomness.

    Returns:
        (B, C, H, W).
    """
    top, left, high, wide = draw_rectangles(images, probability, generator)
    erased = high.nonzero()[:, 0]
    if not len(erased):
        return images
    rows = torch.arange(images.shape[-2])[:, None]
    columns = torch.arange(images.shape[-1])
    top, left, high, wide = (each[erased][:, None, None, None] for each in (top, left, high, wide))
    inside = (rows >= top) & (rows < top + high) & (columns >= left) & (columns < left + wide)
    # The noise is drawn where the images are: on the CPU it would cost more than all else.
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    noise = torch.Generator(images.device).manual_seed(seed)
    shape = (len(erased), *images.shape[1:])
    values = torch.randn(shape, generator=noise, device=images.device, dtype=images.dtype)
    erased, inside = erased.to(images.device), inside.to(images.device)
    return images.index_put((erased,), torch.where(inside, values, images[erased]))


def draw_rectangles(
    images: Tensor, probability: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rectangles to erase: area and logarithm of the shape uniform, smaller than the image both ways, anywhere in it.

    Args:
        images: (B, C, H, W).
        probability: that an image has one.
        generator: the only source of randomness.

    Returns:
        first row, first column, height and width, each (B); height and width 0 for an image without one.
    """
    count, (height, width) = len(images), images.shape[-2:]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=generator.device, dtype=torch.float64).cpu()

    def between(ends: tuple[float, float]) -> Tensor:
        return ends[0] + (ends[1] - ends[0]) * uniform(count, _ATTEMPTS)

    applied = uniform(count) < probability
    area = between(ERASED_AREA) * height * width
    aspect = between((math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1]))).exp()
    high, wide = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (high < height) & (wide < width)
    # The first of the attempts that fits.
    attempt = fits.int().argmax(1, keepdim=True)
    applied &= fits.any(1)
    high, wide = (torch.where(applied, each.gather(1, attempt)[:, 0], 0) for each in (high, wide))
    top, left = (uniform(count) * (height - high + 1)).long(), (uniform(count) * (width - wide + 1)).long()
    return top, left, high, wide
