"""What the layers of `tokenformer.nn` are compared with: torch's own with the same projections, and the equations."""

import math
from typing import Any

import torch
from torch import nn

import statement
from tokenformer import ParameterTokens, Pattention
from tokenformer.nn import MultiheadAttention, TransformerDecoderLayer, TransformerEncoderLayer


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def with_projections_of(ours: MultiheadAttention, theirs: nn.MultiheadAttention) -> MultiheadAttention:
    """`ours` with torch's linear projections in place of its Pattentions: only the attention itself can differ."""
    weights = (
        theirs.in_proj_weight.chunk(3)
        if theirs.in_proj_weight is not None
        else (theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight)
    )
    biases = (None,) * 3 if theirs.in_proj_bias is None else theirs.in_proj_bias.chunk(3)
    ours.query, ours.key, ours.value = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
    ours.output = theirs.out_proj
    if theirs.bias_k is not None:
        ours.bias_k, ours.bias_v = theirs.bias_k, theirs.bias_v
    return ours.train(theirs.training)


def like_torch(theirs: Any, **options: Any) -> Any:
    """Our layer with the linear layers and norms of torch's encoder or decoder layer: only their order can differ."""
    decoder = isinstance(theirs, nn.TransformerDecoderLayer)
    attention = theirs.self_attn
    ours = (TransformerDecoderLayer if decoder else TransformerEncoderLayer)(
        attention.embed_dim,
        attention.num_heads,
        4,
        theirs.dropout1.p,
        batch_first=attention.batch_first,
        norm_first=theirs.norm_first,
        layer_norm_eps=theirs.norm1.eps,
        bias=theirs.norm1.bias is not None,
        **options,
    )
    ours.ffn = nn.Sequential(theirs.linear1, nn.ReLU(), theirs.dropout, theirs.linear2)
    for name, module in ours.named_children():
        if isinstance(module, MultiheadAttention):
            with_projections_of(module, getattr(theirs, name))
        elif isinstance(module, nn.LayerNorm):
            module.load_state_dict(getattr(theirs, name).state_dict())
    return ours.train(theirs.training)


def randomise(module: nn.Module) -> nn.Module:
    """Parameter tokens large enough that a mistake shows."""
    for segment in module.modules():
        if isinstance(segment, ParameterTokens):
            nn.init.normal_(segment.key, std=0.5)
            nn.init.normal_(segment.value, std=0.5)
    return module


def equation(layer: Pattention, x: torch.Tensor, function: statement.Function = statement.gelu) -> torch.Tensor:
    """Eq. 4 in float64 from the layer's parameters."""
    keys, values = ([getattr(s, name).double() for s in layer.segments.values()] for name in ("key", "value"))
    return statement.pattention(x.double(), keys, values, float(layer.scale), layer.normalization, function)


def attention_equation(
    layer: MultiheadAttention, query: torch.Tensor, source: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """Eq. 6-8 for (B, L, D) and (B, S, D), head by head and query by query; `hidden` (B, L, S) are masked positions."""
    q, k, v = equation(layer.query, query), equation(layer.key, source), equation(layer.value, source)
    mixed = torch.zeros_like(q)
    width = q.shape[-1] // layer.num_heads
    for b, head, i in ((b, h, i) for b in range(len(q)) for h in range(layer.num_heads) for i in range(q.shape[1])):
        channels = slice(head * width, (head + 1) * width)
        seen = ~hidden[b, i]
        shares = (k[b, seen][:, channels] @ q[b, i, channels] / math.sqrt(width)).exp()
        mixed[b, i, channels] = shares / shares.sum() @ v[b, seen][:, channels]
    return equation(layer.output, mixed)
