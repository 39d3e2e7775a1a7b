"""GPT-NeoX (Pythia) and GPT-2 from their folders, as the same plain linear maps.

What differs between the two is gone afterwards: fused and interleaved projections are apart, weights stand as
(out, in), the weight and bias of a layer norm are folded into the maps behind it, and what is unusual about the scale
of attention is folded into the queries. Such a map reads the output of a layer norm without weight and bias, as every
projection of a TokenFormer does.

Shapes: B batch, T positions, D channels, V vocabulary, F neurons of the feed-forward.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, GPT2LMHeadModel, GPTNeoXForCausalLM

from tokenformer.baselines.loading import load_weights
from tokenformer.errors import UserError
from tokenformer.models.checkpoints import one_line
from tokenformer.models.loading import quiet
from tokenformer.modules import apply_rotary, rotary_angles
from tokenformer.ops import get_activation
from tokenformer.ops.activations import Activation

ARCHITECTURES: dict[str, Any] = {"gpt_neox": GPTNeoXForCausalLM, "gpt2": GPT2LMHeadModel}


@dataclass(frozen=True)
class Affine:
    """x -> x W^T + b.

    Attributes:
        weight: (out, in)
        bias: (out,), zeros where the Transformer has none.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return F.linear(x, self.weight, self.bias)

    def after_norm(self, norm: torch.nn.LayerNorm) -> "Affine":
        """The same map behind a layer norm without weight and bias.

        The output of that norm has mean zero, so the part of the weight along (1, ..., 1) does nothing and is removed:
        what is left has the norm and the singular values that count.
        """
        weight = self.weight * norm.weight
        return Affine(weight - weight.mean(-1, keepdim=True), self.bias + self.weight @ norm.bias)

    def times(self, factor: float) -> "Affine":
        """`factor` times the map."""
        return Affine(self.weight * factor, self.bias * factor)


@dataclass(frozen=True)
class PretrainedBlock:
    """One block. All maps but `output` and `outer` read a layer norm without weight and bias.

    Attributes:
        query: (D, D), likewise `key` and `value`: heads one after the other.
        key: see `query`.
        value: see `query`.
        output: (D, D), from the heads' mixed values.
        inner: (F, D), to the neurons of the feed-forward.
        outer: (D, F), from them.
        parallel: the feed-forward reads what attention reads, not what attention leaves (GPT-NeoX).
    """

    query: Affine
    key: Affine
    value: Affine
    output: Affine
    inner: Affine
    outer: Affine
    parallel: bool


@dataclass(frozen=True)
class Pretrained:
    """A Transformer language model.

    Attributes:
        model: transformers' own.
        architecture: `gpt_neox` or `gpt2`.
        embedding: (V, D)
        positions: (positions, D), learned; None with rotary positions.
        blocks: in order.
        norm: weight and bias of the final layer norm, both (D,).
        head: (V, D), None where the embedding is the output embedding too.
        num_heads: of attention.
        rotary_pct: share of a head's channels that carries positions.
        rotary_dim: the number of these channels.
        rope_theta: base of the rotary angles.
        eps: of the layer norms.
        activation: of the feed-forward, by name.
        max_positions: longest sequence.
    """

    model: Any
    architecture: str
    embedding: torch.Tensor
    positions: torch.Tensor | None
    blocks: list[PretrainedBlock]
    norm: tuple[torch.Tensor, torch.Tensor]
    head: torch.Tensor | None
    num_heads: int
    rotary_pct: float
    rotary_dim: int
    rope_theta: float
    eps: float
    activation: str
    max_positions: int

    def normalize(self, hidden: torch.Tensor) -> torch.Tensor:
        """Layer norm without weight and bias, (..., D)."""
        return F.layer_norm(hidden, hidden.shape[-1:], eps=self.eps)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """What the first block reads, (B, T, D), of ids (B, T)."""
        hidden = self.embedding[ids]
        return hidden if self.positions is None else hidden + self.positions[: ids.shape[1]]

    def run_block(self, block: PretrainedBlock, hidden: torch.Tensor) -> "BlockStates":
        """One block on (B, T, D), with what it computes on the way."""
        normed = self.normalize(hidden)
        query, key, value = block.query(normed), block.key(normed), block.value(normed)
        mixed = mix_values(query, key, value, self.num_heads, self.rotary_dim, self.rope_theta)
        middle = hidden + block.output(mixed)
        neurons = block.inner(normed if block.parallel else self.normalize(middle))
        after = middle + block.outer(get_activation(self.activation)(neurons))
        return BlockStates(query, key, value, middle, neurons, after)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, V) from what the last block leaves."""
        weight, bias = self.norm
        return F.linear(self.normalize(hidden) * weight + bias, self.embedding if self.head is None else self.head)


@dataclass(frozen=True)
class BlockStates:
    """What a block computes.

    Attributes:
        query: (B, T, D) before rotation, likewise `key` and `value`.
        key: see `query`.
        value: see `query`.
        middle: (B, T, D), the hidden state with attention added.
        neurons: (B, T, F), before the activation.
        after: (B, T, D), the hidden state that the block leaves.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    middle: torch.Tensor
    neurons: torch.Tensor
    after: torch.Tensor


