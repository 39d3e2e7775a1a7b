"""Adapters that say something: keys and values of the order of one instead of the zero keys they begin with."""

import torch
from torch import nn

from tokenformer.pattention import AdapterTokens, Pattention
from tokenformer.tuning import add_adapter


def liven(model: nn.Module, name: str, seed: int = 0) -> None:
    """Give an adapter random keys and values."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, Pattention) and name in layer.segments:
            for parameter in layer.segments[name].parameters():
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)


def add_lively(model: nn.Module, name: str, seed: int = 0, **counts: int) -> nn.Module:
    """`add_adapter` with random keys and values."""
    add_adapter(model, name, **(counts or {"qkv": 3, "output": 2, "ffn": 5}))
    liven(model, name, seed)
    return model


def adapter_tensors(model: nn.Module, name: str) -> list[torch.Tensor]:
    """Copies of its keys and values."""
    segments = [
        layer.segments[name] for layer in model.modules() if isinstance(layer, Pattention) if name in layer.segments
    ]
    assert all(isinstance(segment, AdapterTokens) for segment in segments)
    return [parameter.detach().clone() for segment in segments for parameter in segment.parameters()]
