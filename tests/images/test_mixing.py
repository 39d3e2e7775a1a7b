"""Mixup and CutMix: what an image keeps is what its target keeps; the loss against statements in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenformer.images.mixing import Mixing, cutmix_box, soft_cross_entropy, soft_targets


def numbered_images(count: int, height: int, width: int) -> torch.Tensor:
    """Image i is i everywhere, so that a mixed pixel says where it comes from."""
    return torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 3, height, width).contiguous()


def one_of_each(count: int) -> torch.Tensor:
    return torch.eye(count)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("seed", range(8))
def test_cutmix_targets_are_the_shares_of_pixels(count: int, seed: int) -> None:
    images = numbered_images(count, 9, 14)
    mixed, targets = Mixing(mixup=0.0, cutmix=1.0)(images, one_of_each(count), generator(seed))
    for number, (image, target) in enumerate(zip(mixed, targets, strict=True)):
        shares = [float((image[0] == source).double().mean()) for source in range(count)]
        assert target.tolist() == pytest.approx(shares, abs=1e-7)
        assert (image == image[:1]).all()  # the same rectangle in each channel
        assert set(image.unique().tolist()) <= {number, count - 1 - number}


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("seed", range(4))
def test_mixup_targets_are_the_weights_of_the_images(count: int, seed: int) -> None:
    images = torch.rand(count, 3, 6, 5, generator=generator(99))
    mixed, targets = Mixing(mixup=0.8, cutmix=0.0)(images, one_of_each(count), generator(seed))
    # Targets of one class each are the weights themselves.
    expected = torch.einsum("ij,jchw->ichw", targets.double(), images.double())
    assert torch.allclose(mixed.double(), expected, atol=1e-6)
    assert torch.allclose(targets, targets.flip(0, 1))  # one weight for the whole batch, partners in reverse order
    if count % 2:
        assert torch.equal(targets[count // 2], one_of_each(count)[count // 2])


def test_the_rectangle_is_where_the_partner_had_it() -> None:
    images = torch.rand(4, 3, 16, 16, generator=generator(98))
    mixed, _ = Mixing(mixup=0.0)(images, one_of_each(4), generator(1))
    assert ((mixed == images) | (mixed == images.flip(0))).all()
    assert not torch.equal(mixed, images)


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    share=st.floats(0, 1),
    across=st.floats(0, 1, exclude_max=True),
    down=st.floats(0, 1, exclude_max=True),
)
def test_the_rectangle_has_the_image_s_shape_and_lies_in_it(
    height: int, width: int, share: float, across: float, down: float
) -> None:
    row, column = int(down * height), int(across * width)
    top, bottom, left, right = cutmix_box(height, width, share, (row, column))
    assert 0 <= top <= row <= bottom <= height
    assert 0 <= left <= column <= right <= width
    # Not clipped, it takes 1 - share of the pixels, up to the two that each side may lose to whole numbers.
    side = math.sqrt(1 - share)
    for low, high, length in ((top, bottom, height), (left, right, width)):
        assert high - low <= length * side
        if low > 0 and high < length:
            assert high - low > length * side - 2


def test_a_clipped_rectangle_counts_by_what_is_left() -> None:
    # Half of 8 x 8 along each side is 4, around the corner pixel: rows and columns 0 and 1 remain.
    assert cutmix_box(8, 8, 0.75, (0, 0)) == (0, 2, 0, 2)
    assert cutmix_box(8, 8, 0.75, (4, 4)) == (2, 6, 2, 6)
    assert cutmix_box(8, 8, 1.0, (4, 4)) == (4, 4, 4, 4)
    assert cutmix_box(8, 8, 0.0, (4, 4)) == (0, 8, 0, 8)


def test_rectangles_lie_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A square of 2 x 2 around each pixel of 20 x 30 alike: its last row and column are those of the centre."""
    mixing = Mixing(mixup=0.0)
    monkeypatch.setattr(mixing, "draw", lambda source: ("cutmix", 0.99))
    source, images = generator(10), numbered_images(2, 20, 30)
    centers = []
    for _ in range(1500):
        taken = mixing(images, one_of_each(2), source)[0][0, 0].nonzero()
        centers.append(taken.amax(0).tolist())
    rows, columns = np.array(centers).T
    assert set(rows) == set(range(20))
    assert set(columns) == set(range(30))
    for values, length in ((rows, 20), (columns, 30)):
        assert abs(values.mean() - (length - 1) / 2) < 5 * length / math.sqrt(12 * 1500)
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 5 / math.sqrt(1500)


