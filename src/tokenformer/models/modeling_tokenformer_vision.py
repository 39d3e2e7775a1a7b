"""TokenFormer image classifier (Wang et al., ICLR 2025, section 4.2) for transformers.

A ViT (Dosovitskiy et al., 2021) whose every projection is a Pattention: patches, a class token, learned position
embeddings, the same blocks as the language model without the causal mask, a parametric norm at the end.

Shapes: B batch, C classes, D channels, H and W pixels, T tokens of an image (patches, after the class token if there is
one).
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from tokenformer.errors import UserError
from tokenformer.models.configuration_tokenformer_vision import (
    TokenFormerVisionConfig,
    check_divisible,
    check_drop_path,
)
from tokenformer.models.segments import SegmentedModel
from tokenformer.modules import TokenFormerBlock


class TokenFormerVisionEmbeddings(nn.Module):
    """Patches (B, channels, H, W) to tokens (B, T, D): projection, class token, learned position embeddings."""

    def __init__(self, config: TokenFormerVisionConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        self.patch_embeddings = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if config.pooling == "cls" else None
        self.position_embeddings = nn.Parameter(torch.empty(1, config.sequence_length, width))

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """Tokens of the images; arguments as in `TokenFormerVisionModel.forward`."""
        grid = self._grid(pixel_values, interpolate_pos_encoding)
        tokens = self.patch_embeddings(pixel_values.to(self.patch_embeddings.weight.dtype)).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            tokens = torch.cat((self.cls_token.expand(len(tokens), -1, -1), tokens), dim=1)
        return tokens + self.interpolated_positions(grid)

    def interpolated_positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """Position embeddings (1, T, D) for a grid of rows x columns of patches: bicubic, as ViT's in transformers."""
        side = self.config.image_size // self.config.patch_size
        if grid == (side, side):
            return self.position_embeddings
        prefix = self.config.num_prefix_tokens
        learned = self.position_embeddings[:, prefix:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        exact = learned.to(torch.promote_types(learned.dtype, torch.float32))
        resized = F.interpolate(exact, size=grid, mode="bicubic", align_corners=False).to(learned.dtype)
        return torch.cat((self.position_embeddings[:, :prefix], resized.flatten(2).transpose(1, 2)), dim=1)

    def _grid(self, pixel_values: torch.Tensor, interpolate: bool) -> tuple[int, int]:
        """Rows and columns of patches; raises where the images are not what the model takes."""
        size, patch, channels = self.config.image_size, self.config.patch_size, self.config.num_channels
        if pixel_values.dim() != 4 or pixel_values.shape[1] != channels:
            raise UserError(
                f"pixel_values must be (images, {channels}, height, width), got {tuple(pixel_values.shape)}"
            )
        height, width = pixel_values.shape[2:]
        if not interpolate and (height, width) != (size, size):
            raise UserError(
                f"an image of {height} x {width} pixels, and the model is for {size} x {size}: resize it, or pass "
                "interpolate_pos_encoding=True"
            )
        check_divisible(height, width, patch)
        return height // patch, width // patch


class TokenFormerVisionPreTrainedModel(SegmentedModel):
    """What the vision models share: features, the size of the images, and how embeddings begin."""

    config: TokenFormerVisionConfig
    config_class = TokenFormerVisionConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    _input_embed_layer = "patch_embeddings"
    _no_split_modules = ["TokenFormerVisionEmbeddings", "TokenFormerBlock"]

    @property
    def _backbone(self) -> "TokenFormerVisionModel":
        return cast(TokenFormerVisionModel, self.base_model)

    def forward_features(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """Features (B, T, D) after the final norm; the class token, where there is one, comes first."""
        outputs = self._backbone(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        features: torch.Tensor = outputs.last_hidden_state
        return features

    def intermediate_features(
        self,
        pixel_values: torch.Tensor,
        layers: Sequence[int] | None = None,
        *,
        reshape: bool = False,
        interpolate_pos_encoding: bool = False,
    ) -> list[torch.Tensor]:
        """Features after single blocks, before any norm, for detection, segmentation or probes.

        Blocks behind the last one asked for are not run.

        Args:
            pixel_values: (B, channels, H, W).
            layers: numbers of blocks, from 0, or from the end if negative; all if not given.
            reshape: give maps (B, D, rows, columns) of the patches, without the class token, in place of (B, T, D).
            interpolate_pos_encoding: take images of another size.

        Returns:
            One tensor for each of `layers`, in that order.

        Raises:
            UserError: no such block, or images that the model does not take.
        """
        model, count = self._backbone, self.config.num_hidden_layers
        layers = range(count) if layers is None else layers
        wanted = [index + count if index < 0 else index for index in layers]
        if not all(0 <= index < count for index in wanted):
            raise UserError(
                f"layers {list(layers)}: the model has {count} blocks: give numbers from {-count} to {count - 1}"
            )
        hidden_states = model.embeddings(pixel_values, interpolate_pos_encoding)
        found = {}
        for index, layer in enumerate(model.layers[: max(wanted, default=-1) + 1]):
            hidden_states = layer(hidden_states)
            if index in wanted:
                found[index] = hidden_states
        features = [found[index] for index in wanted]
        if not reshape:
            return features
        patch, prefix = self.config.patch_size, self.config.num_prefix_tokens
        grid = (pixel_values.shape[2] // patch, pixel_values.shape[3] // patch)
        return [states[:, prefix:].transpose(1, 2).unflatten(2, grid) for states in features]

    @torch.no_grad()
    def set_image_size(self, image_size: int) -> None:
        """Make this a model for images of another size, in place: the position embeddings are interpolated for good.

        They are then a new parameter, so that an optimizer is to be made afterwards.

        Raises:
            UserError: patches do not fill an image of that size.
        """
        if image_size < 1:
            raise UserError(f"image_size must be at least 1, got {image_size}")
        check_divisible(image_size, image_size, self.config.patch_size)
        embeddings = self._backbone.embeddings
        side = image_size // self.config.patch_size
        positions = embeddings.interpolated_positions((side, side)).clone()
        embeddings.position_embeddings = nn.Parameter(positions, embeddings.position_embeddings.requires_grad)
        self.config.image_size = image_size

    def set_drop_path(self, rate: float) -> None:
        """Train on with another drop path than the model was made for: sets `drop_path_rate` and that of each block.

        Raises:
            UserError: a rate below 0, or not below 1.
        """
        check_drop_path(rate)
        self.config.drop_path_rate = rate
        for layer, share in zip(self._backbone.layers, _drop_path_rates(self.config), strict=True):
            cast(TokenFormerBlock, layer).drop_path = share

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Tokens as in the language model; patch projection, class token, positions and classifier normal(0, 0.02)."""
        if isinstance(module, TokenFormerVisionEmbeddings):
            init.normal_(module.position_embeddings, std=self.config.initializer_range)
            if module.cls_token is not None:
                init.normal_(module.cls_token, std=self.config.initializer_range)
        else:
            super()._init_weights(module)


def _drop_path_rates(config: TokenFormerVisionConfig) -> list[float]:
    """Of each block: linearly from 0 to `drop_path_rate`."""
    last = max(config.num_hidden_layers - 1, 1)
    return [config.drop_path_rate * index / last for index in range(config.num_hidden_layers)]


class TokenFormerVisionModel(TokenFormerVisionPreTrainedModel):
    """The backbone: embeddings, blocks and final norm; gives tokens (B, T, D) and what stands for the image (B, D)."""

    def __init__(self, config: TokenFormerVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = TokenFormerVisionEmbeddings(config)
        self.layers = nn.ModuleList(
            TokenFormerBlock(
                config,
                i,
                causal=False,
                norm_affine=config.norm_affine,
                drop_path=rate,
            )
            for i, rate in enumerate(_drop_path_rates(config))
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Features of a batch of images.

        Args:
            pixel_values: (B, channels, H, W), normalised.
            interpolate_pos_encoding: take images of another size, or not square, with position embeddings interpolated.
            kwargs: passed to the attention function.

        Returns:
            `last_hidden_state` (B, T, D) after the final norm, and `pooler_output` (B, D): of it the class token, or
            the mean over patches.

        Raises:
            UserError: images that the model does not take, or that patches do not fill.
        """
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.norm(hidden_states)
        pooled = hidden_states[:, 0] if self.config.pooling == "cls" else hidden_states.mean(dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class TokenFormerForImageClassification(TokenFormerVisionPreTrainedModel):
    """The image classifier: backbone and a linear layer; gives logits (B, C)."""

    # The loss is a mean over the images of a batch: the Trainer is to average it over accumulated batches.
    accepts_loss_kwargs = False

    def __init__(self, config: TokenFormerVisionConfig) -> None:
        super().__init__(config)
        self.model = TokenFormerVisionModel(config)
        self.classifier = self._new_classifier()
        self.post_init()

    def _new_classifier(self) -> nn.Module:
        count = self.config.num_labels
        return nn.Linear(self.config.hidden_size, count) if count else nn.Identity()

    def reset_classifier(self, num_labels: int) -> None:
        """Put a new classifier in place of the old one, for other classes; the backbone stays.

        Its parameters are new, so that an optimizer is to be made afterwards.
        The configuration gets the names LABEL_0, LABEL_1, ...: set `config.id2label` and `config.label2id` to yours.

        Args:
            num_labels: of the new classifier; with 0 there is none, and the model gives pooled features (B, D).

        Raises:
            UserError: a negative number.
        """
        if num_labels < 0:
            raise UserError(f"num_labels must not be negative, got {num_labels}")
        self.config.id2label = None
        self.config.num_labels = num_labels
        like = self.model.norm.weight
        self.classifier = self._new_classifier().to(device=like.device, dtype=like.dtype)
        self._init_weights(self.classifier)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Logits, and the mean cross-entropy in nats where `labels` are given.

        Args:
            pixel_values: (B, channels, H, W), normalised.
            labels: (B,) class numbers, or (B, C) shares of each class, as mixup and label smoothing make them.
            interpolate_pos_encoding: see `TokenFormerVisionModel.forward`.
            kwargs: passed to the attention function.

        Raises:
            UserError: images that the model does not take, or labels of another shape.
        """
        outputs = self.model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if labels.shape == logits.shape:
            return F.cross_entropy(exact, labels.to(exact))
        if labels.shape != logits.shape[:1]:
            raise UserError(
                f"labels must be ({len(logits)},) class numbers or {tuple(logits.shape)} shares of each class, got "
                f"{tuple(labels.shape)}"
            )
        return F.cross_entropy(exact, labels.to(exact.device))
