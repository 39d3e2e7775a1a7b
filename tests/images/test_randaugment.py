"""RandAugment against Pillow, the published ranges and the expected frequencies."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from tokenformer.errors import UserError
from tokenformer.images.randaugment import OPERATIONS, RandAugment, apply_operation, operation_argument

FILL = (0.6, 0.4, 0.2)
FILL_LEVELS = (153, 102, 51)
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
PHOTOMETRIC = tuple(name for name in OPERATIONS if name not in GEOMETRIC)
# No more than a table from level to level, which leaves nothing to round.
EXACT = ("Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd")


def published(name: str, magnitude: float, sign: float) -> float:
    """The argument of an operation, one image at a time, as the published recipe states it."""
    level = magnitude / 10
    return {
        "Rotate": sign * level * 30,
        "Posterize": 4 - int(level * 4),
        "Solarize": 256 - min(256, int(level * 256)),
        "SolarizeAdd": min(128, int(level * 110)),
        "Color": max(0.1, 1 + sign * level * 0.9),
        "Contrast": max(0.1, 1 + sign * level * 0.9),
        "Brightness": max(0.1, 1 + sign * level * 0.9),
        "Sharpness": max(0.1, 1 + sign * level * 0.9),
        "ShearX": sign * level * 0.3,
        "ShearY": sign * level * 0.3,
        "TranslateXRel": sign * level * 0.45,
        "TranslateYRel": sign * level * 0.45,
    }.get(name, 0.0)


def affine(name: str, argument: float, width: int, height: int) -> tuple[float, ...]:
    """Pillow's six numbers: a destination's source is (a x + b y + c, d x + e y + f)."""
    if name == "Rotate":
        sine, cosine = math.sin(math.radians(argument)), math.cos(math.radians(argument))
        x, y = width / 2, height / 2
        return cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y
    return {
        "ShearX": (1, argument, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, argument, 1, 0),
        "TranslateXRel": (1, 0, argument * width, 0, 1, 0),
        "TranslateYRel": (1, 0, 0, 0, 1, argument * height),
    }[name]


def by_pillow(name: str, array: np.ndarray, argument: float) -> np.ndarray:
    """One image (H, W, 3) through Pillow."""
    image = Image.fromarray(array)
    if name == "Rotate":
        return np.asarray(image.rotate(argument, Image.Resampling.BICUBIC, fillcolor=FILL_LEVELS))
    if name in GEOMETRIC:
        data = affine(name, argument, *image.size)
        method = Image.Transform.AFFINE
        return np.asarray(image.transform(image.size, method, data, Image.Resampling.BICUBIC, fillcolor=FILL_LEVELS))
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return np.asarray(getattr(ImageEnhance, name)(image).enhance(argument))
    if name == "SolarizeAdd":
        return np.asarray(image.point([min(255, i + int(argument)) if i < 128 else i for i in range(256)] * 3))
    operation = {
        "AutoContrast": ImageOps.autocontrast,
        "Equalize": ImageOps.equalize,
        "Invert": ImageOps.invert,
        # Pillow once made an image of no bits black, which the recipe relies on, and now refuses.
        "Posterize": lambda given: ImageOps.posterize(given, int(argument)) if argument else given.point([0] * 768),
        "Solarize": lambda given: ImageOps.solarize(given, int(argument)),
    }[name]
    return np.asarray(operation(image))


def random_images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(256, (count, 3, height, width), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def smooth_images(count: int, height: int, width: int) -> torch.Tensor:
    """Few colours blurred into each other with some noise on top, and not the whole range: more like photographs."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    images = 40 + 170 * torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    return (images + 2 * torch.randn(images.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


def ramp() -> torch.Tensor:
    """Every level there is, in another order in each channel."""
    levels = torch.arange(256).reshape(1, 1, 16, 16)
    return torch.cat([levels, 255 - levels, levels.flip(2)], 1).to(torch.uint8)


def flat() -> torch.Tensor:
    """One colour only: nothing to stretch or to equalise."""
    return torch.tensor([7, 130, 255], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 9, 8).contiguous()


IMAGES = {"random": random_images(4, 13, 18), "smooth": smooth_images(4, 32, 24), "every level": ramp(), "flat": flat()}


def arrays(images: torch.Tensor) -> list[np.ndarray]:
    return list(images.permute(0, 2, 3, 1).contiguous().numpy())


def apart(images: torch.Tensor, expected: list[np.ndarray]) -> np.ndarray:
    return np.abs(np.stack(arrays(images)).astype(int) - np.stack(expected).astype(int))


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("magnitude", [0.0, 3.7, 9.0, 10.0])
@pytest.mark.parametrize("name", PHOTOMETRIC)
def test_colours_are_those_of_pillow(name: str, magnitude: float, kind: str) -> None:
    images = IMAGES[kind]
    for sign in (1.0, -1.0):
        argument = operation_argument(name, torch.full((len(images),), magnitude), torch.full((len(images),), sign))
        ours = apply_operation(name, images, argument, FILL)
        theirs = [by_pillow(name, image, published(name, magnitude, sign)) for image in arrays(images)]
        # Pillow cuts fractions off, and rounds the grey or smoothed image to levels before it blends: below 1 together.
        assert apart(ours, theirs).max() <= (0 if name in EXACT else 1)


