"""Activations by name: torch.nn.functional's, transformers' (`gelu_new`, `quick_gelu`, ...), or any callable."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tokenformer.errors import UserError

Activation = Callable[[torch.Tensor], torch.Tensor]

_NAMED: dict[str, Activation] = {
    "gelu": F.gelu,  # exact (erf), as published
    "identity": lambda x: x,
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}


def get_activation(activation: str | Activation) -> Activation:
    """The element-wise function called `activation`, or `activation` itself when it is callable.

    Raises:
        UserError: no such name.
    """
    if callable(activation):
        return activation
    if activation in _NAMED:
        return _NAMED[activation]
    from transformers.activations import ACT2FN

    if activation in ACT2FN:
        return ACT2FN[activation]
    raise UserError(f"unknown activation '{activation}': use one of {', '.join(_NAMED)}, or pass a callable")
