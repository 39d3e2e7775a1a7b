"""The explanation of an image: its numbers are those of the classifier, taken one at a time."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from image_samples import random_image, save_vit, write_class_folders
from tiny import tiny_model
from tiny_vision import CLASSES, save_classifier, tiny_classifier
from tokenformer import TokenFormerForImageClassification, UserError
from tokenformer.images import ImageSet, image_processor, open_image_set
from tokenformer.images.decoding import BadImage
from tokenformer.interpret import Off, Scale, capture, intervene, measured_ablation, top_images
from tokenformer.interpret.vision import explain_image

SIZE = 12


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A classifier with two segments, saved and loaded, and its processor."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save_classifier(folder, grown=True)
    model = TokenFormerForImageClassification.from_pretrained(folder).eval()
    for name, parameter in model.named_parameters():
        if "grown" in name and "key" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model, image_processor(SIZE)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageSet:
    """Twenty images of 12 x 12 pixels in five classes."""
    folder = tmp_path_factory.mktemp("images")
    for i, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for j in range(4):
            random_image(10 * i + j, (SIZE, SIZE)).save(folder / name / f"{j}.png")
    return open_image_set(str(folder))[0]


def picture(uri: str) -> np.ndarray:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def parts(address: str) -> tuple[str, str, int]:
    layer, segment, i = address.split("/")
    return layer, segment, int(i)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_payload_says_what_the_classifier_does(pooling):
    torch.manual_seed(1)
    model, processor = tiny_classifier(pooling=pooling), image_processor(SIZE)
    image = random_image(3, (SIZE, SIZE))
    found = explain_image(model, processor, image, target="owl", ablations=3, name="x.png")
    found = json.loads(json.dumps(found, allow_nan=False))
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad(), capture(model) as seen:
        logits = model(pixels).logits[0]
    shares = logits.softmax(0)
    assert (found["target"]["id"], found["target"]["piece"]) == (3, "owl")
    assert found["target"]["probability"] == pytest.approx(shares[3].item(), rel=1e-5)
    assert found["target"]["logit"] == pytest.approx(logits[3].item(), rel=1e-5)
    assert [one["id"] for one in found["predictions"]] == logits.argsort(descending=True).tolist()
    assert [CLASSES[one["id"]] for one in found["predictions"]] == [one["piece"] for one in found["predictions"]]
    assert (picture(found["image"]["uri"]) == np.asarray(image)).all()
    assert found["grid"] == {"rows": 3, "columns": 3, "class_token": pooling == "cls"}
    prefix = int(pooling == "cls")
    for entry in found["attribution"]:
        layer, segment, i = parts(entry["address"])
        column = seen[layer].segments[segment].weights[0, :, i]
        maps = found["maps"][entry["address"]]
        assert maps["weights"] == pytest.approx(column[prefix:].tolist(), rel=1e-4, abs=1e-6)
        assert (maps["class"] is None) == (pooling == "mean")
        assert entry["weight"] == pytest.approx(column[column.abs().argmax()].item(), rel=1e-4)
        whole = sum(maps["contributions"]) + (maps["class_contribution"] or 0)
        assert whole == pytest.approx(entry["gradient"], rel=1e-2, abs=1e-5)
        assert entry["address"] in found["tokens"]
    order = [abs(entry["gradient"]) for entry in found["attribution"]]
    assert order == sorted(order, reverse=True)
    assert [entry["measured"] is None for entry in found["attribution"]][:4] == [False] * 3 + [True]
    for entry in found["attribution"][:3]:
        with torch.no_grad(), intervene(model, [Off(entry["address"])]):
            without = model(pixels).logits[0]
        assert entry["measured"] == pytest.approx((without - logits)[3].item(), rel=1e-3, abs=1e-5)
        ablated = found["ablations"][entry["address"]]["predictions"]
        assert ablated[0]["probability"] == pytest.approx(without.softmax(0).max().item(), rel=1e-4)


def test_gradient_contributions_are_the_slope_of_the_logit():
    torch.manual_seed(2)
    model, processor = tiny_classifier().double(), image_processor(SIZE)
    image = random_image(4, (SIZE, SIZE))
    found = explain_image(model, processor, image, ablations=0)
    pixels = processor(image, return_tensors="pt")["pixel_values"].double()
    for entry in found["attribution"][:3]:
        logits = []
        for factor in (1 + 1e-5, 1 - 1e-5):
            with torch.no_grad(), intervene(model, [Scale(entry["address"], factor)]):
                logits.append(model(pixels).logits[0, found["target"]["id"]].item())
        assert entry["gradient"] == pytest.approx((logits[0] - logits[1]) / 2e-5, rel=1e-3)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_images_that_activate_a_token_most(images, pooling, monkeypatch):
    monkeypatch.setattr("tokenformer.interpret.pictures._POSITIONS", 30)  # three images at a time
    torch.manual_seed(3)
    model, processor = tiny_classifier(pooling=pooling), image_processor(SIZE)
    found = explain_image(model, processor, images[0][0], ablations=0, images=images, source="samples")
    rows = []
    for i in range(len(images)):
        with torch.no_grad(), capture(model) as seen:
            model(processor(images[i][0], return_tensors="pt")["pixel_values"])
        rows.append({name: record.segments["base"].weights[0] for name, record in seen.items()})
    assert found["source"] == {"name": "samples", "images": 20}
    for address, card in found["tokens"].items():
        layer, _, i = parts(address)
        weights = torch.stack([row[layer][:, i] for row in rows])
        # The class token has not looked at the image yet where the first block reads it.
        first = pooling == "cls" and "layers.0.attention" in layer and not layer.endswith("output")
        weights = weights[:, 1:] if first else weights
        best = weights.amax(1).argsort(descending=True)[:6]
        for one, row in zip(card["images"], best.tolist(), strict=True):
            shown = found["images"][one["image"]]
            assert (picture(shown["uri"]) == np.asarray(images[row][0])).all()
            assert shown["label"] == images.classes[images.labels[row]]
            assert one["weight"] == pytest.approx(weights[row].max().item(), rel=1e-4, abs=1e-6)
            place = weights[row].argmax().item() - (pooling == "cls" and not first)
            assert one["patch"] == (None if place < 0 else place)
        expected = {
            "mean": weights.mean().item(),
            "rms": weights.square().mean().sqrt().item(),
            "max": weights.max().item(),
            "active": (weights.abs() > 0.1).double().mean().item(),
        }
        assert card["statistics"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert card["state"] == (
            "dead" if expected["active"] == 0 else "always on" if expected["active"] >= 0.99 else None
        )


def test_images_of_tokens_by_address(images):
    model, processor = tiny_classifier(), image_processor(SIZE)
    found = top_images(model, processor, images, ["1.ffn/base/3", "0.attention.query/base/2"], num_images=None, count=2)
    assert found.read == list(range(20))
    assert list(found.tokens) == ["model.layers.1.ffn/base/3", "model.layers.0.attention.query/base/2"]
    weights = []
    for i in range(20):
        with torch.no_grad(), capture(model, layers=["1.ffn"]) as seen:
            model(processor(images[i][0], return_tensors="pt")["pixel_values"])
        weights.append(seen["model.layers.1.ffn"].segments["base"].weights[0, :, 3].max().item())
    best = sorted(range(20), key=weights.__getitem__, reverse=True)[:2]
    assert [one["index"] for one in found.tokens["model.layers.1.ffn/base/3"]["images"]] == best
    with pytest.raises(UserError, match="count must be at least 1"):
        top_images(model, processor, images, ["1.ffn/base/3"], count=0)
    with pytest.raises(UserError, match="it has the tokens 0 to 19"):
        top_images(model, processor, images, ["1.ffn/base/20"])


def test_fewer_images_are_spread_over_the_classes(images):
    model = tiny_classifier()
    found = explain_image(model, image_processor(SIZE), images[0][0], ablations=0, images=images, num_images=5)
    assert found["source"]["images"] == 5
    assert {one["label"] for one in found["images"]} == set(CLASSES)


def test_values_promote_the_classes_that_their_lens_says():
    torch.manual_seed(4)
    model = tiny_classifier()
    found = explain_image(model, image_processor(SIZE), random_image(1, (SIZE, SIZE)), ablations=0)
    card = next(card for card in found["tokens"].values() if card["kind"] == "ffn")
    layer, segment, i = parts(card["address"])
    value = model.get_submodule(layer).segments[segment].value[i]
    added = (model.classifier.weight * model.model.norm.weight) @ (value - value.mean())
    order = added.argsort(descending=True).tolist()
    assert [name for name, _ in card["promotes"]] == [CLASSES[c] for c in order[:2]]
    assert [name for name, _ in card["suppresses"]] == [CLASSES[c] for c in order[::-1][:2]]
    assert card["promotes"][0][1] == pytest.approx(added.max().item(), rel=1e-3)
    query = next(card for card in found["tokens"].values() if card["kind"] == "qkv")
    assert query["promotes"] is query["suppresses"] is query["nearest"] is None


def test_segments_of_a_grown_classifier_and_changes(grown):
    model, processor = grown
    image = random_image(5, (SIZE, SIZE))
    change = Off("1.ffn/base")
    found = explain_image(model, processor, image, ablations=0, changes=[change])
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad(), capture(model, outputs=True) as seen:
        model(pixels)
    record = seen["model.layers.1.ffn"]
    output = record.output[0]
    for name, segment in record.segments.items():
        share = ((segment.output[0] * output).sum(-1) / output.square().sum(-1)).mean().item()
        assert found["shares"]["model.layers.1.ffn"][name] == pytest.approx(share, rel=1e-3, abs=1e-4)
    assert set(found["shares"]["model.layers.1.ffn"]) == {"base", "grown1"}
    with torch.no_grad(), intervene(model, [change]):
        logits = model(pixels).logits[0]
    assert found["changes"]["predictions"][0]["id"] == logits.argmax().item()
    assert found["changes"]["changes"] == ["off 1.ffn/base"]


def test_ablations_of_a_classifier_are_those_one_at_a_time(grown):
    model, _ = grown
    pixels = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    tokens = ["1.ffn/base/3", "0.ffn/grown1/1", "0.attention.query/base/0"]
    found = measured_ablation(model, pixels, tokens, batch_size=2)
    assert found.shape == (3, 5)
    for token, row in zip(tokens, found, strict=True):
        with intervene(model, [Off(token)]), torch.no_grad():
            assert torch.allclose(row, model(pixels).logits[0], atol=1e-5)
    with pytest.raises(UserError, match=r"one row of pixel values \(1, channels, H, W\), got shape \(2, 3, 12, 12\)"):
        measured_ablation(model, pixels.expand(2, -1, -1, -1), tokens)


def test_the_image_is_shown_as_the_model_sees_it():
    model = tiny_classifier()
    wide = random_image(6, (40, 20))
    found = explain_image(model, image_processor(SIZE), wide, ablations=0)
    scaled = np.asarray(wide.resize((24, 12), Image.Resampling.BICUBIC))[:, 6:18]
    assert (picture(found["image"]["uri"]) == scaled).all()
    assert (found["image"]["width"], found["image"]["height"]) == (SIZE, SIZE)


def test_what_cannot_be_read_is_left_out_and_said(tmp_path):
    folder = write_class_folders(tmp_path / "images", CLASSES, each=2)
    (folder / "cat" / "0.png").write_bytes(b"no image")
    model, processor = tiny_classifier(), image_processor(SIZE)
    images, _ = open_image_set(str(folder), on_bad_image="skip")
    found = explain_image(model, processor, images[3][0], ablations=0, images=images)
    assert found["source"]["images"] == 9
    assert "1 of the images could not be read and were left out." in found["notes"]
    with pytest.raises(BadImage, match="is not an image"):
        explain_image(model, processor, images[3][0], ablations=0, images=open_image_set(str(folder))[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "own"}, "the model has no class 'own': did you mean 'owl'?"),
        ({"target": "zebra"}, "the model has no class 'zebra': it has 5, from 'cat' to 'newt'"),
        ({"target": 5}, "the model has no class '5'"),
        ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        ({"ablations": -1}, "ablations must be at least 0, got -1"),
        ({"num_images": 0}, "num_images must be at least 1, got 0"),
        ({"image": "absent.png"}, "'absent.png' does not exist"),
        ({"image": b"text"}, "the image is not an image"),
        (
            {"processor": image_processor(8)},
            "the model takes images of 12 x 12 pixels and its image processor gives 8 x 8",
        ),
        ({"changes": [Off("9.ffn/base/1")]}, "9.ffn"),
    ],
)
def test_what_cannot_be_explained(options, message):
    given = {"processor": image_processor(SIZE), "image": random_image(0), **options}
    with pytest.raises(UserError) as error:
        explain_image(tiny_classifier(), given.pop("processor"), given.pop("image"), **given)
    assert message in str(error.value)


def test_other_models(tmp_path):
    with pytest.raises(UserError, match="TokenFormerForCausalLM is no TokenFormer image classifier"):
        explain_image(tiny_model(), image_processor(SIZE), random_image(0))
    with pytest.raises(UserError, match="has no Pattention layer"):
        explain_image(save_vit(tmp_path), image_processor(SIZE), random_image(0))


def test_a_damaged_classifier_is_named():
    model = tiny_classifier()
    with torch.no_grad():
        model.classifier.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="logits that are not finite"):
        explain_image(model, image_processor(SIZE), random_image(0))
