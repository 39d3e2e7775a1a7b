"""`torch.nn.MultiheadAttention` with four Pattentions for its projections (TokenFormer, Eq. 6-8), and its cache.

Shapes: B batch, L queries, S keys, D channels, H heads, E = D / H channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tokenformer.errors import UserError
from tokenformer.ops.activations import Activation
from tokenformer.pattention import Pattention


class KeyValueCache:
    """The projected keys and values that one attention layer has seen, for decoding step by step.

    Attributes:
        key: (B, H, S, E), None while empty.
        value: (B, H, S, E), None while empty.
    """

    def __init__(self) -> None:
        self.key: torch.Tensor | None = None
        self.value: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """S, the number of positions held."""
        return 0 if self.key is None else self.key.shape[2]

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new positions, each (B, H, L, E), and return all of them.

        Raises:
            UserError: the cache holds another batch.
        """
        if self.key is not None and self.value is not None:
            if len(self.key) != len(key):
                raise UserError(f"the cache holds a batch of {len(self.key)}, not {len(key)}: begin with a new cache")
            key, value = torch.cat((self.key, key), dim=2), torch.cat((self.value, value), dim=2)
        self.key, self.value = key, value
        return key, value

    def reorder(self, rows: torch.Tensor) -> None:
        """Keep the batch rows of these indices (B_new,), in this order: what beam search needs after each step."""
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key.index_select(0, rows), self.value.index_select(0, rows)


