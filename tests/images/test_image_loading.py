"""What training and evaluation get of an image set: crops, order, worker processes, skipped images."""

import math
from itertools import count
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from tokenformer import UserError
from tokenformer.images import (
    BadImage,
    EvaluationImages,
    ImageSet,
    TrainingImages,
    collate_images,
    image_processor,
)
from tokenformer.images.loading import fit, resized_crop


class Made:
    """Pictures of given pixels; None stands for a file that cannot be read."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        pixels = self.pictures[index]
        return b"no image" if pixels is None else Image.fromarray(pixels)

    def name(self, index):
        return f"picture {index}"


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_set(pictures, on_bad_image="error"):
    return ImageSet(Made(pictures), np.arange(len(pictures)) % 3, ("a", "b", "c"), on_bad_image=on_bad_image)


def pixels_of(item):
    return item["image"].permute(1, 2, 0).numpy()


# --- random resized crop ----------------------------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 2**32))
def test_boxes_lie_within_the_image(width, height, seed):
    left, upper, right, lower = resized_crop(width, height, Random(seed))
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height


@given(st.integers(100, 500), st.integers(100, 500), st.integers(0, 2**32))
def test_boxes_have_the_area_and_shape_of_the_recipe(width, height, seed):
    left, upper, right, lower = resized_crop(width, height, Random(seed))
    w, h = right - left, lower - upper
    slack = 1 + 1 / min(w, h)  # of rounding to whole pixels
    assert 3 / 4 / slack**2 <= w / h <= 4 / 3 * slack**2
    assert w * h >= 0.08 * width * height / slack**2


def test_distribution_of_boxes():
    """Of a large square, where a share of the area below 3/4 always fits: uniform, and log-uniform in shape."""
    side, random = 10_000, Random(0)
    boxes = np.array([resized_crop(side, side, random) for _ in range(20_000)], dtype=float)
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, shape = w * h / side**2, np.log(w / h)
    fits = area < 0.75
    small, shape = area[fits], shape[fits]
    # Smirnov's distance between what was drawn and the uniform distribution; 1.95 / sqrt(n) is exceeded once in 1000.
    for values, low, high in ((small, 0.08, 0.75), (shape, math.log(3 / 4), math.log(4 / 3))):
        expected = (np.sort(values) - low) / (high - low)
        distance = np.abs(expected - (np.arange(len(values)) + 0.5) / len(values)).max()
        assert distance < 1.95 / math.sqrt(len(values))
    # Areas near 1 fit with nearly square shapes only, and are drawn again otherwise: a share s fits while
    # |log shape| < -log s.
    shares = np.linspace(0.08, 1, 100_001)
    accepted = np.minimum(1, -np.log(shares) / math.log(4 / 3))
    assert abs(fits.mean() - accepted[shares < 0.75].sum() / accepted.sum()) < 0.01
    # Where it lies is uniform too.
    place = boxes[w < side, 0] / (side - w[w < side])
    assert np.abs(np.quantile(place, [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < 0.015


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(900, 9, (444, 0, 456, 9)), (9, 900, (0, 444, 9, 456)), (1000, 1, (499, 0, 500, 1)), (1, 1, (0, 0, 1, 1))],
)
def test_nothing_fits_into_a_strip(width, height, expected):
    """Then it is the middle, of the shape nearest to that of the image, within 3:4 and 4:3."""
    boxes = {resized_crop(width, height, Random(seed)) for seed in range(20)}
    assert boxes == {expected}


def bicubic(pixels, box, size):
    """The equation of an antialiased bicubic resampling (a = -1/2) of a box, in float64."""

    def kernel(x):
        x = np.abs(x)
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0))

    def weights(start, stop, inputs):
        scale = (stop - start) / size
        centres = start + (np.arange(size) + 0.5) * scale
        matrix = kernel((np.arange(inputs)[None] + 0.5 - centres[:, None]) / max(scale, 1))
        return matrix / matrix.sum(1, keepdims=True)

    left, upper, right, lower = box
    rows, columns = weights(upper, lower, pixels.shape[0]), weights(left, right, pixels.shape[1])
    return np.einsum("yh,hwc,xw->yxc", rows, pixels.astype(float), columns)


@settings(max_examples=25)
@given(st.integers(5, 60), st.integers(5, 60), st.integers(4, 40), st.integers(0, 1000))
def test_resized_crop_against_the_equation(height, width, size, position):
    pixels = noise(height, width, 3) // 2 + 64  # no overshoot beyond 0 and 255, which Pillow cuts off after each axis
    rows = TrainingImages(make_set([pixels] * 3), "resized", size, seed=5, flip=0)
    box = resized_crop(width, height, Random((5 << 64) | position))
    difference = np.abs(pixels_of(rows[1, position]) - bicubic(pixels, box, size))
    assert difference.max() <= 1.5  # rounded to whole levels after each axis


# --- pad, none, flip --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "shift"), [(32, 4), (8, 1), (4, 1)])
def test_pad_shifts_by_up_to_an_eighth(size, shift):
    pixels = noise(size, size, 3) | 1  # nowhere black
    rows = TrainingImages(make_set([pixels] * 3), "pad", size, flip=0)
    padded = np.pad(pixels, ((shift, shift), (shift, shift), (0, 0)))
    places = range(2 * shift + 1)
    windows = {padded[y : y + size, x : x + size].tobytes(): (y, x) for y in places for x in places}
    seen = [windows[pixels_of(rows[0, position]).tobytes()] for position in range(60 * len(windows))]
    counts = np.array([seen.count(place) for place in windows.values()])
    assert (np.abs(counts - 60) < 5 * math.sqrt(60)).all()


def test_flip():
    pixels = noise(8, 8, 3)
    rows = TrainingImages(make_set([pixels] * 3), "none", 8, flip=0.25)
    mirrored = [np.array_equal(pixels_of(rows[0, position]), pixels[:, ::-1]) for position in range(800)]
    plain = [np.array_equal(pixels_of(rows[0, position]), pixels) for position in range(800)]
    assert [a != b for a, b in zip(mirrored, plain, strict=True)] == [True] * 800
    assert abs(sum(mirrored) / 800 - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 800)


@given(st.integers(4, 70), st.integers(4, 70), st.integers(4, 40))
def test_without_a_crop_it_is_what_evaluation_sees(height, width, size):
    """The processor of transformers is the other implementation."""
    image_set = make_set([noise(height, width, 3)] * 3)
    processor = image_processor(size, mean=(0, 0, 0), std=(1, 1, 1))
    evaluated = EvaluationImages(image_set, processor)[0]["pixel_values"]
    trained = TrainingImages(image_set, "none", size, flip=0)[0]["image"]
    assert torch.equal((evaluated * 255).round().to(torch.uint8), trained)


def test_images_of_the_size_wanted_are_not_touched():
    pixels = noise(8, 8, 3)
    assert fit(pixels, 8) is pixels


@pytest.mark.parametrize("size", [1, 8])
def test_an_image_may_be_written_to(size):
    """It is a copy of what is kept in memory."""
    rows = TrainingImages(make_set([noise(size, size, 3)] * 3), "none", size, flip=0)
    before = rows[0]["image"].clone()
    rows[0]["image"].zero_()
    assert torch.equal(rows[0]["image"], before)


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["resized", "pad", "none"])
def test_randomness_is_of_seed_and_position_alone(crop):
    pictures = [noise(16, 20, 3, seed=seed) for seed in range(4)]
    rows = TrainingImages(make_set(pictures), crop, 8, seed=3)
    torch.manual_seed(1)
    first = {position: rows[position % 4, position]["image"] for position in range(40)}
    torch.manual_seed(2)
    again = TrainingImages(make_set(pictures), crop, 8, seed=3)
    for position in reversed(range(40)):
        assert torch.equal(first[position], again[position % 4, position]["image"])
    other = TrainingImages(make_set(pictures), crop, 8, seed=4)
    assert any(not torch.equal(first[position], other[position % 4, position]["image"]) for position in range(40))
    assert any(not torch.equal(first[position], first[position + 4]) for position in range(36))


def test_items_without_a_position():
    rows = TrainingImages(make_set([noise(16, 20, 3)] * 5), "resized", 8, seed=1)
    assert torch.equal(rows[3]["image"], rows[3, 3]["image"])
    assert torch.equal(rows[np.int64(3)]["image"], rows[3]["image"])
    assert len(rows) == 5


def test_workers_and_a_restart_give_the_same_batches():
    pictures = [noise(16, 20, 3, seed=seed) if seed != 5 else None for seed in range(12)]
    order = list(zip(np.random.default_rng(0).permutation(np.tile(np.arange(12), 3)).tolist(), count()))

    def batches(workers, start=0):
        rows = TrainingImages(make_set(pictures, "skip"), "resized", 8)
        sampler = [order[i : i + 4] for i in range(start, len(order), 4)]
        found = list(DataLoader(rows, batch_sampler=sampler, num_workers=workers, collate_fn=collate_images))
        assert rows.image_set.unreadable == 1  # in whichever process
        return found

    alone = batches(0)
    for others, offset in ((batches(2), 0), (batches(0, start=12), 3)):
        assert len(others) == len(alone) - offset
        for ours, theirs in zip(alone[offset:], others, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in ("images", "labels"))


def test_memory_holds_small_sets_only(monkeypatch):
    from tokenformer.images import image_set as module

    reads = []
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda source, name: reads.append(name) or decode(source, name=name))
    for limit, expected in ((4 * 8 * 8 * 3, 4), (4 * 8 * 8 * 3 - 1, 8)):
        monkeypatch.setattr(module, "_KEPT", limit)
        images = make_set([noise(8, 8, 3)] * 4)
        reads.clear()
        for _ in range(2):
            assert len(list(images)) == 4
        assert len(reads) == expected


# --- batches and bad images -------------------------------------------------------------------------------------------


def test_batches():
    images = make_set([noise(8, 8, 3, seed=seed) for seed in range(3)])
    rows = TrainingImages(images, "none", 8, flip=0)
    batch = collate_images([rows[i] for i in range(3)])
    assert batch["images"].dtype == torch.uint8
    assert batch["images"].shape == (3, 3, 8, 8)
    assert batch["labels"].tolist() == [0, 1, 2]
    evaluation = EvaluationImages(images, image_processor(4))
    batch = collate_images([evaluation[i] for i in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 4, 4)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].dtype == torch.int64


def test_in_training_the_next_image_takes_the_place():
    pictures = [noise(8, 8, 3, seed=seed) for seed in range(4)]
    pictures[1] = pictures[2] = None
    rows = TrainingImages(make_set(pictures, "skip"), "none", 8, flip=0)
    assert np.array_equal(pixels_of(rows[1]), pictures[3])
    assert rows[1]["label"] == 0  # that of picture 3
    assert rows[0]["label"] == 0
    assert np.array_equal(pixels_of(rows[3]), pictures[3])
    assert rows.image_set.unreadable == 2


def test_after_the_last_comes_the_first():
    pictures = [noise(8, 8, 3), noise(8, 8, 3, seed=1), None]
    rows = TrainingImages(make_set(pictures, "skip"), "none", 8, flip=0)
    assert np.array_equal(pixels_of(rows[2]), pictures[0])


def test_in_evaluation_it_is_left_out():
    pictures = [noise(8, 8, 3), None, noise(8, 8, 3)]
    rows = EvaluationImages(make_set(pictures, "skip"), image_processor(8))
    batch = collate_images([rows[i] for i in range(len(rows))])
    assert batch["labels"].tolist() == [0, 2]
    assert rows.image_set.unreadable == 1
    assert collate_images([rows[1]]) == {}


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_image_ends_the_run_in_one_line(workers):
    pictures = [noise(8, 8, 3), None]
    images = make_set(pictures)
    for rows in (TrainingImages(images, "none", 8), EvaluationImages(images, image_processor(8))):
        loader = DataLoader(rows, batch_size=2, num_workers=workers, collate_fn=collate_images)
        with pytest.raises(BadImage) as caught:
            list(loader)
        assert str(caught.value) == "picture 1 is not an image that Pillow can read: repair or remove it"


@pytest.mark.parametrize(
    ("options", "words"),
    [({"crop": "centre"}, "unknown crop 'centre'"), ({"crop": "pad", "flip": 1.5}, "flip must lie between 0 and 1")],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(UserError, match=words):
        TrainingImages(make_set([noise(8, 8, 3)]), image_size=8, **options)