def mix_values(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_heads: int, rotary_dim: int, theta: float
) -> torch.Tensor:
    """Causal attention of all heads, (B, T, D) each, with rotary positions on `rotary_dim` channels of a head."""
    rows = query.shape[:-1]
    heads = [part.view(*rows, num_heads, -1).transpose(1, 2) for part in (query, key, value)]
    angles = rotary_angles(torch.arange(rows[1])[None], rotary_dim, theta, query.dtype)
    mixed = F.scaled_dot_product_attention(
        apply_rotary(heads[0], *angles), apply_rotary(heads[1], *angles), heads[2], is_causal=True
    )
    return mixed.transpose(1, 2).reshape(*rows, -1)


def load_pretrained(folder: Path, *, dtype: torch.dtype = torch.float32) -> Pretrained:
    """Read a Transformer.

    Args:
        folder: as written by `save_pretrained`.
        dtype: to compute in.

    Raises:
        UserError: no such architecture, an option of it that a TokenFormer cannot express, or weights that are missing,
            damaged, or do not fit the configuration.
    """
    with quiet():
        model = _load(folder, dtype)
    read = _read_gpt_neox if model.config.model_type == "gpt_neox" else _read_gpt2
    with torch.no_grad():
        pretrained = read(model)
    _check_activation(get_activation(pretrained.activation), pretrained.activation, folder)
    return pretrained


def _load(folder: Path, dtype: torch.dtype) -> Any:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json: give the folder of a GPT-NeoX, Pythia or GPT-2 model")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a model type transformers does not know, a value of the wrong type, no JSON
        raise UserError(f"{folder}/config.json cannot be read: {one_line(error)}") from error
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"{folder} is a '{config.model_type}': only {' and '.join(ARCHITECTURES)} models become a TokenFormer "
            "(GPT-NeoX, Pythia, GPT-2)"
        )
    _check_options(config, folder)
    model, _ = load_weights(ARCHITECTURES[config.model_type], folder, config, dtype)
    return model


def _check_options(config: Any, folder: Path) -> None:
    if config.model_type == "gpt2" and config.add_cross_attention:
        raise UserError(f"{folder}: add_cross_attention is set, and a TokenFormer has no cross-attention")
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind != "default":
        raise UserError(f"{folder}: rope_type is '{kind}', and a TokenFormer has only 'default'")


def _check_activation(function: Activation, name: str, folder: Path) -> None:
    """The linear maps need f(z) - f(-z) = z, which holds for z times any sigmoid: gelu, gelu_new, silu, relu."""
    z = torch.linspace(-8, 8, 401, dtype=torch.float64)
    if not torch.allclose(function(z) - function(-z), z, atol=1e-6):
        raise UserError(f"{folder}: the activation '{name}' cannot express linear maps: gelu, gelu_new, silu, relu can")


