"""What a classifier does to an image before it looks at it, in the form that transformers saves beside a model."""

from collections.abc import Sequence
from pathlib import Path

from transformers.image_processing_backends import PilBackend
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from tokenformer.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def image_processor(
    image_size: int,
    *,
    resize: int | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> PilBackend:
    """Return the processor that scales an image, cuts out its centre and normalises its pixels.

    The shorter side becomes `resize` pixels (bicubic), the centre of `image_size` is cut out, pixels are scaled to
    0..1, `mean` is subtracted and `std` divided by. It is BiT's processor, the plainest that transformers has for this.
    Saved as preprocessor_config.json it is found by `AutoImageProcessor` and `pipeline("image-classification")`. These
    prefer its version for torchvision where that is installed, whose resized pixels differ a little.

    Args:
        image_size: pixels along each side of what the model sees.
        resize: pixels along the shorter side before the centre is cut out; image_size if not given.
        mean: of the pixels by channel, on a scale of 0 to 1.
        std: their standard deviation.

    Raises:
        UserError: sizes below 1, resize below image_size (the processor would fill up with black), or a mean or std
            that are not three numbers, the latter above 0.
    """
    resize = image_size if resize is None else resize
    if image_size < 1:
        raise UserError(f"image_size must be at least 1, got {image_size}")
    if resize < image_size:
        raise UserError(f"resize {resize} is below image_size {image_size}: the cut would reach beyond the image")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError("mean and std need a value for each of red, green and blue, and those of std must be above 0")
    return BitImageProcessorPil(
        size={"shortest_edge": resize},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(mean),
        image_std=list(std),
    )


def load_processor(folder: str | Path) -> PilBackend:
    """Return the processor that was saved with a model, on Pillow.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from transformers import AutoImageProcessor

    if not (Path(folder) / "preprocessor_config.json").is_file():
        raise UserError(f"no image processor in '{folder}' (preprocessor_config.json): save one with the model")
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil")
    except Exception as error:  # a damaged file raises many unrelated types
        reason = " ".join(str(error).split())
        raise UserError(f"the image processor in '{folder}' cannot be read: {reason}") from error
