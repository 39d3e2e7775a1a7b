"""What the paper says, in float64 and without the package: the independent side of the comparisons in these tests.

`pattention` is Eq. 4 in plain torch, so that autograd gives float64 gradients; `forward` and `published_logits` are the
published forward pass in NumPy, for our parameters and for a checkpoint in the published names, and `classify` that of
an image classifier. None has an epsilon in Pattention, as the published GPU code has none.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    if normalization == "gelu_l1":
        return tau**2 * function(scores) / function(scores).abs().sum(-1, keepdim=True)
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

# A Pattention: keys (N, D), values (N, D), tau.
Tokens = tuple[np.ndarray, np.ndarray, float]


@dataclass
class Sizes:
    """What the parameters do not tell."""

    heads: int
    rotary: int
    normalization: str


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))) / 2


def _pattention(x: np.ndarray, tokens: Tokens, normalization: str) -> np.ndarray:
    key, value, tau = tokens
    scores = x @ key.T
    if normalization == "l2_gelu":
        shares = _gelu(tau * scores / np.linalg.norm(scores, axis=-1, keepdims=True))
    elif normalization == "gelu_l2":
        shares = tau * _gelu(scores) / np.linalg.norm(_gelu(scores), axis=-1, keepdims=True)
    elif normalization == "gelu_l1":
        shares = tau**2 * _gelu(scores) / np.abs(_gelu(scores)).sum(-1, keepdims=True)
    else:
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares = tau**2 * shares / shares.sum(-1, keepdims=True)
    return shares @ value


def _layer_norm(x: np.ndarray, weight: Any = 1, bias: Any = 0) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def _rotate(x: np.ndarray, positions: np.ndarray, size: int, base: float = 10000.0) -> np.ndarray:
    """Turn channel pairs (i, i + size/2) of x (T, E) by position * base^(-2i/size); channels from `size` on pass."""
    turned = x.copy()
    for i in range(size // 2):
        angle = positions * base ** (-2 * i / size)
        a, b = x[:, i], x[:, i + size // 2]
        turned[:, i] = a * np.cos(angle) - b * np.sin(angle)
        turned[:, i + size // 2] = a * np.sin(angle) + b * np.cos(angle)
    return turned


Norm = tuple[np.ndarray, np.ndarray]


def _blocks(
    hidden: np.ndarray,
    layers: Sequence[dict[str, Tokens]],
    final: Norm,
    sizes: Sizes,
    *,
    causal: bool,
    norms: Sequence[dict[str, Norm]] | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Hidden states (T, D), the last after the final norm, and attention (H, T, T) of one sequence (Eq. 6-10)."""
    head_size = hidden.shape[1] // sizes.heads
    positions = np.arange(len(hidden))
    states, attentions = [hidden], []
    for index, layer in enumerate(layers):
        affine = norms[index] if norms else {}
        normed = _layer_norm(hidden, *affine.get("attention_norm", ()))
        query, key, value = (
            _pattention(normed, layer[name], sizes.normalization) for name in ("query", "key", "value")
        )
        mixed, maps = [], []
        for head in range(sizes.heads):
            channels = slice(head * head_size, (head + 1) * head_size)
            q, k = (_rotate(x[:, channels], positions, sizes.rotary) for x in (query, key))
            scores = q @ k.T / math.sqrt(head_size)
            if causal:
                scores[positions[:, None] < positions] = -np.inf
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            maps.append(shares / shares.sum(-1, keepdims=True))
            mixed.append(maps[-1] @ value[:, channels])
        attentions.append(np.stack(maps))
        hidden = hidden + _pattention(np.concatenate(mixed, -1), layer["output"], sizes.normalization)
        normed = _layer_norm(hidden, *affine.get("ffn_norm", ()))
        hidden = hidden + _pattention(normed, layer["ffn"], sizes.normalization)
        states.append(hidden)
    states[-1] = _layer_norm(hidden, *final)
    return states, attentions