def _read_gpt_neox(model: Any) -> Pretrained:
    config, heads = model.config, model.config.num_attention_heads
    blocks = []
    for layer in model.gpt_neox.layers:
        # Fused as (head, query / key / value, channel of the head).
        fused = _affine(layer.attention.query_key_value)
        weights = fused.weight.view(heads, 3, -1, config.hidden_size).unbind(1)
        biases = fused.bias.view(heads, 3, -1).unbind(1)
        query, key, value = (
            Affine(weight.flatten(0, 1), bias.flatten()).after_norm(layer.input_layernorm)
            for weight, bias in zip(weights, biases, strict=True)
        )
        blocks.append(
            PretrainedBlock(
                query=query,
                key=key,
                value=value,
                output=_affine(layer.attention.dense),
                inner=_affine(layer.mlp.dense_h_to_4h).after_norm(layer.post_attention_layernorm),
                outer=_affine(layer.mlp.dense_4h_to_h),
                parallel=config.use_parallel_residual,
            )
        )
    rotary_pct = config.rope_parameters.get("partial_rotary_factor", 1.0)
    norm = model.gpt_neox.final_layer_norm
    return Pretrained(
        model=model,
        architecture="gpt_neox",
        embedding=model.gpt_neox.embed_in.weight.detach(),
        positions=None,
        blocks=blocks,
        norm=(norm.weight.detach(), norm.bias.detach()),
        head=None if config.tie_word_embeddings else model.lm_head.weight.detach(),
        num_heads=heads,
        rotary_pct=rotary_pct,
        rotary_dim=int(config.hidden_size // heads * rotary_pct),
        rope_theta=config.rope_parameters["rope_theta"],
        eps=config.layer_norm_eps,
        activation=config.hidden_act,
        max_positions=config.max_position_embeddings,
    )


def _read_gpt2(model: Any) -> Pretrained:
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    blocks = []
    for i, layer in enumerate(model.transformer.h):
        fused = _affine(layer.attn.c_attn)
        query, key, value = (
            Affine(weight, bias).after_norm(layer.ln_1)
            for weight, bias in zip(fused.weight.chunk(3), fused.bias.chunk(3), strict=True)
        )
        # Ours divides scores by the root of head_dim.
        scaling = 1.0 if config.scale_attn_weights else head_dim**0.5
        if config.scale_attn_by_inverse_layer_idx:
            scaling /= i + 1
        blocks.append(
            PretrainedBlock(
                query=query.times(scaling),
                key=key,
                value=value,
                output=_affine(layer.attn.c_proj),
                inner=_affine(layer.mlp.c_fc).after_norm(layer.ln_2),
                outer=_affine(layer.mlp.c_proj),
                parallel=False,
            )
        )
    norm = model.transformer.ln_f
    return Pretrained(
        model=model,
        architecture="gpt2",
        embedding=model.transformer.wte.weight.detach(),
        positions=model.transformer.wpe.weight.detach(),
        blocks=blocks,
        norm=(norm.weight.detach(), norm.bias.detach()),
        head=None if config.tie_word_embeddings else model.lm_head.weight.detach(),
        num_heads=config.num_attention_heads,
        rotary_pct=0.0,
        rotary_dim=0,
        rope_theta=10000.0,
        eps=config.layer_norm_epsilon,
        activation=config.activation_function,
        max_positions=config.max_position_embeddings,
    )


def _affine(layer: Any) -> Affine:
    """The map of an `nn.Linear`, or of transformers' `Conv1D`, whose weight is (in, out)."""
    weight = layer.weight if isinstance(layer, torch.nn.Linear) else layer.weight.T
    bias = torch.zeros(weight.shape[0], dtype=weight.dtype) if layer.bias is None else layer.bias
    return Affine(weight.detach(), bias.detach())