def test_both_are_drawn_as_often_as_the_switch_says() -> None:
    source = generator(2)
    kinds = [Mixing(switch=0.3).draw(source)[0] for _ in range(3000)]
    assert abs(kinds.count("cutmix") - 900) < 5 * math.sqrt(3000 * 0.3 * 0.7)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 4.0])
def test_shares_follow_the_beta_distribution(alpha: float) -> None:
    source = generator(3)
    for mixing in (Mixing(mixup=alpha, cutmix=0.0), Mixing(mixup=0.0, cutmix=alpha)):
        shares = np.array([mixing.draw(source)[1] for _ in range(4000)])
        assert shares.min() >= 0
        assert shares.max() <= 1
        # Mean 1/2 and variance 1 / (4 (2 alpha + 1)), each within five standard errors.
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(shares.mean() - 0.5) < 5 * math.sqrt(variance / len(shares))
        squares = (shares - 0.5) ** 2
        assert abs(squares.mean() - variance) < 5 * squares.std() / math.sqrt(len(shares))


def test_no_mixing_draws_nothing_and_changes_nothing() -> None:
    source = generator(4)
    state = source.get_state()
    images, targets = numbered_images(4, 3, 3), one_of_each(4)
    mixed = Mixing(mixup=0.0, cutmix=0.0)(images, targets, source)
    assert torch.equal(mixed[0], images)
    assert torch.equal(mixed[1], targets)
    assert torch.equal(source.get_state(), state)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_what_is_given_is_not_changed(mixup: float, cutmix: float) -> None:
    images, targets = numbered_images(4, 8, 8), one_of_each(4)
    kept = images.clone(), targets.clone()
    for seed in range(4):
        Mixing(mixup, cutmix)(images, targets, generator(seed))
    assert torch.equal(images, kept[0])
    assert torch.equal(targets, kept[1])


@pytest.mark.parametrize("num_labels", [1, 2, 10, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_soft_targets_sum_to_one(num_labels: int, smoothing: float) -> None:
    labels = torch.arange(7) % num_labels
    targets = soft_targets(labels, num_labels, smoothing)
    assert targets.shape == (7, num_labels)
    assert torch.allclose(targets.double().sum(1), torch.ones(7, dtype=torch.float64), atol=1e-5)
    expected = np.full((7, num_labels), smoothing / num_labels)
    expected[np.arange(7), labels.numpy()] += 1 - smoothing
    assert np.abs(targets.numpy() - expected).max() < 1e-7


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_the_loss_of_labels_is_that_of_torch(smoothing: float) -> None:
    logits = torch.randn(9, 5, generator=generator(5), dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (9,), generator=generator(6))
    ours = soft_cross_entropy(logits, soft_targets(labels, 5, smoothing).double())
    theirs = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-7)  # the targets are float32
    (gradient,), (expected,) = torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits)
    assert torch.allclose(gradient, expected, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_of_mixed_targets_is_its_definition(dtype: torch.dtype) -> None:
    logits = (5 * torch.randn(6, 4, generator=generator(7), dtype=torch.float64)).to(dtype)
    targets = torch.rand(6, 4, generator=generator(8), dtype=torch.float64)
    targets = (targets / targets.sum(1, keepdim=True)).to(torch.promote_types(dtype, torch.float32))
    z, t = logits.double().numpy(), targets.double().numpy()
    expected = -(t * (z - np.log(np.exp(z).sum(1, keepdims=True)))).sum(1).mean()
    loss = soft_cross_entropy(logits, targets)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.item() == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-5)


def test_the_loss_of_one_class_is_zero() -> None:
    logits = torch.randn(3, 1, generator=generator(9))
    assert soft_cross_entropy(logits, soft_targets(torch.zeros(3, dtype=torch.long), 1, 0.1)).item() == 0.0
