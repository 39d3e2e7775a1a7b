"""A model whose tau is not the root of its number of tokens, for code that takes it to be.

Growing keeps tau, so a grown model has n tokens and a tau below sqrt(n). The published code stores no tau and would
change every output. What it computes can be made the same again:

- `gelu_l2` and `softmax` are linear in tau and tau^2: the values take the factor.
- `l2_gelu` needs tau / ||A|| = sqrt(N) / ||A'|| inside the GeLU. Tokens with value zero add nothing but their part of
  the norm. With K = Q R, keys s R have the scores s x R^T, whose norm is s ||x K^T|| = s ||A||. So all N tokens have
  the norm ||A'|| = sqrt(1 + s^2) ||A||, and s^2 = N / tau^2 - 1 is what is needed. R has min(n, D) rows, and where
  that is n, the keys do themselves. A tau above sqrt(N) asks for more tokens, with zero keys.

Shapes: n tokens, N after appending, D channels.
"""

import math
from collections.abc import Sequence

import torch

_ROUNDING = 2**-22


def is_root(tau: float, num_tokens: int) -> bool:
    """Whether tau is sqrt(num_tokens) in float32, whose last bit depends on who computes the root."""
    return math.isclose(tau, num_tokens**0.5, rel_tol=_ROUNDING)


def num_appended(normalization: str, num_tokens: int, channels: int, taus: Sequence[float]) -> int:
    """Tokens to append to every layer of a kind, which has one number of tokens in all layers.

    Args:
        normalization: of the model.
        num_tokens: of each layer now.
        channels: of a key.
        taus: of the layers.
    """
    if normalization != "l2_gelu" or all(is_root(tau, num_tokens) for tau in taus):
        return 0
    least = math.ceil(max(taus) ** 2 * (1 - 4 * _ROUNDING))  # the root of a whole number may lie a bit above it
    if least > num_tokens and all(is_root(tau, least) for tau in taus):
        return least - num_tokens
    return max(min(num_tokens, channels), least - num_tokens)


def absorb_scale(
    normalization: str, key: torch.Tensor, value: torch.Tensor, tau: float, appended: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (N, D) and values (N, D) which with tau = sqrt(N) give what `key` and `value` give with `tau`.

    Exact but for rounding to the dtype of `key` and `value`; bitwise the same where nothing has to change.

    Args:
        normalization: of the layer.
        key: (n, D)
        value: (n, D)
        tau: the layer's scale.
        appended: N - n, by `num_appended`.
    """
    num_tokens, channels = key.shape
    if normalization != "l2_gelu":
        if is_root(tau, num_tokens):
            return key, value
        factor = tau / num_tokens**0.5 if normalization == "gelu_l2" else tau**2 / num_tokens
        return key, (value.double() * factor).to(value.dtype)
    if not appended:
        return key, value
    total = num_tokens + appended
    enlarge = math.sqrt(max(total / tau**2 - 1, 0))
    triangle = key.double() if num_tokens <= channels else torch.linalg.qr(key.double(), mode="r").R
    more = key.new_zeros(appended, channels)
    if not is_root(tau, total):
        more[: len(triangle)] = enlarge * triangle
    return torch.cat([key, more]), torch.cat([value, value.new_zeros(appended, value.shape[1])])