def cubic(distance: np.ndarray, slope: float) -> np.ndarray:
    """Keys' interpolation kernel."""
    x = np.abs(distance)
    near = (slope + 2) * x**3 - (slope + 3) * x**2 + 1
    far = slope * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resampled(array: np.ndarray, data: tuple[float, ...], slope: float) -> tuple[np.ndarray, np.ndarray]:
    """An affine map in float64, by Pillow's coordinates and Keys' kernel; and which pixels are clear cases."""
    height, width = array.shape[:2]
    y, x = np.mgrid[:height, :width] + 0.5
    source_x = data[0] * x + data[1] * y + data[2]
    source_y = data[3] * x + data[4] * y + data[5]
    column, row = np.floor(source_x - 0.5).astype(int), np.floor(source_y - 0.5).astype(int)
    total = np.zeros(array.shape)
    for down in range(-1, 3):
        for right in range(-1, 3):
            weight = cubic(source_y - 0.5 - row - down, slope) * cubic(source_x - 0.5 - column - right, slope)
            pixel = array[np.clip(row + down, 0, height - 1), np.clip(column + right, 0, width - 1)]
            total += weight[..., None] * pixel
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    edge = np.minimum.reduce(np.abs([source_x, source_x - width, source_y, source_y - height]))
    return np.where(inside[..., None], np.clip(total, 0, 255), FILL_LEVELS), edge > 1e-4


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("magnitude", [0.0, 4.3, 9.0])
@pytest.mark.parametrize("name", GEOMETRIC)
def test_pixels_move_as_in_pillow(name: str, magnitude: float, sign: float) -> None:
    """One statement gives Pillow's result with Pillow's cubic, and ours with PyTorch's: only the slope differs.

    Pillow cuts fractions off here too.
    """
    images = random_images(3, 13, 18)
    argument = published(name, magnitude, sign)
    data = affine(name, argument, 18, 13)
    ours = apply_operation(name, images, torch.full((3,), argument), FILL)
    for image, moved in zip(arrays(images), arrays(ours), strict=True):
        expected, clear = resampled(image, data, slope=-0.75)
        # Rounding to a level: half, and a little for the float32 of the coordinates.
        assert np.abs(moved - expected)[clear].max() <= 0.51
        cut_off = (resampled(image, data, slope=-1.0)[0] - by_pillow(name, image, argument))[clear]
        assert cut_off.min() > -0.01
        assert cut_off.max() < 1.01


@pytest.mark.parametrize("name", GEOMETRIC)
def test_moved_smooth_images_are_those_of_pillow(name: str) -> None:
    images = smooth_images(4, 48, 40)
    argument = published(name, 9.0, 1.0)
    ours = apply_operation(name, images, torch.full((4,), argument), FILL)
    difference = apart(ours, [by_pillow(name, image, argument) for image in arrays(images)])
    # The cubics of slope -0.75 and -1 differ by at most a quarter of d (1 - d), 1/16, of the difference of two
    # neighbours' neighbours in each direction; here these differ by the noise and some 25 levels at most.
    assert difference.max() <= 4
    assert difference.mean() < 0.5


@pytest.mark.parametrize("name", OPERATIONS)
def test_ranges_are_the_published_ones(name: str) -> None:
    for sign in (1.0, -1.0):
        strengths = torch.linspace(0, 10, 401)
        ours = operation_argument(name, strengths, torch.full_like(strengths, sign))
        theirs = [published(name, magnitude, sign) for magnitude in strengths.tolist()]
        # int() of a strength just at a whole number depends on the precision: those may be one apart.
        whole = name in ("Posterize", "Solarize", "SolarizeAdd")
        assert (ours - torch.tensor(theirs)).abs().max() <= (1 if whole else 1e-5)
        assert not whole or (ours != torch.tensor(theirs)).float().mean() < 0.02


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Rotate", 27), ("Posterize", 1), ("Solarize", 26), ("SolarizeAdd", 99), ("Color", 1.81), ("ShearX", 0.27)],
)
def test_arguments_at_magnitude_nine(name: str, expected: float) -> None:
    one = torch.ones(1)
    assert operation_argument(name, 9 * one, one).item() == pytest.approx(expected, rel=1e-6)


