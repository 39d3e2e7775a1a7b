"""The picture of the augmentation shows what it says."""

import numpy as np
import pytest
import torch

from tokenformer.images.randaugment import OPERATIONS
from tokenformer.reports.augmentation import draw_augmentation


@pytest.mark.parametrize("count", [1, 3, 9])
def test_every_operation_and_both_mixtures_are_shown(count: int) -> None:
    images = torch.randint(256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    figure = draw_augmentation(images)
    panels = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.get_title()}
    assert set(panels) == {"unchanged", *OPERATIONS}
    image = images[0].permute(1, 2, 0).numpy()
    assert np.array_equal(panels["unchanged"], image)
    assert np.array_equal(panels["Invert"], 255 - image)
    assert np.array_equal(panels["Posterize"], image & 128)
    assert len(figure.axes) == 16 + 2 * min(count, 8)
    assert [part.get_suptitle().split(":")[0] for part in figure.subfigs] == ["RandAugment", "mixup", "CutMix"]
