"""`tokenformer bench images` on a few images, and on a clock that is known."""

import json

import numpy as np
import pytest
from PIL import Image

from tokenformer import UserError
from tokenformer.benchmarks import images as bench
from tokenformer.cli import main
from tokenformer.models import TokenFormerForImageClassification, TokenFormerVisionConfig

TINY = ["--images", "8", "--batch", "4", "--threads", "1", "--repeats", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for number in range(20):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    segments = [{"name": "base", "qkv": 8, "output": 8, "ffn": 8}]
    config = TokenFormerVisionConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, segments=segments
    )
    TokenFormerForImageClassification(config).save_pretrained(path)
    return path


def test_table_and_record(capsys, tmp_path, folder, model):
    file = tmp_path / "record.json"
    argv = ["--train", str(folder), "--model", str(model), "--workers", "0,1", *TINY, "--json", str(file)]
    assert main(["bench", "images", *argv]) == 0
    out = capsys.readouterr().out
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["command"] == " ".join(["tokenformer bench images", *argv])
    assert record["options"]["image_size"] == 8  # the model's
    step = record["model"]
    assert step["images_per_second"] == pytest.approx(4 / step["seconds"]["step"]["median"])
    assert step["class"] == "TokenFormerForImageClassification"
    for workers in ("0", "1"):
        rates = record["loader"][workers]
        assert len(rates["images_per_second"]) == 3
        assert rates["first_pass"] == rates["images_per_second"][0]
        assert rates["later_passes"] == pytest.approx(np.mean(rates["images_per_second"][1:]))
        (row,) = (line for line in out.splitlines() if line.startswith(f"{workers:>8} "))
        assert f"{rates['first_pass']:.0f} ({rates['first_pass'] / step['images_per_second']:.1f} x)" in row
    assert f"{step['images_per_second']:.0f} images per second" in out


def test_rates_by_a_clock_that_is_known(monkeypatch, folder):
    """A second for each batch: 4 images, and 3 batches of the first pass of 4 (the first starts the clock)."""
    monkeypatch.setattr(bench.time, "perf_counter", iter([0.0, 3.0, 11.0]).__next__)
    record = bench.measure(str(folder), workers=(0,), images=16, batch=4, passes=2, crop="none")
    assert record["loader"]["0"] == {
        "first_pass": 4.0,
        "later_passes": 2.0,  # four batches in eight seconds
        "images_per_second": [4.0, 2.0],
    }
    assert record["options"]["image_size"] == 12  # the larger side


def test_no_speed_for_wrong_images(monkeypatch, folder):
    class Wrong(bench.TrainingImages):
        """Gives other images the second time it is made."""

        made = 0

        def __init__(self, *args):
            super().__init__(*args, seed=Wrong.made)
            Wrong.made += 1

    monkeypatch.setattr(bench, "TrainingImages", Wrong)
    with pytest.raises(UserError, match="0 workers give other images"):
        bench.measure(str(folder), workers=(0,), images=8, batch=4)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--workers", "two"], "--workers must be whole numbers"),
        (["--workers", "1,1"], "each once"),
        (["--images", "0"], "images must be at least 1"),
        (["--batch", "32"], "batch 32 is more than the 18 images"),
        (["--crop", "centre"], "crop: expected"),
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--model", "MODEL", "--preset", "base"], "give model or preset, not both"),
        (["--model", "MODEL", "--image-size", "16"], "takes 8"),
        (["--json", "absent/record.json"], "create it first"),
        (["--train", "an/absent/folder"], "there is no 'an/absent/folder'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(capsys, monkeypatch, tmp_path, folder, model, argv, words):
    monkeypatch.chdir(tmp_path)
    argv = [str(model) if word == "MODEL" else word for word in argv]
    assert main(["bench", "images", "--train", str(folder), *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_model_with_fewer_classes_than_the_images(model):
    with pytest.raises(UserError, match=r"the images have 10 classes, the model in .* tells 2"):
        bench.measure("digits", model=str(model))
