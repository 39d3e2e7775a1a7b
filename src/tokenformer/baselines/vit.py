"""The ViT to compare with: transformers' own, with as many parameters in its blocks as wanted.

It differs from a TokenFormer for images in its projections, which are linear layers with biases, and in the layer norms
of its blocks, which have weights and biases; patch embedding, class token, position embedding, final norm and
classifier are the same.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.modeling_vit import ViTLayer

from tokenformer.baselines.loading import load_architecture
from tokenformer.baselines.matching import UNIT, block_parameters, check_sizes, matching_shape
from tokenformer.errors import UserError
from tokenformer.modules import drop_path


def vit_config(
    *,
    image_size: int,
    patch_size: int,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    intermediate_size: int,
    num_channels: int = 3,
    **fields: Any,
) -> ViTConfig:
    """The configuration of a ViT, with the defaults of a `TokenFormerVisionConfig` and nothing dropped out.

    Args:
        image_size: pixels along each side of an image.
        patch_size: pixels along each side of a patch; must divide `image_size`.
        hidden_size: channels of the residual stream.
        num_hidden_layers: blocks.
        num_attention_heads: heads of attention; must divide `hidden_size`.
        intermediate_size: neurons of the feed-forward.
        num_channels: of an image.
        fields: others of ViTConfig; `num_labels` or `id2label` give the classes.

    Raises:
        UserError: sizes that do not fit together, naming the field.
    """
    sizes = {
        "image_size": image_size,
        "patch_size": patch_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_channels": num_channels,
    }
    check_sizes(sizes)
    if image_size % patch_size:
        raise UserError(f"image_size {image_size} is not divisible by patch_size {patch_size}: change one of them")
    return ViTConfig(**{"layer_norm_eps": 1e-5, **sizes, **fields})


def matching_vit(
    parameters: int,
    *,
    image_size: int,
    patch_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    hidden_size: int | None = None,
    tolerance: float = 0.02,
    **fields: Any,
) -> ViTConfig:
    """The ViT whose blocks have a given number of parameters.

    The embeddings, the final norm and the classifier are left out: of equal width, they are those of a TokenFormer.

    Args:
        parameters: in the blocks, such as `tokenformer.models.cost.trunk_parameters` of a TokenFormer.
        image_size: pixels along each side of an image.
        patch_size: pixels along each side of a patch.
        num_hidden_layers: blocks.
        num_attention_heads: heads of attention.
        hidden_size: channels of the residual stream. If not given: a multiple of 8 for each head, the one that leaves
            the feed-forward an intermediate size closest to 4 hidden sizes.
        tolerance: share of `parameters` by which the result may be off. Within it the intermediate size is a multiple
            of 8 if one fits, otherwise the one that comes closest.
        fields: others of `vit_config`.

    Raises:
        UserError: sizes that do not fit together; no model of these layers and heads, with an intermediate size of
            half to 16 hidden sizes, comes within the tolerance.
    """
    if parameters < 1:
        raise UserError(f"the number of parameters to match must be at least 1, got {parameters}")
    common: dict[str, Any] = {
        "image_size": image_size,
        "patch_size": patch_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        **fields,
    }
    step = UNIT * num_attention_heads
    # What does not fit together is said first.
    vit_config(hidden_size=step if hidden_size is None else hidden_size, intermediate_size=1, **common)
    shape = matching_shape(
        parameters,
        count=lambda width, ffn: num_hidden_layers * block_parameters(width, ffn),
        hidden_size=hidden_size,
        narrowest=step,
        step=step,
        tolerance=tolerance,
        model=f"ViT of {num_hidden_layers} layers, {num_attention_heads} heads",
        counted="parameters in its blocks",
    )
    return vit_config(hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, **common)


def load_vit(path: str | Path, *, dtype: torch.dtype | None = None) -> ViTForImageClassification:
    """The ViT with its classifier in a folder, in evaluation mode.

    Args:
        path: folder, or name of a model on the Hub (`owner/name`).
        dtype: of the weights; as saved if not given.

    Raises:
        UserError: no such folder; no configuration, or that of another kind of model; weights that are missing,
            damaged, or do not fit the configuration.
    """
    found: ViTForImageClassification = load_architecture(
        ViTForImageClassification, path, dtype, kind="a ViT with its classifier"
    )
    return found


def add_drop_path(vit: nn.Module, rate: float) -> None:
    """Give a ViT of transformers, which has none, the drop path of a TokenFormer, in place.

    In training a residual branch of the last block is left out with probability `rate`, of the first with none, and
    linearly in between (stochastic depth, Huang et al. 2016). It has no parameters: names and weights stay.

    Args:
        vit: a ViTModel, or a model with one.
        rate: of the last block.

    Raises:
        UserError: a rate outside [0, 1), a model without blocks of a ViT.
    """
    if not 0 <= rate < 1:
        raise UserError(f"drop path must lie in [0, 1), got {rate}")
    layers = [module for module in vit.modules() if isinstance(module, ViTLayer)]
    if not layers:
        raise UserError(f"{type(vit).__name__} has no blocks of a ViT that could be left out")
    for index, layer in enumerate(layers):
        share = rate * index / max(len(layers) - 1, 1)
        if share:
            # Both branches of a block go through this module on their way to the residual stream.
            layer.add_module("dropout", nn.Sequential(layer.dropout, _DropPath(share)).train(layer.training))


class _DropPath(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        return drop_path(branch, self.rate) if self.training else branch