def _decoder(
    ids: Sequence[int], embedding: np.ndarray, layers: Sequence[dict[str, Tokens]], norm: Norm, sizes: Sizes
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Logits (T, V), hidden states (T, D) and attention (H, T, T) of one sequence (Eq. 5-10)."""
    states, attentions = _blocks(embedding[np.asarray(ids)], layers, norm, sizes, causal=True)
    return states[-1] @ embedding.T, states, attentions


def forward(model: torch.nn.Module, ids: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Logits (T, V), hidden states (T, D) and attention (H, T, T) of one sequence, from a model's parameters alone."""
    config: Any = model.config
    weights, layers = _parameters(model)
    head_size = config.hidden_size // config.num_attention_heads
    sizes = Sizes(config.num_attention_heads, int(head_size * config.rotary_pct), config.normalization)
    norm = weights["model.norm.weight"], weights["model.norm.bias"]
    return _decoder(ids, weights["model.embed_tokens.weight"], layers, norm, sizes)


def classify(model: torch.nn.Module, image: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Logits (C,), hidden states (T, D) and attention (H, T, T) of one image (channels, H, W), by its parameters."""
    config: Any = model.config
    weights, layers = _parameters(model)
    patch, embeddings = config.patch_size, "model.embeddings"
    tokens = [
        np.einsum(
            "dchw,chw->d",
            weights[f"{embeddings}.patch_embeddings.weight"],
            image[:, row : row + patch, column : column + patch],
        )
        + weights[f"{embeddings}.patch_embeddings.bias"]
        for row in range(0, image.shape[1], patch)
        for column in range(0, image.shape[2], patch)
    ]
    if config.pooling == "cls":
        tokens.insert(0, weights[f"{embeddings}.cls_token"][0, 0])
    hidden = np.stack(tokens) + weights[f"{embeddings}.position_embeddings"][0]
    norms = None
    if config.norm_affine:
        norms = [
            {
                name: (weights[f"model.layers.{i}.{name}.weight"], weights[f"model.layers.{i}.{name}.bias"])
                for name in ("attention_norm", "ffn_norm")
            }
            for i in range(config.num_hidden_layers)
        ]
    final = weights["model.norm.weight"], weights["model.norm.bias"]
    sizes = Sizes(config.num_attention_heads, 0, config.normalization)
    states, attentions = _blocks(hidden, layers, final, sizes, causal=False, norms=norms)
    pooled = states[-1][0] if config.pooling == "cls" else states[-1].mean(0)
    return weights["classifier.weight"] @ pooled + weights["classifier.bias"], states, attentions


def _parameters(model: torch.nn.Module) -> tuple[dict[str, np.ndarray], list[dict[str, Tokens]]]:
    """All tensors of one of our models by name, and the Pattentions of each block with their segments as one."""
    config: Any = model.config
    weights = {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}

    def tokens(path: str) -> Tokens:
        names = [name for name in weights if name.startswith(f"{path}.segments.")]
        key, value = (np.concatenate([weights[n] for n in names if n.endswith(end)]) for end in (".key", ".value"))
        return key, value, float(weights[f"{path}.scale"])

    paths = {name: f"attention.{name}" for name in ("query", "key", "value", "output")} | {"ffn": "ffn"}
    layers = [
        {name: tokens(f"model.layers.{i}.{path}") for name, path in paths.items()}
        for i in range(config.num_hidden_layers)
    ]
    return weights, layers


def published_logits(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], ids: Sequence[int]) -> np.ndarray:
    """Logits (T, V) that the published code gives for a checkpoint in its own names.

    There tau is the root of the number of tokens, and the factor of softmax their number.
    """
    weights = {name: tensor.double().numpy() for name, tensor in tensors.items()}

    def tokens(path: str) -> Tokens:
        key, value = weights[f"{path}.key_param_tokens"], weights[f"{path}.value_param_tokens"]
        return key, value, math.sqrt(len(key))

    paths = {name: f"attention.{name}" for name in ("query", "key", "value")}
    paths |= {"output": "attention.proj", "ffn": "mlp"}
    count = config["num_layers"]
    layers = [{name: tokens(f"sequential.{i + 2}.{path}") for name, path in paths.items()} for i in range(count)]
    kinds = {"l2_norm_gelu": "l2_gelu", "gelu_l2_norm": "gelu_l2", "softmax": "softmax"}
    rotary = int(config["hidden_size"] // config["num_attention_heads"] * config["rotary_pct"])
    sizes = Sizes(config["num_attention_heads"], rotary, kinds[config["norm_activation_type"]])
    norm = weights[f"sequential.{count + 3}.norm.weight"], weights[f"sequential.{count + 3}.norm.bias"]
    logits, _, _ = _decoder(ids, weights["sequential.0.word_embeddings.weight"], layers, norm, sizes)
    return logits
