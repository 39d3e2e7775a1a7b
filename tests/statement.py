"""What the paper says, in float64 and without the package: the independent side of the comparisons in these tests.

`pattention` is Eq. 4 in plain torch, so that autograd gives float64 gradients; `forward` is the published forward pass
in NumPy. Neither has an epsilon in Pattention, as the published GPU code has none.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

Function = Callable[[torch.Tensor], torch.Tensor]

# |actual - expected| <= tolerance * (1 + max |expected|)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def gelu(x: torch.Tensor) -> torch.Tensor:
    """The exact GeLU, x Phi(x)."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def weights(
    x: torch.Tensor, keys: Sequence[torch.Tensor], tau: float, normalization: str, function: Function = gelu
) -> torch.Tensor:
    """Weights (..., N) of all parameter tokens, row by row as the equation is written."""
    scores = torch.einsum("...d,nd->...n", x, torch.cat(list(keys)))
    if normalization == "l2_gelu":
        return function(tau * scores / scores.pow(2).sum(-1, keepdim=True).sqrt())
    if normalization == "gelu_l2":
        return tau * function(scores) / function(scores).pow(2).sum(-1, keepdim=True).sqrt()
    exponentials = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return tau**2 * exponentials / exponentials.sum(-1, keepdim=True)


def pattention(
    x: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    tau: float,
    normalization: str = "l2_gelu",
    function: Function = gelu,
) -> torch.Tensor:
    """Eq. 4 over the union of segments."""
    return torch.einsum("...n,nd->...d", weights(x, keys, tau, normalization, function), torch.cat(list(values)))


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to 1 + the largest expected magnitude; NaN counts as infinite."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if actual.numel() == 0:
        return 0.0
    expected = expected.detach().double()
    difference = (actual.detach().double() - expected).abs().max() / (1 + expected.abs().max())
    return math.inf if difference.isnan() else difference.item()


# The forward pass, in NumPy


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))) / 2


def _pattention(x: np.ndarray, weights: dict[str, np.ndarray], path: str, normalization: str) -> np.ndarray:
    names = [name for name in weights if name.startswith(f"{path}.segments.")]
    key = np.concatenate([weights[name] for name in names if name.endswith(".key")])
    value = np.concatenate([weights[name] for name in names if name.endswith(".value")])
    tau = float(weights[f"{path}.scale"])
    scores = x @ key.T
    if normalization == "l2_gelu":
        shares = _gelu(tau * scores / np.linalg.norm(scores, axis=-1, keepdims=True))
    elif normalization == "gelu_l2":
        shares = tau * _gelu(scores) / np.linalg.norm(_gelu(scores), axis=-1, keepdims=True)
    else:
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares = tau**2 * shares / shares.sum(-1, keepdims=True)
    return shares @ value


def _layer_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def _rotate(x: np.ndarray, positions: np.ndarray, size: int, base: float = 10000.0) -> np.ndarray:
    """Turn channel pairs (i, i + size/2) of x (T, E) by position * base^(-2i/size); channels from `size` on pass."""
    turned = x.copy()
    for i in range(size // 2):
        angle = positions * base ** (-2 * i / size)
        a, b = x[:, i], x[:, i + size // 2]
        turned[:, i] = a * np.cos(angle) - b * np.sin(angle)
        turned[:, i + size // 2] = a * np.sin(angle) + b * np.cos(angle)
    return turned


def forward(model: torch.nn.Module, ids: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Logits (T, V), hidden states (T, D) and attention (H, T, T) of one sequence, from a model's parameters alone."""
    config: Any = model.config
    weights = {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}
    head_size = config.hidden_size // config.num_attention_heads
    positions = np.arange(len(ids))
    embedding = weights["model.embed_tokens.weight"]
    hidden = embedding[np.asarray(ids)]
    states, attentions = [hidden], []
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        normed = _layer_norm(hidden)
        query, key, value = (
            _pattention(normed, weights, f"{layer}.attention.{name}", config.normalization)
            for name in ("query", "key", "value")
        )
        mixed, maps = [], []
        for head in range(config.num_attention_heads):
            channels = slice(head * head_size, (head + 1) * head_size)
            size = int(head_size * config.rotary_pct)
            q, k = _rotate(query[:, channels], positions, size), _rotate(key[:, channels], positions, size)
            scores = q @ k.T / math.sqrt(head_size)
            scores[positions[:, None] < positions] = -np.inf
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            maps.append(shares / shares.sum(-1, keepdims=True))
            mixed.append(maps[-1] @ value[:, channels])
        attentions.append(np.stack(maps))
        hidden = hidden + _pattention(
            np.concatenate(mixed, -1), weights, f"{layer}.attention.output", config.normalization
        )
        hidden = hidden + _pattention(_layer_norm(hidden), weights, f"{layer}.ffn", config.normalization)
        states.append(hidden)
    states[-1] = _layer_norm(hidden) * weights["model.norm.weight"] + weights["model.norm.bias"]
    return states[-1] @ embedding.T, states, attentions