def test_draws_are_distributed_as_published() -> None:
    count = 200_000
    index, magnitude, sign = RandAugment(fill=FILL).draw(count, torch.Generator().manual_seed(3))

    def expect(hits: torch.Tensor, probability: float) -> None:
        # Five standard deviations: one of these twenty checks would fail for one seed in 90 000.
        assert abs(hits.sum().item() - count * probability) < 5 * math.sqrt(count * probability * (1 - probability))

    expect(index == -1, 0.5)
    for number in range(len(OPERATIONS)):
        expect(index == number, 0.5 / 15)
    expect(sign == 1, 0.5)
    # Normal(9, 0.5) above 10 is cut to 10: two standard deviations.
    expect(magnitude == 10, 0.5 * math.erfc(2 / math.sqrt(2)))
    expect(magnitude < 9, 0.5)
    expect(magnitude < 8, 0.5 * math.erfc(2 / math.sqrt(2)))
    assert magnitude.min() > 0
    assert magnitude.max() == 10
    # What is drawn for an image says nothing of its strength or its sign.
    assert torch.corrcoef(torch.stack([index.float(), magnitude, sign])).fill_diagonal_(0).abs().max() < 5 / count**0.5


def test_every_image_goes_through_what_it_drew() -> None:
    """One operation for each of 200 images: the rows that drew it, and no other, come out as from Pillow."""
    images = smooth_images(200, 12, 16)
    augment = RandAugment(operations=1, fill=FILL)
    ours = augment(images, torch.Generator().manual_seed(4))
    drawn = augment.draw(200, torch.Generator().manual_seed(4))
    for image, result, index, magnitude, sign in zip(
        arrays(images), arrays(ours), *map(torch.Tensor.tolist, drawn), strict=True
    ):
        if index < 0:
            assert (result == image).all()
            continue
        name = OPERATIONS[index]
        argument = published(name, magnitude, sign)
        if name in GEOMETRIC:
            expected, clear = resampled(image, affine(name, argument, 16, 12), -0.75)
            assert np.abs(result - expected)[clear].max() <= 0.51, name
        else:
            assert np.abs(result.astype(int) - by_pillow(name, image, argument)).max() <= 1, name


def test_copies_of_one_image_become_different_images() -> None:
    augmented = RandAugment(fill=FILL)(smooth_images(1, 16, 16).repeat(64, 1, 1, 1), torch.Generator().manual_seed(5))
    different = {image.tobytes() for image in arrays(augmented)}
    # A quarter of them keeps the image; Equalize and the like give the same each time.
    assert len(different) > 35


def test_grey_images_stay_grey() -> None:
    images = smooth_images(300, 16, 16)[:, :1].repeat(1, 3, 1, 1)
    augmented = RandAugment(fill=(0.5, 0.5, 0.5))(images, torch.Generator().manual_seed(6))
    assert (augmented == augmented[:, :1]).all()
    assert (augmented != images).any()


def test_the_fill_is_a_colour_of_whole_levels() -> None:
    mean = (0.485, 0.456, 0.406)
    augment = RandAugment(fill=mean)
    assert [round(255 * channel) for channel in mean] == [124, 116, 104]
    assert torch.tensor(augment.fill).mul(255).tolist() == pytest.approx([124, 116, 104])


def test_the_same_state_gives_the_same_images_whatever_the_threads() -> None:
    images = random_images(48, 64, 64)
    results = []
    threads = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(RandAugment(fill=FILL)(images, torch.Generator().manual_seed(7)))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_second_batch_is_drawn_anew_and_the_images_are_kept() -> None:
    images = random_images(16, 8, 8)
    before = images.clone()
    generator = torch.Generator().manual_seed(8)
    augment = RandAugment(fill=FILL)
    assert not torch.equal(augment(images, generator), augment(images, generator))
    assert torch.equal(images, before)


def test_zero_operations_draw_nothing_and_change_nothing() -> None:
    images = random_images(4, 8, 8)
    generator = torch.Generator().manual_seed(9)
    state = generator.get_state()
    assert torch.equal(RandAugment(operations=0)(images, generator), images)
    assert torch.equal(generator.get_state(), state)


def test_a_fixed_strength_draws_no_strength() -> None:
    with_std, without = torch.Generator().manual_seed(10), torch.Generator().manual_seed(10)
    _, magnitude, _ = RandAugment(std=0.0).draw(5, without)
    RandAugment(std=0.5).draw(5, with_std)
    assert magnitude.tolist() == [9.0] * 5
    assert not torch.equal(with_std.get_state(), without.get_state())


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)],
)
def test_other_tensors_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(UserError, match=r"images must be uint8 \(B, 3, H, W\), got torch\.\w+ \("):
        RandAugment()(images, torch.Generator())


def test_without_kornia_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenformer.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"this needs kornia.*tokenformer\[vision\]"):
        RandAugment()
    RandAugment(operations=0)


@pytest.mark.gpu
def test_the_images_of_a_gpu_are_those_of_the_cpu() -> None:
    images = smooth_images(64, 32, 32)
    here = RandAugment(fill=FILL)(images, torch.Generator().manual_seed(11))
    there = RandAugment(fill=FILL)(images.cuda(), torch.Generator().manual_seed(11))
    assert there.is_cuda
    # The same draws; a level apart where a rounding falls the other way, and what a second operation makes of it.
    assert (here.int() - there.cpu().int()).abs().float().mean() < 0.05
