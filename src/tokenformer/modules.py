"""The parts of a TokenFormer: attention and block whose every projection is a Pattention (Eq. 5-10).

Shapes: B batch, T positions, D channels, H heads, E channels of a head.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenformer.ops.products import linear
from tokenformer.pattention import BASE, Pattention

if TYPE_CHECKING:
    from tokenformer.models.segments import SegmentedConfig

KINDS = ("qkv", "output", "ffn")


def build_pattention(config: "SegmentedConfig", kind: str) -> Pattention:
    """A D -> D Pattention of one kind (`qkv`, `output` or `ffn`) with the segments that `config` lists for it."""
    counts = {segment["name"]: segment[kind] for segment in config.segments if segment[kind] > 0}
    layer = Pattention(
        config.hidden_size,
        config.hidden_size,
        counts.pop(BASE),
        normalization=config.normalization,
        activation=config.activation,
        eps=config.pattention_eps,
    )
    for name, num_tokens in counts.items():
        layer.add_segment(name, num_tokens)
    layer.kind = kind
    return layer


def rotary_angles(
    position_ids: torch.Tensor, rotary_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (B, T, rotary_dim) of the rotary embedding at `position_ids` (B, T), half-split convention.

    Computed on the fly: a buffer would have to survive meta-device loading, and it is `rotary_dim / 2` powers.
    """
    exact = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, rotary_dim, 2, device=position_ids.device, dtype=exact) / rotary_dim
    angles = position_ids[..., None].to(exact) * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first `cos.shape[-1]` channels of each head of `x` (B, H, T, E) by position; the rest pass."""
    rotary_dim = cos.shape[-1]
    if rotary_dim == 0:
        return x
    rotated, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    rotated = rotated * cos.unsqueeze(1) + turned * sin.unsqueeze(1)
    return torch.cat((rotated, passed), dim=-1)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token-token attention written out, in the interface of transformers' attention functions.

    Takes (B, H, T, E), gives the output (B, T, H, E) and the probabilities (B, H, T, T).
    """
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    probabilities = probabilities.to(query.dtype)
    mixed = nn.functional.dropout(probabilities, p=dropout, training=module.training) @ value
    return mixed.transpose(1, 2).contiguous(), probabilities


class TokenFormerAttention(nn.Module):
    """Multi-head token-token attention; query, key, value and output are Pattentions (Eq. 6-8).

    Args:
        config: sizes and segments.
        layer_idx: of the block.
        causal: a position sees those before it only, as in a language model.
    """

    def __init__(self, config: "SegmentedConfig", layer_idx: int, *, causal: bool = True) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.is_causal = causal
        self.query = build_pattention(config, "qkv")
        self.key = build_pattention(config, "qkv")
        self.value = build_pattention(config, "qkv")
        self.output = build_pattention(config, "output")

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention over (B, T, D); returns the output (B, T, D) and, from eager attention, the probabilities."""
        rows = hidden_states.shape[:-1]
        heads = (*rows, -1, self.head_dim)
        query = self.query(hidden_states).view(heads).transpose(1, 2)
        key = self.key(hidden_states).view(heads).transpose(1, 2)
        value = self.value(hidden_states).view(heads).transpose(1, 2)
        if position_embeddings is not None:
            cos, sin = position_embeddings
            query, key = apply_rotary(query, cos, sin).to(value.dtype), apply_rotary(key, cos, sin).to(value.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, probabilities = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.output(mixed.reshape(*rows, -1)), probabilities


class OutputEmbedding(nn.Linear):
    """Logits (B, T, V) of hidden states (B, T, D): a linear layer that is fast for one position too, where compiled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        return linear(x, self.weight)


def drop_path(branch: torch.Tensor, rate: float) -> torch.Tensor:
    """Leave a residual branch (B, ...) out for a share `rate` of the samples (stochastic depth, Huang et al., 2016).

    What is kept is divided by 1 - rate, so that the mean stays.
    """
    # In float32 whatever the branch is: a uniform number in bfloat16 has 256 values.
    kept = torch.rand(len(branch), *[1] * (branch.dim() - 1), device=branch.device, dtype=torch.float32) >= rate
    return torch.where(kept, branch / (1 - rate), 0)


class TokenFormerBlock(GradientCheckpointingLayer):
    """Pre-norm block: attention, then a feed-forward that is a single Pattention (Eq. 9-10).

    The layer norms have neither weight nor bias: nothing in a block but parameter tokens depends on the data.

    Args:
        config: sizes and segments.
        layer_idx: of the block.
        causal: as for `TokenFormerAttention`.
        norm_affine: layer norms with weight and bias, for the paper's ablation (Table 5).
        drop_path: probability with which a sample skips a residual branch in training.
    """

    def __init__(
        self,
        config: "SegmentedConfig",
        layer_idx: int,
        *,
        causal: bool = True,
        norm_affine: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.attention_norm = nn.LayerNorm(width, eps=eps, elementwise_affine=norm_affine)
        self.attention = TokenFormerAttention(config, layer_idx, causal=causal)
        self.ffn_norm = nn.LayerNorm(width, eps=eps, elementwise_affine=norm_affine)
        self.ffn = build_pattention(config, "ffn")
        self.drop_path = drop_path

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(B, T, D) to (B, T, D); keyword arguments are those of `TokenFormerAttention.forward`."""
        mixed, _ = self.attention(self.attention_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + self._dropped(mixed)
        return hidden_states + self._dropped(self.ffn(self.ffn_norm(hidden_states)))

    def _dropped(self, branch: torch.Tensor) -> torch.Tensor:
        return drop_path(branch, self.drop_path) if self.training and self.drop_path > 0 else branch
