"""The whole augmentation: its parts in order, each switched off by 0, and random erasing."""

import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from tokenformer.errors import UserError
from tokenformer.images import Augment
from tokenformer.images.augmentation import draw_rectangles, erase, normalized
from tokenformer.images.randaugment import RandAugment

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OFF = {"randaugment_ops": 0, "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "label_smoothing": 0.0}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(count: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randint(256, (count, 3, size, size), generator=generator(100)).to(torch.uint8)
    return images, torch.randint(10, (count,), generator=generator(101))


def by_hand(images: torch.Tensor) -> np.ndarray:
    pixels = images.numpy().astype(np.float64) / 255
    return (pixels - np.array(MEAN).reshape(3, 1, 1)) / np.array(STD).reshape(3, 1, 1)


def test_with_everything_off_only_normalisation_is_left() -> None:
    images, labels = batch(5)
    source = generator(0)
    state = source.get_state()
    pixels, targets = Augment(10, MEAN, STD, **OFF)(images, labels, source)
    assert pixels.dtype == targets.dtype == torch.float32
    assert np.abs(pixels.numpy() - by_hand(images)).max() < 2e-6
    assert torch.equal(targets, torch.nn.functional.one_hot(labels, 10).float())
    assert torch.equal(source.get_state(), state)


@pytest.mark.parametrize(
    ("part", "value"),
    [("randaugment_ops", 2), ("mixup", 0.8), ("cutmix", 1.0), ("erasing", 1.0), ("label_smoothing", 0.1)],
)
def test_each_part_by_itself_does_something(part: str, value: float) -> None:
    images, labels = batch(16)
    alone = Augment(10, MEAN, STD, **{**OFF, part: value})(images, labels, generator(1))
    without = Augment(10, MEAN, STD, **OFF)(images, labels, generator(1))
    changes_pixels = part != "label_smoothing"
    changes_targets = part in ("mixup", "cutmix", "label_smoothing")
    assert torch.equal(alone[0], without[0]) != changes_pixels
    assert torch.equal(alone[1], without[1]) != changes_targets


def test_parts_that_are_off_draw_nothing() -> None:
    """The draws of RandAugment are the same whether the parts after it are on, and mixing's whether it is."""
    images, labels = batch(8)
    alone, _ = Augment(10, MEAN, STD, **{**OFF, "randaugment_ops": 2})(images, labels, generator(2))
    expected = RandAugment(fill=MEAN)(images, generator(2))
    assert np.abs(alone.numpy() - by_hand(expected)).max() < 2e-6
    source = generator(3)
    Augment(10, MEAN, STD, **{**OFF, "label_smoothing": 0.1})(images, labels, source)
    assert torch.equal(source.get_state(), generator(3).get_state())


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_batch_size_and_targets_that_sum_to_one(count: int) -> None:
    images, labels = batch(count)
    augment = Augment(10, MEAN, STD, erasing=0.5)
    source = generator(4)
    for _ in range(6):
        pixels, targets = augment(images, labels, source)
        assert pixels.shape == images.shape
        assert pixels.isfinite().all()
        assert torch.allclose(targets.sum(1), torch.ones(count), atol=1e-6)
        assert (targets >= 0).all()


def test_one_class() -> None:
    images, _ = batch(3)
    _, targets = Augment(1, MEAN, STD)(images, torch.zeros(3, dtype=torch.long), generator(5))
    assert torch.allclose(targets, torch.ones(3, 1))


def test_the_generator_is_the_only_source_of_randomness() -> None:
    images, labels = batch(32, 24)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    augment = Augment(10, MEAN, STD, erasing=0.25)
    first = augment(images, labels, generator(6))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    again = augment(images, labels, generator(6))
    torch.set_num_threads(threads)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    other = augment(images, labels, generator(7))
    assert not torch.equal(first[0], other[0])


def test_a_saved_state_goes_on_where_it_stopped() -> None:
    images, labels = batch(8)
    augment = Augment(10, MEAN, STD, erasing=0.25)
    source = generator(8)
    augment(images, labels, source)
    state = source.get_state()
    second = augment(images, labels, source)
    resumed = torch.Generator()
    resumed.set_state(state)
    assert torch.equal(augment(images, labels, resumed)[0], second[0])


def test_autocast_changes_nothing() -> None:
    images, labels = batch(64)
    augment = Augment(10, MEAN, STD, erasing=0.25)
    expected = augment(images, labels, generator(9))
    with torch.autocast("cpu", torch.bfloat16):
        pixels, targets = augment(images, labels, generator(9))
    assert torch.equal(pixels, expected[0])
    assert torch.equal(targets, expected[1])


def test_the_images_are_kept() -> None:
    images, labels = batch(8)
    before = images.clone()
    Augment(10, MEAN, STD, erasing=1.0)(images, labels, generator(9))
    assert torch.equal(images, before)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)])
@pytest.mark.parametrize("operations", [0, 2])
def test_other_images_are_refused(images: torch.Tensor, operations: int) -> None:
    with pytest.raises(UserError, match=r"images must be uint8 \(B, 3, H, W\)"):
        Augment(10, MEAN, STD, randaugment_ops=operations)(images, torch.zeros(2, dtype=torch.long), generator(0))


