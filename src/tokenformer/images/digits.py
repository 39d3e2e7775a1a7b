"""scikit-learn's handwritten digits: 1797 images of 8 x 8, which come with the library."""

import hashlib
from collections.abc import Sequence

import numpy as np

from tokenformer.errors import require_extra
from tokenformer.images.image_set import Arrays
from tokenformer.images.parts import HELD_OUT_NAMES, Part, stratified

HELD_OUT = 0.2
# Of the split, so that every figure for digits is of the same images.
_SEED = 0


def open_digits(held_out: Sequence[str] = HELD_OUT_NAMES) -> dict[str, Part]:
    """The digits, 80 % to train on and 20 % held out, of each digit alike.

    Their values 0..16 become 0..255, of three equal channels.

    Args:
        held_out: names for what is held out; it has all the usual ones.

    Raises:
        UserError: scikit-learn is not installed.
    """
    require_extra("vision", "sklearn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    classes = tuple(str(name) for name in digits.target_names)
    sha256 = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    rows = dict(zip(("train", "held_out"), stratified(labels, HELD_OUT, _SEED), strict=True))
    if not set(held_out) & set(HELD_OUT_NAMES):
        del rows["held_out"]
    return {
        name: Part(Arrays(pixels[part], f"{name} digit"), labels[part], classes, f"{name} digits {sha256}", "digits")
        for name, part in rows.items()
    }
