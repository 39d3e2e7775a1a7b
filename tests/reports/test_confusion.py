"""The picture of a confusion matrix: what is drawn where."""

import numpy as np
import pytest
from PIL import Image

from tokenformer.errors import UserError
from tokenformer.reports.confusion import check_picture, draw_confusion, save_confusion


def results(confusion, names=None):
    count = len(confusion)
    names = [f"c{i}" for i in range(count)] if names is None else names
    return {"top1": 0.9, "images": 40, "classes": names, "confusion": confusion}


def test_rows_are_true_classes():
    axes, _ = draw_confusion(results([[30, 10, 0], [0, 0, 0], [0, 0, 5]], ["a", "$b_1$", "c" * 40]), "vit on x").axes
    shares = axes.images[0].get_array()
    np.testing.assert_allclose(np.ma.filled(shares, np.nan), [[0.75, 0.25, 0], [np.nan] * 3, [0, 0, 1]])
    assert {(*text.get_position(), text.get_text()) for text in axes.texts} == {(0, 0, "30"), (1, 0, "10"), (2, 2, "5")}
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["a", "$b_1$", "c" * 23 + "…"] == [label.get_text() for label in axes.get_xticklabels()]
    assert axes.get_title() == "vit on x: 90.00 % of 40 images right"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("taken for", "true class")


def test_many_classes_have_colours_only():
    axes, _ = draw_confusion(results(np.eye(101, dtype=int).tolist()), "many").axes
    assert not axes.texts
    assert "c0" not in [label.get_text() for label in axes.get_xticklabels()]


def test_saved_whole(tmp_path):
    save_confusion(results([[1, 0], [1, 2]]), "x", tmp_path / "c.PNG")
    with Image.open(tmp_path / "c.PNG") as picture:
        assert min(picture.size) > 300
    assert [path.name for path in tmp_path.iterdir()] == ["c.PNG"]
    save_confusion(results([[1, 0], [1, 2]]), "x", tmp_path / "c.svg")
    assert "<svg" in (tmp_path / "c.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "words"),
    [("c.jpeg", "ends in none of .png, .svg, .pdf"), ("absent/c.png", "create it first"), (".", "folder")],
)
def test_targets_that_cannot_be(tmp_path, name, words):
    with pytest.raises(UserError, match="picture: ") as caught:
        check_picture(str(tmp_path / name))
    assert words in str(caught.value)
