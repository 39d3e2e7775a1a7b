"""Image classifiers to folders and back: Auto classes, pipeline, other classes, other image sizes, damaged folders."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

from saved_model import edit_config, save_model
from statement import TOLERANCE, error
from tiny_vision import CLASSES, save_classifier, tiny_classifier, tiny_pixels
from tokenformer import (
    TokenFormerForCausalLM,
    TokenFormerForImageClassification,
    TokenFormerVisionConfig,
    TokenFormerVisionModel,
    UserError,
)
from tokenformer.models.loading import load_image_classifier, load_model, load_tokenformer


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, TokenFormerForImageClassification]:
    return tmp_path / "model", save_classifier(tmp_path / "model", grown=True, drop_path_rate=0.1)


def test_auto_classes_give_the_same_bits(saved) -> None:
    folder, model = saved
    expected = model(tiny_pixels())
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert type(loaded) is TokenFormerForImageClassification
    assert torch.equal(loaded(tiny_pixels()).logits, expected.logits)
    backbone = AutoModel.from_pretrained(folder)
    assert type(backbone) is TokenFormerVisionModel
    assert torch.equal(backbone(tiny_pixels()).last_hidden_state, model.forward_features(tiny_pixels()))
    assert type(AutoConfig.from_pretrained(folder)) is TokenFormerVisionConfig
    for load in (load_image_classifier, load_tokenformer):
        found = load(folder)
        assert torch.equal(found(tiny_pixels()).logits, expected.logits)
        assert not found.training
    assert found.config.id2label == dict(enumerate(CLASSES))
    assert [layer.drop_path for layer in found.model.layers] == [0, 0.1]


def test_load_tokenformer_takes_language_models_too(tmp_path) -> None:
    save_model(tmp_path / "language")
    assert type(load_tokenformer(tmp_path / "language")) is TokenFormerForCausalLM


def test_pipeline_sees_the_pixels_of_the_processor(saved, tmp_path) -> None:
    folder, model = saved
    image = Image.effect_noise((40, 25), 90).convert("RGB")
    image.save(tmp_path / "photo.png")
    found = pipeline("image-classification", model=str(folder), top_k=5)(str(tmp_path / "photo.png"))
    pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    shares = model(pixels).logits.softmax(-1)[0]
    assert {guess["label"]: guess["score"] for guess in found} == pytest.approx(
        dict(zip(CLASSES, shares.tolist(), strict=True)), rel=1e-5
    )


def test_a_processor_that_does_not_say_its_class_is_found_by_the_model(saved) -> None:
    folder, _ = saved
    (folder / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 20}, "crop_size": 12}')
    image = Image.effect_noise((30, 20), 90).convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 12, 12)


def test_weights_in_bfloat16_keep_their_scale(saved) -> None:
    folder, model = saved
    loaded = load_image_classifier(folder, dtype="bfloat16")
    assert loaded.model.layers[0].ffn.segments["grown1"].key.dtype == torch.bfloat16
    assert loaded.model.embeddings.position_embeddings.dtype == torch.bfloat16
    assert loaded.model.layers[0].ffn.scale == model.model.layers[0].ffn.scale
    assert error(loaded(tiny_pixels()).logits, model(tiny_pixels()).logits) < TOLERANCE[torch.bfloat16]


# Other classes


def test_another_number_of_classes_is_an_error_of_transformers(saved) -> None:
    folder, model = saved
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForImageClassification.from_pretrained(folder, num_labels=3)
    loaded = AutoModelForImageClassification.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    assert loaded(tiny_pixels()).logits.shape == (2, 3)
    assert loaded.classifier.weight.std().item() == pytest.approx(0.02, rel=4 / math.sqrt(2 * 48))
    assert torch.equal(loaded.forward_features(tiny_pixels()), model.forward_features(tiny_pixels()))


def test_a_new_classifier_keeps_the_backbone_and_can_be_saved(saved, tmp_path) -> None:
    _, model = saved
    features = model.forward_features(tiny_pixels())
    model.reset_classifier(5)  # as many as before: it is new all the same
    assert model.config.id2label == {index: f"LABEL_{index}" for index in range(5)}
    assert model.classifier.weight.std().item() == pytest.approx(0.02, rel=4 / math.sqrt(2 * 80))
    model.reset_classifier(9)
    assert torch.equal(model.forward_features(tiny_pixels()), features)
    model.save_pretrained(tmp_path / "nine")
    loaded = load_image_classifier(tmp_path / "nine")
    assert loaded.config.num_labels == 9
    assert torch.equal(loaded(tiny_pixels()).logits, model(tiny_pixels()).logits)
    model.to(torch.bfloat16).reset_classifier(7)
    assert model.classifier.weight.dtype == torch.bfloat16
    with pytest.raises(UserError, match="must not be negative"):
        model.reset_classifier(-1)


def test_without_a_classifier_the_model_gives_pooled_features(tmp_path) -> None:
    model = tiny_classifier()
    model.reset_classifier(0)
    pooled = model.model(tiny_pixels()).pooler_output
    assert torch.equal(model(tiny_pixels()).logits, pooled)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_image_classifier(tmp_path)(tiny_pixels()).logits, pooled)
    model.reset_classifier(2)
    assert model(tiny_pixels()).logits.shape == (2, 2)


# Other sizes of images


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_another_image_size_is_the_interpolation_made_lasting(pooling, tmp_path) -> None:
    model, larger = tiny_classifier(pooling=pooling), tiny_pixels(2, 20)
    expected = model(larger, interpolate_pos_encoding=True).logits
    model.set_image_size(20)
    assert torch.equal(model(larger).logits, expected)
    assert (model.config.image_size, model.config.num_patches) == (20, 25)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_image_classifier(tmp_path)(larger).logits, expected)
    for size, part in ((22, "patches of 4"), (0, "image_size must be at least 1")):
        with pytest.raises(UserError, match=part):
            model.set_image_size(size)
    assert model.config.image_size == 20


def test_positions_that_are_frozen_stay_so_and_train_on_otherwise() -> None:
    model = tiny_classifier()
    model.set_image_size(8)
    model(tiny_pixels(2, 8), labels=torch.tensor([0, 1])).loss.backward()
    assert model.model.embeddings.position_embeddings.grad is not None
    model.model.embeddings.requires_grad_(False)
    model.set_image_size(16)
    assert not model.model.embeddings.position_embeddings.requires_grad


# Folders that cannot be loaded


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        load_image_classifier(folder)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_folders_of_other_models_are_named(saved, tmp_path) -> None:
    refused(tmp_path / "none", "there is no folder", "none")
    save_model(tmp_path / "language")
    refused(tmp_path / "language", "model_type is 'tokenformer', not 'tokenformer_vision'")
    with pytest.raises(UserError, match="model_type is 'tokenformer_vision', not 'tokenformer'"):
        load_model(saved[0])
    vit = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    ViTForImageClassification(vit).save_pretrained(tmp_path / "vit")
    refused(tmp_path / "vit", "model_type is 'vit'")
    with pytest.raises(UserError, match="model_type is 'vit'"):
        load_tokenformer(tmp_path / "vit")


def test_damaged_folders_are_named(saved) -> None:
    folder, _ = saved
    whole = folder.parent / "whole"
    shutil.copytree(folder, whole)

    tensors = load_file(whole / "model.safetensors")
    for change, part in (
        (lambda t: t.pop("model.embeddings.cls_token"), "the weights lack model.embeddings.cls_token"),
        (lambda t: t.update(extra=torch.zeros(1)), "the weights hold extra"),
        (lambda t: t.update({"classifier.bias": torch.zeros(4)}), "classifier.bias has shape (4,)"),
    ):
        changed = dict(tensors)
        change(changed)
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        refused(folder, part, "restore the config.json")
    (folder / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:-10])
    refused(folder, "model.safetensors is damaged or cut short")
    (folder / "model.safetensors").unlink()
    refused(folder, "holds no weights")

    shutil.copy(whole / "model.safetensors", folder)
    edit_config(folder, image_size=16)
    refused(folder, "position_embeddings has shape (1, 10, 16)", "(1, 17, 16) by config.json")
    edit_config(folder, image_size=13)
    refused(folder, "config.json", "13 x 13", "patches of 4")
    edit_config(folder, image_size="large")
    refused(folder, "config.json", "image_size")
    (folder / "config.json").write_text("{", encoding="utf-8")
    refused(folder, "config.json is not JSON")


def test_a_backbone_alone_is_no_classifier(saved, tmp_path) -> None:
    saved[1].model.save_pretrained(tmp_path / "backbone")
    refused(tmp_path / "backbone", "the weights lack classifier.weight and 1 more")
    assert type(AutoModel.from_pretrained(tmp_path / "backbone")) is TokenFormerVisionModel
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "backbone")
    assert torch.equal(loaded.forward_features(tiny_pixels()), saved[1].forward_features(tiny_pixels()))
    config = json.loads((tmp_path / "backbone" / "config.json").read_text())
    assert config["architectures"] == ["TokenFormerVisionModel"]
