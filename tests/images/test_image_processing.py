"""The processor of a model: what it computes, and that transformers loads it and does the same."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, pipeline

from tokenformer import UserError
from tokenformer.images import decode, image_processor, load_processor
from tokenformer.models import TokenFormerForImageClassification, TokenFormerVisionConfig


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8))


def test_processor_against_plain_pillow(picture):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    values = image_processor(24, resize=28, mean=mean, std=std)(picture, return_tensors="pt")["pixel_values"][0]
    scaled = np.asarray(picture.resize((42, 28), Image.Resampling.BICUBIC)) / 255  # 28 * 61 / 40 = 42.7
    expected = (scaled[2:26, 9:33] - np.array(mean)) / np.array(std)
    assert values.dtype == torch.float32
    assert np.abs(values.numpy() - expected.transpose(2, 0, 1)).max() < 1e-6


def test_no_resize_given_is_the_size_of_the_image(picture):
    assert image_processor(24)(picture, return_tensors="pt")["pixel_values"].shape == (1, 3, 24, 24)


@pytest.mark.parametrize("family", ["tokenformer", "vit"])
def test_pipeline_sees_what_we_see(tmp_path, picture, family):
    """Files that are turned, grey or of a palette; the model is asked by the path of the file."""
    sizes = {"image_size": 24, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
    model = (
        ViTForImageClassification(ViTConfig(**sizes, intermediate_size=16, **names))
        if family == "vit"
        else TokenFormerForImageClassification(TokenFormerVisionConfig(**sizes, **names))
    ).eval()
    model.save_pretrained(tmp_path / "model")
    processor = image_processor(24, resize=28)
    processor.save_pretrained(tmp_path / "model")
    exif = Image.Exif()
    exif[0x112] = 6
    files = {"turned": picture, "grey": picture.convert("L"), "palette": picture.quantize(16)}
    for name, image in files.items():
        image.save(tmp_path / f"{name}.png", exif=exif if name == "turned" else None)
    classify = pipeline("image-classification", model=str(tmp_path / "model"))
    for name in files:
        path = str(tmp_path / f"{name}.png")
        ours = processor(decode(path), return_tensors="pt")["pixel_values"]
        assert torch.equal(classify.preprocess(path)["pixel_values"], ours)
        with torch.no_grad():
            shares = model(pixel_values=ours).logits.softmax(-1)[0]
        answers = {answer["label"]: answer["score"] for answer in classify(path)}
        assert answers == pytest.approx(dict(zip(("cat", "dog", "owl"), shares.tolist(), strict=True)), abs=1e-6)


def test_saved_and_loaded(tmp_path, picture):
    saved = image_processor(24, resize=28, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    saved.save_pretrained(tmp_path)
    expected = saved(picture, return_tensors="pt")["pixel_values"]
    for loaded in (
        load_processor(tmp_path),
        load_processor(str(tmp_path)),
        AutoImageProcessor.from_pretrained(tmp_path),
    ):
        assert torch.equal(loaded(picture, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("content", [None, "{", "{}"], ids=["missing", "damaged", "empty"])
def test_processor_that_cannot_be_loaded(tmp_path, content):
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(UserError, match="image processor in") as caught:
        load_processor(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"image_size": 24, "resize": 20}, "resize 20 is below image_size 24"),
        ({"image_size": 24, "mean": (0, 0)}, "red, green and blue"),
        ({"image_size": 24, "std": (1, 1, 0)}, "must be above 0"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(UserError, match=words):
        image_processor(**options)
