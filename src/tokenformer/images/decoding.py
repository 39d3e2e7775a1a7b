"""One image, from a file or from bytes, as upright RGB pixels of eight bits."""

import io
from os import PathLike

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tokenformer.errors import UserError

_WORKER = "Caught BadImage in"


class BadImage(UserError):
    """An image that cannot be read; the message is one line that names it."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises the errors of its worker processes again, with the traceback as their message.
        if message.startswith(_WORKER):
            message = message.strip().splitlines()[-1].partition("BadImage: ")[2]
        super().__init__(message)


def decode(source: bytes | str | PathLike[str] | Image.Image, *, name: str | None = None) -> Image.Image:
    """Return an image as RGB with eight bits a channel.

    It is turned upright as its EXIF data say, as transformers' pipelines do. Sixteen bits are scaled to eight (Pillow
    would cut them off at 255). What is transparent lets white shine through: the colours stored under it are whatever
    the program that wrote the file left there.

    Args:
        source: the bytes of a file, its path, or an image of Pillow.
        name: of the image, for errors; the path if not given.

    Returns:
        An image of mode RGB; of several frames the first.

    Raises:
        BadImage: it is missing, is no image, is damaged or cut off, has floating-point pixels, or is larger than Pillow
            allows.
    """
    name = name or (f"'{source}'" if isinstance(source, (str, PathLike)) else "the image")
    try:
        if isinstance(source, Image.Image):
            return _rgb(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _rgb(image)
    except BadImage as error:
        raise BadImage(f"{name} {error}") from error
    except UnidentifiedImageError as error:
        raise BadImage(f"{name} is not an image that Pillow can read: repair or remove it") from error
    except Image.DecompressionBombError as error:
        raise BadImage(
            f"{name} has more than twice PIL.Image.MAX_IMAGE_PIXELS ({Image.MAX_IMAGE_PIXELS}), where Pillow suspects "
            "an attack: scale it down, or raise the limit if you trust it"
        ) from error
    except FileNotFoundError as error:
        raise BadImage(f"{name} does not exist: it was moved or removed") from error
    except Exception as error:  # the decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError and others
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(f"{name} cannot be read ({reason}): repair or remove it") from error


def _rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)  # a copy, whether turned or not
    if image.mode == "F":
        raise BadImage("has floating-point pixels, whose range is not known: save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Sixteen bits: of some files Pillow makes integers of 32.
        values = np.asarray(image).astype(np.float64) * (255 / 65535)
        image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")
