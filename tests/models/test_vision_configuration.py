"""Configurations of image classifiers: the paper's sizes by a count by hand, and what cannot be."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import ViTConfig, ViTForImageClassification

from tiny_vision import tiny_vision_config
from tokenformer import TokenFormerForImageClassification, TokenFormerVisionConfig, UserError
from tokenformer.models.cost import trunk_parameters

# Table 2: layers, channels, qkv and output tokens, ffn tokens, and the millions that it prints (of Base 109, which its
# own sizes do not give: 114 by count).
PAPER = {
    "base-matched": (12, 768, 576, 2304, 86),
    "base": (12, 768, 768, 3072, 114),
    "large-matched": (24, 1024, 768, 3072, 307),
    "large": (24, 1024, 1024, 4096, 407),
}


def on_meta(config: TokenFormerVisionConfig) -> TokenFormerForImageClassification:
    with torch.device("meta"):
        return TokenFormerForImageClassification(config)


@pytest.mark.parametrize("name", PAPER)
def test_presets_have_the_parameters_of_the_paper(name: str) -> None:
    layers, width, attention, ffn, printed = PAPER[name]
    model = on_meta(TokenFormerVisionConfig.preset(name))
    trunk = 2 * layers * width * (3 * attention + attention + ffn)
    patches = 16 * 16 * 3 * width + width
    positions, token, norm = (1 + 14 * 14) * width, width, 2 * width
    head = 1000 * width + 1000
    assert model.num_parameters() == trunk + patches + positions + token + norm + head
    assert trunk_parameters(model) == trunk
    # The paper's Large is the ViT-L that the literature calls 307M and that has 304M.
    assert model.num_parameters() / 1e6 == pytest.approx(printed, rel=0.0125)
    assert model.config.num_attention_heads == width // 64


@pytest.mark.parametrize(("name", "vit"), [("base-matched", (12, 768, 12)), ("large-matched", (24, 1024, 16))])
def test_matched_presets_are_as_large_as_the_vit(name: str, vit: tuple[int, int, int]) -> None:
    layers, width, heads = vit
    config = ViTConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        num_labels=1000,
    )
    with torch.device("meta"):
        theirs = ViTForImageClassification(config).num_parameters()
    # A ViT's linear layers have biases and its norms parameters, 13 channels for each channel of a block.
    difference = 13 * layers * width
    assert on_meta(TokenFormerVisionConfig.preset(name)).num_parameters() == theirs - difference


def test_presets_take_overrides() -> None:
    config = TokenFormerVisionConfig.preset("base", image_size=384, num_labels=7, pooling="mean")
    assert (config.num_patches, config.sequence_length, config.num_labels) == (576, 576, 7)
    named = TokenFormerVisionConfig.preset("base", id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    assert (named.num_labels, named.id2label[1]) == (2, "dog")
    assert TokenFormerVisionConfig.preset("base").num_labels == 1000
    with pytest.raises(UserError, match="unknown preset 'huge': use one of base-matched, base, large-matched, large"):
        TokenFormerVisionConfig.preset("huge")


def test_affine_norms_add_their_weights_and_biases() -> None:
    plain, affine = (on_meta(tiny_vision_config(norm_affine=flag)) for flag in (False, True))
    assert affine.num_parameters() - plain.num_parameters() == 2 * 2 * 2 * 16  # blocks, norms, weight and bias


def test_a_configuration_comes_back_from_json(tmp_path) -> None:
    config = tiny_vision_config(pooling="mean", norm_affine=True, drop_path_rate=0.2, value_initializer_range=0.1)
    config.save_pretrained(tmp_path)
    assert TokenFormerVisionConfig.from_pretrained(tmp_path).to_dict() == {
        **config.to_dict(),
        "dtype": None,
    }


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"image_size": 30}, ["30 x 30", "patches of 4", "use 28 or 32"]),
        ({"image_size": 0}, ["image_size must be at least 1"]),
        ({"patch_size": 0}, ["patch_size must be at least 1"]),
        ({"patch_size": 24}, ["12 x 12", "patches of 24", "use 24"]),
        ({"num_channels": 0}, ["num_channels must be at least 1"]),
        ({"hidden_size": 15}, ["hidden_size 15", "num_attention_heads 2"]),
        ({"num_attention_heads": 0}, ["num_attention_heads must be at least 1"]),
        ({"pooling": "max"}, ["unknown pooling 'max'", "cls, mean"]),
        ({"drop_path_rate": 1.0}, ["drop_path_rate", "below 1"]),
        ({"drop_path_rate": -0.1}, ["drop_path_rate", "at least 0"]),
        ({"normalization": "l1"}, ["unknown normalization 'l1'"]),
        ({"activation": "sine"}, ["unknown activation 'sine'"]),
        ({"segments": [{"name": "more", "qkv": 1, "output": 1, "ffn": 1}]}, ["must begin with one called 'base'"]),
        ({"segments": [{"name": "base", "qkv": 0, "output": 1, "ffn": 1}]}, ["qkv must be at least 1"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_cannot_be_is_named(fields, parts) -> None:
    with pytest.raises(UserError) as caught:
        tiny_vision_config(**fields)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize("fields", [{"image_size": 12.5}, {"pooling": 1}, {"norm_affine": "yes"}])
def test_values_of_another_type_are_refused(fields) -> None:
    with pytest.raises(StrictDataclassError, match=next(iter(fields))):
        tiny_vision_config(**fields)
