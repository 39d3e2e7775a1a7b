"""Transformers to compare with: of equal size, and grown by Net2Net, HyperCloning and width."""

from tokenformer.baselines.loading import load_transformer
from tokenformer.baselines.transformer import matching_transformer, num_parameters, transformer_config
from tokenformer.baselines.widening import Method, widen, widen_folder, wider_config

__all__ = [
    "Method",
    "load_transformer",
    "matching_transformer",
    "num_parameters",
    "transformer_config",
    "widen",
    "widen_folder",
    "wider_config",
]
