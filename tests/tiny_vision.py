"""An image classifier small enough for every test, with parameters large enough that mistakes show in its logits."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenformer import ParameterTokens, TokenFormerForImageClassification, TokenFormerVisionConfig, grow
from tokenformer.images import image_processor

CLASSES = ["cat", "dog", "fish", "owl", "newt"]


def tiny_vision_config(**fields: Any) -> TokenFormerVisionConfig:
    """Two layers, two heads of 8 channels, five classes, 3 x 3 patches of 4 pixels."""
    sizes: dict[str, Any] = {
        "image_size": 12,
        "patch_size": 4,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "segments": [{"name": "base", "qkv": 12, "output": 10, "ffn": 20}],
    }
    if not {"num_labels", "id2label"} & set(fields):
        sizes["id2label"] = dict(enumerate(CLASSES))
        sizes["label2id"] = {name: index for index, name in enumerate(CLASSES)}
    return TokenFormerVisionConfig(**{**sizes, **fields})


def tiny_classifier(*, attention: str = "sdpa", **fields: Any) -> TokenFormerForImageClassification:
    """A classifier in evaluation mode with random parameters that give scores and outputs of the order of one."""
    model = TokenFormerForImageClassification(tiny_vision_config(**fields)).eval()
    for module in model.modules():
        if isinstance(module, ParameterTokens):
            nn.init.normal_(module.key, std=model.config.hidden_size**-0.5)
            nn.init.normal_(module.value, std=0.5)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
            nn.init.normal_(module.bias, std=0.3)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.normal_(module.weight, mean=1, std=0.5)
            nn.init.normal_(module.bias, std=0.5)
    for name, parameter in model.model.embeddings.named_parameters():
        if name in ("cls_token", "position_embeddings"):
            nn.init.normal_(parameter, std=0.5)
    model.set_attn_implementation(attention)
    return model


def tiny_pixels(rows: int = 2, height: int = 12, width: int | None = None, seed: int = 0) -> torch.Tensor:
    """Images (rows, 3, height, width), square unless told, normalised as a processor would."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, height, height if width is None else width, generator=generator)


def save_classifier(folder: Path, *, grown: bool = False, **fields: Any) -> TokenFormerForImageClassification:
    """Save a tiny classifier and its image processor, as `tokenformer train` leaves them; returns the model."""
    model = tiny_classifier(**fields)
    if grown:
        grow(model, ffn=32)
    model.save_pretrained(folder)
    image_processor(model.config.image_size).save_pretrained(folder)
    return model
