"""FLOPs of an image against what torch counts, for TokenFormer and for ViT."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification, PreTrainedConfig, ViTConfig

from tokenformer import TokenFormerVisionConfig, grow
from tokenformer.models.cost import forward_flops_per_image, training_flops_per_image, trunk_parameters

SIZES: dict[str, Any] = {"image_size": 24, "patch_size": 4, "num_hidden_layers": 3, "num_attention_heads": 4}
NARROW = {**SIZES, "hidden_size": 32, "num_labels": 7}
WIDE = {**SIZES, "hidden_size": 128, "num_labels": 100, "num_hidden_layers": 2}
SEGMENTS = [{"name": "base", "qkv": 24, "output": 40, "ffn": 100}]

CASES: dict[str, PreTrainedConfig] = {
    "tokenformer": TokenFormerVisionConfig(**NARROW, segments=SEGMENTS),
    "tokenformer, mean": TokenFormerVisionConfig(**NARROW, segments=SEGMENTS, pooling="mean"),
    "tokenformer, affine norms": TokenFormerVisionConfig(**NARROW, segments=SEGMENTS, norm_affine=True),
    "tokenformer, wide": TokenFormerVisionConfig(**WIDE, segments=SEGMENTS),
    "vit": ViTConfig(**NARROW, intermediate_size=100),
    "vit, wide": ViTConfig(**WIDE, intermediate_size=400),
}


def counted(model: torch.nn.Module, size: int) -> tuple[float, float]:
    """FLOPs forward and in all that torch counts; with eager attention, as a fused kernel may be counted as nothing."""
    model.set_attn_implementation("eager")
    pixels = torch.zeros(2, 3, size, size, device=model.device)
    labels = torch.zeros(2, dtype=torch.long, device=model.device)
    with FlopCounterMode(display=False) as counter:
        loss = model(pixels, labels=labels, interpolate_pos_encoding=size != model.config.image_size).loss
        forward = counter.get_total_flops()
        loss.backward()
        return forward / 2, counter.get_total_flops() / 2


@pytest.mark.parametrize("size", [24, 40])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_flops_are_those_that_torch_counts_to_the_last(config: PreTrainedConfig, size: int) -> None:
    model = AutoModelForImageClassification.from_config(config)
    forward, both = counted(model, size)
    given = None if size == config.image_size else size
    assert forward_flops_per_image(model, given) == forward
    assert training_flops_per_image(model, given) == both


def test_flops_of_a_grown_model_count_every_segment() -> None:
    model = AutoModelForImageClassification.from_config(CASES["tokenformer"])
    before, trunk = training_flops_per_image(model), trunk_parameters(model)
    grow(model, qkv=30, output=50, ffn=160)
    grow(model, ffn=200)
    assert training_flops_per_image(model) == counted(model, 24)[1]
    added = 2 * 3 * 32 * (3 * (30 - 24) + (50 - 40) + (200 - 100))
    assert trunk_parameters(model) - trunk == added
    # 6 for each new parameter and each of the 36 patches and the class token, and nothing for attention.
    assert training_flops_per_image(model) - before == 6 * added * 37


def test_a_model_without_a_classifier_has_no_head_to_count() -> None:
    model = AutoModelForImageClassification.from_config(CASES["tokenformer"])
    before = forward_flops_per_image(model)
    model.reset_classifier(0)
    assert before - forward_flops_per_image(model) == 2 * 32 * 7


def test_the_paper_s_base_model_costs_what_the_literature_says_of_vit_b() -> None:
    with torch.device("meta"):
        matched = AutoModelForImageClassification.from_config(TokenFormerVisionConfig.preset("base-matched"))
        vit = AutoModelForImageClassification.from_config(ViTConfig(num_labels=1000))
    # torchvision's documentation of vit_b_16: 17.56 billion multiply-adds of one image of 224 pixels.
    assert forward_flops_per_image(vit) / 2 == pytest.approx(17.56e9, rel=0.0005)
    assert forward_flops_per_image(matched) == pytest.approx(forward_flops_per_image(vit), rel=0.002)