class MultiheadAttention(nn.Module):
    """Multi-head attention in the signature of `torch.nn.MultiheadAttention`; each projection is a `Pattention`.

    Masks, shapes and returned weights are torch's. The projections have no bias.

    Args:
        embed_dim: D, channels of queries and of the output.
        num_heads: H; divides `embed_dim`.
        dropout: probability with which an attention weight is zeroed in training.
        bias: stands here for torch's order of arguments; must be False.
        add_bias_kv: append one learned key and value to those of the sequence.
        add_zero_attn: append a key and a value of zeros.
        kdim: channels of keys; `embed_dim` if not given.
        vdim: channels of values; `embed_dim` if not given.
        batch_first: inputs and outputs are (B, L, D) instead of (L, B, D).
        device: of the parameters.
        dtype: of the parameters.
        qkv: parameter tokens of each of `query`, `key` and `value`; `embed_dim` if not given, as in the paper.
        output: parameter tokens of the output projection; `embed_dim` if not given.
        normalization: of every Pattention: `l2_gelu`, `gelu_l2`, `gelu_l1` or `softmax`.
        activation: of every Pattention, by name or as a callable.

    Attributes:
        query: Pattention D -> D, of kind `qkv` for `tokenformer.grow`; so are `key` and `value`.
        key: Pattention kdim -> D.
        value: Pattention vdim -> D.
        output: Pattention D -> D, of kind `output`.

    Raises:
        UserError: heads that do not divide the channels, `bias=True`, a dropout outside 0 to 1, or what `Pattention`
            refuses.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = False,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        qkv: int | None = None,
        output: int | None = None,
        normalization: str = "l2_gelu",
        activation: str | Activation = "gelu",
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise UserError(f"num_heads must divide embed_dim: {embed_dim} channels in {num_heads} heads leave a rest")
        if bias:
            raise UserError("a Pattention has no bias: leave bias out, or pass bias=False")
        if not 0 <= dropout <= 1:
            raise UserError(f"dropout must be between 0 and 1, got {dropout}")
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn

        def projection(kind: str, channels: int, num_tokens: int | None) -> Pattention:
            layer = Pattention(
                channels,
                embed_dim,
                embed_dim if num_tokens is None else num_tokens,
                normalization=normalization,
                activation=activation,
                device=device,
                dtype=dtype,
            )
            layer.kind = kind
            return layer

        self.query = projection("qkv", embed_dim, qkv)
        self.key = projection("qkv", self.kdim, qkv)
        self.value = projection("qkv", self.vdim, qkv)
        self.output = projection("output", embed_dim, output)
        self.bias_k: nn.Parameter | None = None
        self.bias_v: nn.Parameter | None = None
        if add_bias_kv:
            self.bias_k = nn.Parameter(torch.empty(1, 1, embed_dim, device=device, dtype=dtype))
            self.bias_v = nn.Parameter(torch.empty(1, 1, embed_dim, device=device, dtype=dtype))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the appended key and value as torch does, if there are any; the Pattentions do it themselves."""
        for parameter in (self.bias_k, self.bias_v):
            if parameter is not None:
                nn.init.xavier_normal_(parameter)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: KeyValueCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from `query` to `key` and `value`.

        In a boolean mask True hides a key; a floating mask is added to the scores.

        Args:
            query: (L, B, D), (B, L, D) with `batch_first`, or (L, D).
            key: (S, B, kdim), (B, S, kdim) or (S, kdim); None, with None for `value`, attends to what `cache` holds.
            value: like `key`, with vdim channels.
            key_padding_mask: (B, S), or (S) without a batch.
            need_weights: also return the attention weights. Without them the faster `scaled_dot_product_attention` is
                used, in which a query that may see no key gets zeros; with weights it gets NaN, as in torch.
            attn_mask: (L, S), or (B * H, L, S).
            average_attn_weights: weights averaged over heads.
            is_causal: promises that `attn_mask`, which has to be given, is the causal mask.
            cache: keys and values of earlier calls; this call's are appended to it, and S counts all of them.

        Returns:
            The output, in the shape of `query`, and the weights: (B, L, S), or (B, H, L, S) unaveraged, without B
            where `query` has none; None unless needed.

        Raises:
            UserError: shapes that do not fit each other or the layer, a mask of integers, `is_causal` without a
                mask, nested tensors, or no keys at all.
        """
        if attn_mask is None and is_causal:
            raise UserError("is_causal only says what attn_mask is: pass the causal mask as attn_mask too")
        self._check_inputs(query, key, value)
        without_batch = query.dim() == 2
        if without_batch:
            query = query.unsqueeze(1)
            key = None if key is None else key.unsqueeze(1)
            value = None if value is None else value.unsqueeze(1)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        batch_first = self.batch_first and not without_batch

        q = self._split_heads(self.query(query), batch_first)
        past = 0 if cache is None else cache.length
        if key is not None and value is not None:
            k, v = self._split_heads(self.key(key), batch_first), self._split_heads(self.value(value), batch_first)
            num_keys = past + k.shape[2]
        elif cache is not None and cache.key is not None and cache.value is not None:
            k, v, num_keys = cache.key, cache.value, past
        else:
            raise UserError("no keys to attend to: pass key and value, or a cache that holds some")
        if len(k) != len(q):
            raise UserError(f"a batch of {len(q)} queries cannot attend to a batch of {len(k)}")
        mask = self._merge_masks(attn_mask, key_padding_mask, q, num_keys)
        if cache is not None and key is not None:
            k, v = cache.append(k, v)
        k, v, appended = self._append_constants(k, v)
        if mask is not None and appended:
            mask = F.pad(mask, (0, appended))

        # The kernel's causal pattern begins at the first key, and it knows no key of ours behind the last.
        causal = is_causal and key_padding_mask is None and past == 0 and not appended
        mixed, weights = self._mix(q, k, v, mask, causal, need_weights)
        mixed = mixed.transpose(1, 2) if batch_first else mixed.permute(2, 0, 1, 3)
        out = self.output(mixed.flatten(-2))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights.squeeze(0) if without_batch else weights
        return out.squeeze(1) if without_batch else out, weights

    def _mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        need_weights: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The values mixed for each query, (B, H, L, E), and the weights (B, H, L, S) if needed."""
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            mask = None if causal else mask
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal), None
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
        return weights.to(v.dtype) @ v, weights

    def _split_heads(self, x: torch.Tensor, batch_first: bool) -> torch.Tensor:
        # (B, L, D) or (L, B, D) to (B, H, L, E)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)

    def _append_constants(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The learned and the zero position behind keys and values, and how many were appended."""
        length = k.shape[2]
        if self.bias_k is not None and self.bias_v is not None:
            heads = (1, self.num_heads, 1, self.head_dim)
            bias_k, bias_v = (bias.view(heads).expand(len(k), -1, -1, -1) for bias in (self.bias_k, self.bias_v))
            k, v = torch.cat((k, bias_k.to(k.dtype)), dim=2), torch.cat((v, bias_v.to(v.dtype)), dim=2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v, k.shape[2] - length

    def _merge_masks(
        self, attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None, q: torch.Tensor, num_keys: int
    ) -> torch.Tensor | None:
        """Both masks as one that is added to scores, broadcastable to (B, H, L, S)."""
        batch, heads, length, _ = q.shape
        parts = []
        if attn_mask is not None:
            # Not `in` a tuple of the two: under torch.compile, sizes that are symbols are then never found.
            if attn_mask.shape != (length, num_keys) and attn_mask.shape != (batch * heads, length, num_keys):
                raise UserError(
                    f"attn_mask has shape {tuple(attn_mask.shape)}: use {(length, num_keys)} (queries, keys), or "
                    f"{(batch * heads, length, num_keys)} (batch * heads, queries, keys)"
                )
            additive = _additive(attn_mask, "attn_mask", q.dtype)
            parts.append(additive if additive.dim() == 2 else additive.view(batch, heads, length, num_keys))
        if key_padding_mask is not None:
            if key_padding_mask.shape != (batch, num_keys):
                raise UserError(
                    f"key_padding_mask has shape {tuple(key_padding_mask.shape)}: use {(batch, num_keys)} (batch, keys)"
                )
            parts.append(_additive(key_padding_mask, "key_padding_mask", q.dtype)[:, None, None])
        return sum(parts[1:], parts[0]) if parts else None

    def _check_inputs(self, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None) -> None:
        if query.is_nested:
            raise UserError("nested tensors are not supported: pass padded ones with key_padding_mask")
        if query.dim() not in (2, 3) or query.shape[-1] != self.embed_dim:
            raise UserError(
                f"query has shape {tuple(query.shape)}: use 2 dimensions, or 3 with a batch; the last is "
                f"embed_dim, {self.embed_dim}"
            )
        if key is None and value is None:
            return
        if key is None or value is None:
            raise UserError("key and value belong together: pass both, or None for both")
        for name, tensor, channels in (("key", key, self.kdim), ("value", value, self.vdim)):
            if tensor.dim() != query.dim() or tensor.shape[-1] != channels:
                raise UserError(
                    f"{name} has shape {tuple(tensor.shape)}: use {query.dim()} dimensions like query, "
                    f"the last of {channels}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise UserError(f"key {tuple(key.shape)} and value {tuple(value.shape)} differ in length or batch")

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _additive(mask: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
    if not mask.is_floating_point():
        raise UserError(
            f"{name} must be boolean (True hides a key) or floating (added to the scores), not {mask.dtype}"
        )
    return mask.to(dtype)
