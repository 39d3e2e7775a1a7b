"""torch.nn's Transformer layers with every projection a Pattention, and `replace_linear` for models of any kind.

Signatures, shapes and masks are those of `torch.nn`; the layers also work inside `torch.nn.TransformerEncoder`,
`TransformerDecoder` and `Transformer`.
"""

from tokenformer.nn.attention import KeyValueCache, MultiheadAttention
from tokenformer.nn.replace import BiasedPattention, replace_linear
from tokenformer.nn.transformer import DecoderCache, TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "BiasedPattention",
    "DecoderCache",
    "KeyValueCache",
    "MultiheadAttention",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "replace_linear",
]
