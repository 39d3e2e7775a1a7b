"""Configuration of TokenFormer image classifiers, with the sizes of the paper as presets."""

from typing import Any

from huggingface_hub.dataclasses import strict

from tokenformer.errors import UserError
from tokenformer.models.segments import SegmentedConfig
from tokenformer.pattention import BASE

POOLINGS = ("cls", "mean")

# name: (layers, hidden size, heads, qkv and output tokens, ffn tokens); paper Tables 2 and 9
_PRESETS = {
    "base-matched": (12, 768, 12, 576, 2304),
    "base": (12, 768, 12, 768, 3072),
    "large-matched": (24, 1024, 16, 768, 3072),
    "large": (24, 1024, 16, 1024, 4096),
}
_IMAGENET_CLASSES = 1000


@strict
class TokenFormerVisionConfig(SegmentedConfig):
    """Configuration of a TokenFormer image classifier: a ViT with a Pattention for every projection (section 4.2).

    Args:
        image_size: pixels along each side of an image; position embeddings are learned for it.
        patch_size: pixels along each side of a patch; must divide `image_size`.
        num_channels: of an image.
        hidden_size: channels of the residual stream.
        num_hidden_layers: blocks.
        num_attention_heads: heads of token-token attention; must divide `hidden_size`.
        segments: parameter tokens of each Pattention, as in `TokenFormerConfig`.
        pooling: `cls` classifies by a token of its own, `mean` by the mean over patches, and there is no such token.
        norm_affine: layer norms of the blocks have weight and bias. The paper's have not, and lose nothing by it
            (Table 5); the final norm always has both.
        drop_path_rate: share of samples that skip a residual branch of the last block in training; linearly fewer in
            those before it, none in the first.
        normalization: `l2_gelu`, `gelu_l2`, `gelu_l1` or `softmax` (see `tokenformer.ops.pattention`).
        activation: nonlinearity of Pattention.
        pattention_eps: added to the sum of squares under the root.
        layer_norm_eps: of every layer norm.
        initializer_range: standard deviation of keys, embeddings and classifier at initialisation.
        value_initializer_range: of values; the published 2 / (layers * sqrt(hidden_size)) if not given, which is large
            for few and narrow layers.

    `num_labels` or `id2label` give the classes, as for every configuration of transformers.

    Raises:
        UserError: sizes that do not fit together, naming the field.
    """

    model_type = "tokenformer_vision"

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    pooling: str = "cls"
    norm_affine: bool = False
    drop_path_rate: float | int = 0.0

    def _check_sizes(self) -> None:
        super()._check_sizes()
        self._require_positive("image_size", "patch_size", "num_channels")
        check_divisible(self.image_size, self.image_size, self.patch_size)
        if self.pooling not in POOLINGS:
            raise UserError(f"unknown pooling '{self.pooling}': use one of {', '.join(POOLINGS)}")
        check_drop_path(self.drop_path_rate)

    @property
    def num_patches(self) -> int:
        """Patches of an image of `image_size`."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens that stand before the patches: the class token, or none."""
        return int(self.pooling == "cls")

    @property
    def sequence_length(self) -> int:
        """Tokens of an image of `image_size`: its patches, and the class token where there is one."""
        return self.num_prefix_tokens + self.num_patches

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "TokenFormerVisionConfig":
        """A size of the paper (Table 2): patches of 16 at 224 pixels, and the 1000 classes of ImageNet-1K.

        `base-matched` (86M parameters) and `large-matched` (307M) have as many as the ViT of that name; `base` (114M)
        and `large` (407M) have as many tokens as that ViT has channels.

        Args:
            name: one of the above.
            overrides: fields that take another value.

        Raises:
            UserError: no such preset.
        """
        if name not in _PRESETS:
            raise UserError(f"unknown preset '{name}': use one of {', '.join(_PRESETS)}")
        layers, hidden, heads, attention_tokens, ffn_tokens = _PRESETS[name]
        fields: dict[str, Any] = {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "segments": [{"name": BASE, "qkv": attention_tokens, "output": attention_tokens, "ffn": ffn_tokens}],
        }
        if "id2label" not in overrides:
            fields["num_labels"] = _IMAGENET_CLASSES
        return cls(**{**fields, **overrides})


def check_drop_path(rate: float) -> None:
    """Refuse what is no share of samples, and 1: a branch that is always left out.

    Raises:
        UserError: naming the field.
    """
    if not 0 <= rate < 1:
        raise UserError(f"drop_path_rate must be at least 0 and below 1, got {rate}")


def check_divisible(height: int, width: int, patch_size: int) -> None:
    """Refuse sizes that patches do not fill.

    Raises:
        UserError: naming sizes that would do.
    """
    for side in (height, width):
        if side % patch_size:
            below = side // patch_size * patch_size
            fitting = f"{below} or {below + patch_size}" if below else f"{patch_size}"
            raise UserError(
                f"an image of {height} x {width} pixels is not divisible into patches of {patch_size}: "
                f"use {fitting} in place of {side}, or another patch_size"
            )
