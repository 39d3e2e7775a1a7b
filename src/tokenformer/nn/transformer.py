"""`torch.nn.TransformerEncoderLayer` and `TransformerDecoderLayer` made of Pattentions (TokenFormer, Eq. 5-10).

The feed-forward is a single Pattention: its parameter tokens stand for the hidden units between torch's two linear
layers.

Shapes: B batch, T target positions, S source positions, D channels, H heads.
"""

import torch
from torch import nn

from tokenformer.errors import UserError
from tokenformer.nn.attention import KeyValueCache, MultiheadAttention
from tokenformer.ops.activations import Activation
from tokenformer.pattention import Pattention


class DecoderCache:
    """What one `TransformerDecoderLayer` keeps between the steps of decoding.

    Attributes:
        target: keys and values of the target so far.
        memory: keys and values of the memory, projected once.
    """

    def __init__(self) -> None:
        self.target = KeyValueCache()
        self.memory = KeyValueCache()

    @property
    def length(self) -> int:
        """Number of target positions held."""
        return self.target.length

    def reorder(self, rows: torch.Tensor) -> None:
        """Keep the batch rows of these indices (B_new,), in this order: what beam search needs after each step."""
        self.target.reorder(rows)
        self.memory.reorder(rows)


class TransformerEncoderLayer(nn.Module):
    """Self-attention and feed-forward in the signature of `torch.nn.TransformerEncoderLayer`.

    The paper's block is `norm_first=True, elementwise_affine=False, dropout=0`.

    Args:
        d_model: D.
        nhead: H; divides `d_model`.
        dim_feedforward: parameter tokens of the feed-forward.
        dropout: on attention weights and on both branches before they are added.
        activation: of every Pattention of the layer, by name or as a callable; `gelu` as in the paper, where torch has
            `relu`.
        layer_norm_eps: epsilon of the layer norms.
        batch_first: inputs and outputs are (B, S, D) instead of (S, B, D).
        norm_first: layer norms in front of the branches instead of behind the sums.
        bias: layer norms learn a bias. Pattentions have none.
        device: of the parameters.
        dtype: of the parameters.
        elementwise_affine: layer norms learn a weight, and with `bias` a bias; neither in the paper.
        qkv: parameter tokens of each query, key and value projection; `d_model` if not given.
        output: parameter tokens of the output projection of attention; `d_model` if not given.
        normalization: of every Pattention: `l2_gelu`, `gelu_l2`, `gelu_l1` or `softmax`.

    Attributes:
        self_attn: `MultiheadAttention`.
        ffn: Pattention D -> D, of kind `ffn` for `tokenformer.grow`.

    Raises:
        UserError: as `MultiheadAttention` and `Pattention`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Activation = "gelu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        elementwise_affine: bool = True,
        qkv: int | None = None,
        output: int | None = None,
        normalization: str = "l2_gelu",
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.self_attn = MultiheadAttention(
            d_model,
            nhead,
            dropout,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
            qkv=qkv,
            output=output,
            normalization=normalization,
            activation=activation,
        )
        self.ffn = _feed_forward(d_model, dim_feedforward, normalization, activation, device, dtype)
        self.norm1, self.norm2 = (
            nn.LayerNorm(d_model, layer_norm_eps, elementwise_affine, bias, device=device, dtype=dtype)
            for _ in range(2)
        )
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        *,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Encode `src`; masks are those of `MultiheadAttention`.

        Args:
            src: (S, B, D), (B, S, D) with `batch_first`, or (S, D).
            src_mask: (S, S), or (B * H, S, S).
            src_key_padding_mask: (B, S), or (S) without a batch.
            is_causal: promises that `src_mask` is the causal mask.
            cache: positions of earlier calls: `src` holds the next ones, and the keys that masks cover are all of
                them. This is how a stack of these layers with a causal mask decodes.

        Returns:
            In the shape of `src`.

        Raises:
            UserError: as `MultiheadAttention.forward`.
        """
        x = src
        if self.norm_first:
            x = x + self._attend(self.norm1(x), src_mask, src_key_padding_mask, is_causal, cache)
            return x + self.dropout2(self.ffn(self.norm2(x)))
        x = self.norm1(x + self._attend(x, src_mask, src_key_padding_mask, is_causal, cache))
        return self.norm2(x + self.dropout2(self.ffn(x)))

    def _attend(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        padding: torch.Tensor | None,
        is_causal: bool,
        cache: KeyValueCache | None,
    ) -> torch.Tensor:
        return self.dropout1(self.self_attn(x, x, x, padding, False, mask, is_causal=is_causal, cache=cache)[0])