def test_labels_must_be_one_for_each_image() -> None:
    images, _ = batch(4)
    with pytest.raises(UserError, match=r"4 images need as many labels, got labels of shape \(3,\)"):
        Augment(10, MEAN, STD)(images, torch.zeros(3, dtype=torch.long), generator(0))


def test_kornia_is_not_loaded_without_randaugment() -> None:
    code = (
        "import sys, torch; from tokenformer.images import Augment; "
        "Augment(2, [0.5] * 3, [0.5] * 3, randaugment_ops=0)"
        "(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), torch.Generator()); "
        "assert 'kornia' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_normalisation_is_by_channel() -> None:
    images, _ = batch(3)
    assert np.abs(normalized(images, MEAN, STD).numpy() - by_hand(images)).max() < 2e-6


def test_erased_rectangles_have_the_published_sizes() -> None:
    count, height, width = 4000, 60, 40
    images = torch.zeros(count, 1, height, width)
    top, left, high, wide = draw_rectangles(images, 0.3, generator(10))
    erased = high > 0
    assert torch.equal(erased, wide > 0)
    assert abs(int(erased.sum()) - 0.3 * count) < 5 * math.sqrt(count * 0.3 * 0.7)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + high <= height).all()
    assert (left + wide <= width).all()
    assert (top + high == height)[erased].any()
    assert (left + wide == width)[erased].any()
    high, wide = high[erased].double(), wide[erased].double()
    # Sides are rounded to pixels: the sizes that would round to these.
    assert ((high + 0.5) * (wide + 0.5) >= 0.02 * height * width).all()
    assert ((high - 0.5) * (wide - 0.5) <= height * width / 3).all()
    assert ((high + 0.5) / (wide - 0.5) >= 0.3).all()
    assert ((high - 0.5) / (wide + 0.5) <= 1 / 0.3).all()
    # Area uniform from 2 % to a third, of which too wide and too high ones are drawn again: little, and large ones.
    mean = (high * wide).mean() / (height * width)
    assert 0.15 < mean < (0.02 + 1 / 3) / 2 + 0.01
    # A rectangle lies anywhere that it fits: its place relative to the room it has is uniform.
    room = height - high
    assert (top[erased] / room).mean().item() == pytest.approx(0.5, abs=5 / math.sqrt(12 * len(room)))


def test_rectangles_are_drawn_as_one_by_one() -> None:
    """Against the published loop over images and attempts: the same distribution of areas and shapes."""
    rng = random.Random(0)
    height, width, count = 30, 30, 3000
    areas, shapes = [], []
    for _ in range(count):
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * height * width
            aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if high < height and wide < width:
                areas.append(high * wide)
                shapes.append(math.log(high / wide))
                break
    _, _, high, wide = draw_rectangles(torch.zeros(count, 1, height, width), 1.0, generator(11))
    ours = ((high * wide).double().numpy(), (high / wide).double().log().numpy())
    for mine, theirs in zip(ours, (np.array(areas), np.array(shapes)), strict=True):
        # Kolmogorov-Smirnov: 2.2 / sqrt(n / 2) is passed by chance once in ten thousand times.
        points = np.sort(np.concatenate([mine, theirs]))
        steps = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (mine, theirs)]
        assert np.abs(steps[0] - steps[1]).max() < 2.2 / math.sqrt(count / 2)


def test_the_inside_of_a_rectangle_is_noise_and_the_rest_is_kept() -> None:
    images = torch.full((200, 3, 20, 20), 7.0)
    top, left, high, wide = draw_rectangles(images, 0.5, generator(12))
    result = erase(images, 0.5, generator(12))
    values = []
    for image, (y, x, h, w) in zip(result, torch.stack([top, left, high, wide], 1).tolist(), strict=True):
        inside = torch.zeros(20, 20, dtype=torch.bool)
        inside[y : y + h, x : x + w] = True
        assert (image[:, ~inside] == 7).all()
        values.append(image[:, inside].flatten())
    noise = torch.cat(values).double()
    assert noise.mean().item() == pytest.approx(0, abs=5 / math.sqrt(len(noise)))
    assert noise.std().item() == pytest.approx(1, abs=5 / math.sqrt(2 * len(noise)))
    assert len(noise.unique()) > 0.99 * len(noise)  # of its own for each pixel and channel
    assert (images == 7).all()


def test_an_image_too_small_for_a_rectangle_is_kept() -> None:
    images = torch.full((50, 3, 1, 1), 7.0)
    assert torch.equal(erase(images, 1.0, generator(13)), images)


@pytest.mark.gpu
def test_a_batch_on_a_gpu_stays_there() -> None:
    images, labels = batch(16)
    augment = Augment(10, MEAN, STD, erasing=0.0)
    here = augment(images, labels, generator(14))
    there = augment(images.cuda(), labels.cuda(), generator(14))
    assert there[0].is_cuda
    assert there[1].is_cuda
    assert torch.allclose(here[1], there[1].cpu())
    assert (here[0] - there[0].cpu()).abs().mean() < 0.01
    erased, _ = Augment(10, MEAN, STD, erasing=1.0)(images.cuda(), labels.cuda(), generator(14))
    assert erased.is_cuda
    assert erased.isfinite().all()
