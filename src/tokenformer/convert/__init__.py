"""Published checkpoints to ours and back; a Transformer to a TokenFormer."""

from tokenformer.convert.published import convert

__all__ = ["convert"]