class TransformerDecoderLayer(nn.Module):
    """Self-attention, attention to a memory and feed-forward, as `torch.nn.TransformerDecoderLayer`.

    Args:
        d_model: D.
        nhead: H; divides `d_model`.
        dim_feedforward: parameter tokens of the feed-forward.
        dropout: on attention weights and on the three branches before they are added.
        activation: of every Pattention of the layer, by name or as a callable; `gelu` as in the paper, where torch has
            `relu`.
        layer_norm_eps: epsilon of the layer norms.
        batch_first: inputs and outputs are (B, T, D) instead of (T, B, D).
        norm_first: layer norms in front of the branches instead of behind the sums.
        bias: layer norms learn a bias. Pattentions have none.
        device: of the parameters.
        dtype: of the parameters.
        elementwise_affine: layer norms learn a weight, and with `bias` a bias; neither in the paper.
        qkv: parameter tokens of each query, key and value projection of both attentions; `d_model` if not given.
        output: parameter tokens of the output projections of both attentions; `d_model` if not given.
        normalization: of every Pattention: `l2_gelu`, `gelu_l2`, `gelu_l1` or `softmax`.

    Attributes:
        self_attn: `MultiheadAttention` of the target to itself.
        multihead_attn: `MultiheadAttention` of the target to the memory.
        ffn: Pattention D -> D, of kind `ffn` for `tokenformer.grow`.

    Raises:
        UserError: as `MultiheadAttention` and `Pattention`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Activation = "gelu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        elementwise_affine: bool = True,
        qkv: int | None = None,
        output: int | None = None,
        normalization: str = "l2_gelu",
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.self_attn, self.multihead_attn = (
            MultiheadAttention(
                d_model,
                nhead,
                dropout,
                batch_first=batch_first,
                device=device,
                dtype=dtype,
                qkv=qkv,
                output=output,
                normalization=normalization,
                activation=activation,
            )
            for _ in range(2)
        )
        self.ffn = _feed_forward(d_model, dim_feedforward, normalization, activation, device, dtype)
        self.norm1, self.norm2, self.norm3 = (
            nn.LayerNorm(d_model, layer_norm_eps, elementwise_affine, bias, device=device, dtype=dtype)
            for _ in range(3)
        )
        self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout(dropout) for _ in range(3))

    def forward(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor | None,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        cache: DecoderCache | None = None,
    ) -> torch.Tensor:
        """Decode `tgt` against `memory`; masks are those of `MultiheadAttention`.

        Args:
            tgt: (T, B, D), (B, T, D) with `batch_first`, or (T, D).
            memory: (S, B, D), (B, S, D) with `batch_first`, or (S, D); may be None once `cache` holds it.
            tgt_mask: (T, T), or (B * H, T, T).
            memory_mask: (T, S), or (B * H, T, S).
            tgt_key_padding_mask: (B, T), or (T) without a batch.
            memory_key_padding_mask: (B, S), or (S) without a batch.
            tgt_is_causal: promises that `tgt_mask` is the causal mask.
            memory_is_causal: promises that `memory_mask` is the causal mask.
            cache: what earlier calls left: `tgt` holds the next positions, and the keys that `tgt_mask` (T, T so far)
                and `tgt_key_padding_mask` (B, T so far) cover are all of them. The memory is projected in the
                first call and only its shape is looked at later. One cache for each layer and sequence.

        Returns:
            In the shape of `tgt`.

        Raises:
            UserError: as `MultiheadAttention.forward`; a memory of another shape than the cache holds.
        """
        if cache is not None and memory is not None and cache.memory.key is not None:
            self._check_memory(memory, cache.memory.key)
        x = tgt
        target = (tgt_mask, tgt_key_padding_mask, tgt_is_causal, cache)
        source = (memory, memory_mask, memory_key_padding_mask, memory_is_causal, cache)
        if self.norm_first:
            x = x + self._attend_target(self.norm1(x), *target)
            x = x + self._attend_memory(self.norm2(x), *source)
            return x + self.dropout3(self.ffn(self.norm3(x)))
        x = self.norm1(x + self._attend_target(x, *target))
        x = self.norm2(x + self._attend_memory(x, *source))
        return self.norm3(x + self.dropout3(self.ffn(x)))

    def _attend_target(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        padding: torch.Tensor | None,
        is_causal: bool,
        cache: DecoderCache | None,
    ) -> torch.Tensor:
        held = None if cache is None else cache.target
        return self.dropout1(self.self_attn(x, x, x, padding, False, mask, is_causal=is_causal, cache=held)[0])

    def _attend_memory(
        self,
        x: torch.Tensor,
        memory: torch.Tensor | None,
        mask: torch.Tensor | None,
        padding: torch.Tensor | None,
        is_causal: bool,
        cache: DecoderCache | None,
    ) -> torch.Tensor:
        held = None if cache is None else cache.memory
        if held is not None and held.length:
            memory = None  # projected already
        attend = self.multihead_attn
        return self.dropout2(attend(x, memory, memory, padding, False, mask, is_causal=is_causal, cache=held)[0])

    def _check_memory(self, memory: torch.Tensor, held: torch.Tensor) -> None:
        rows = tuple(memory.shape[:-1])
        if len(rows) == 2 and not self.multihead_attn.batch_first:
            rows = rows[::-1]
        expected = (held.shape[0], held.shape[2])
        if rows != expected and rows != expected[1:]:
            raise UserError(
                f"memory has shape {tuple(memory.shape)}, the cache holds one of {expected[1]} positions in a batch of "
                f"{expected[0]}: begin each source sequence with a new cache"
            )


def _feed_forward(
    d_model: int,
    num_tokens: int,
    normalization: str,
    activation: str | Activation,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Pattention:
    layer = Pattention(
        d_model,
        d_model,
        num_tokens,
        normalization=normalization,
        activation=activation,
        device=device,
        dtype=dtype,
    )
    layer.kind = "ffn"
    return layer
