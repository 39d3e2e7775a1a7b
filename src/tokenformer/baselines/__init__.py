"""Transformers and ViTs to compare with: of equal size; Transformers grown by Net2Net, HyperCloning and width."""

from tokenformer.baselines.loading import load_transformer
from tokenformer.baselines.transformer import matching_transformer, num_parameters, transformer_config
from tokenformer.baselines.vit import add_drop_path, load_vit, matching_vit, vit_config
from tokenformer.baselines.widening import Method, widen, widen_folder, wider_config

__all__ = [
    "Method",
    "add_drop_path",
    "load_transformer",
    "load_vit",
    "matching_transformer",
    "matching_vit",
    "num_parameters",
    "transformer_config",
    "vit_config",
    "widen",
    "widen_folder",
    "wider_config",
]
