"""Parameter tokens that compute what a linear map or a feed-forward of a Transformer computes, from the weights alone.

Two facts carry this. They hold for every activation f with f(z) - f(-z) = z: gelu, its tanh form, silu, relu.

1. *Pairs are linear.* The tokens (k, w) and (-k, -w) add f(z) w - f(-z) w = z w, where z = tau k.x / ||A||. With an
   orthonormal basis of the D channels as keys, each twice with both signs and divided by sqrt(2), ||A|| = ||x||. So 2 D
   tokens are any linear map of x, up to the norm of x; and that norm is sqrt(D) behind a layer norm without weight and
   bias (but for its epsilon), where the map is therefore exact.
2. *The norm of scores can be made constant.* Let l be the largest eigenvalue of K^T K. Tokens with values of zero and
   keys E such that E^T E = l I - K^T K add nothing to the output, and ||A|| becomes sqrt(l) ||x||. With tau = sqrt(l D)
   the neurons of a Transformer's feed-forward then score tau k.x / ||A|| = k.x behind a layer norm: exact as well.

A bias is carried by the even part g(z) = f(z) - z / 2: the pairs (k, w + u), (-k, -w + u) add 2 g(z) u, and the sum of
g over all pairs hardly depends on x, because that of z^2 does not. Biases in front of the activation of a feed-forward
have no place in a Pattention.

Shapes: D channels, N parameter tokens, F neurons.
"""

import math
from typing import NamedTuple, cast

import numpy as np
import torch

from tokenformer.convert.pretrained import Affine
from tokenformer.ops.activations import Activation
from tokenformer.pattention import BASE, ParameterTokens, Pattention

# Typical score of a single token, where a new layer has 1 (tau = sqrt(N)). For a small z, f(z) is nearly linear, so
# that single tokens come close too; a still smaller one asks for values so large that training would hardly move them.
SCORE = 0.1


class Tokens(NamedTuple):
    """Parameter tokens of one layer.

    Attributes:
        key: (N, D)
        value: (N, channels of the output)
        scale: tau.
    """

    key: torch.Tensor
    value: torch.Tensor
    scale: float

    @torch.no_grad()
    def write(self, layer: Pattention) -> None:
        """Put them into a layer of one segment. Tokens that nothing was found for get zero keys and keep their values.

        A token whose key and value are both zero would never receive a gradient.
        """
        segment = only_segment(layer)
        used = len(self.key)
        segment.key.zero_()
        segment.key[:used] = self.key.to(segment.key.dtype)
        segment.value[:used] = self.value.to(segment.value.dtype)
        layer.scale.fill_(self.scale)


def linear_tokens(affine: Affine, num_tokens: int, activation: Activation, *, input_norm: float) -> Tokens:
    """At most `num_tokens` tokens that are `affine` for inputs of norm `input_norm`.

    The directions are the right singular vectors of the weight, strongest first. With 2 D tokens all of them are pairs;
    with fewer the weaker ones have a single token, which adds an even part of its own to the linear one and carries no
    bias; with fewer than D the weakest are left out.

    Args:
        affine: the map.
        num_tokens: N.
        activation: f.
        input_norm: that the inputs have, or have typically.
    """
    weight, bias = affine.weight.double(), affine.bias.double()
    channels = weight.shape[1]
    directions = torch.linalg.svd(weight).Vh[:num_tokens]
    single = len(directions)
    pairs = min(num_tokens - single, single)
    scale = SCORE * math.sqrt(single + pairs)
    # Directions that are left out are missing in the norm of the scores as well.
    score = scale / (input_norm * math.sqrt(single / channels))
    mapped = directions @ weight.T / score

    keys = directions.clone()
    keys[:pairs] /= math.sqrt(2)
    values = 2 * mapped
    values[:pairs] = math.sqrt(2) * mapped[:pairs]
    mirrored = -values[:pairs]
    if pairs:
        even = bias / (2 * pairs * mean_even_part(activation, scale / math.sqrt(2 * single)))
        values[:pairs] += even
        mirrored += even
    return Tokens(torch.cat((keys, -keys[:pairs])), torch.cat((values, mirrored)), scale)


def feedforward_tokens(inner: Affine, outer: Affine, num_tokens: int) -> Tokens:
    """At most `num_tokens` tokens that are `outer` of the activated `inner`, without biases, behind a layer norm.

    The first F are the neurons; more make the norm of the scores a constant, for which F + D - 2 are enough. Fewer than
    F leave out the neurons of least weight.

    Args:
        inner: to the neurons, with rows of mean zero as `Affine.after_norm` makes them.
        outer: from the neurons.
        num_tokens: N.
    """
    keys, values = inner.weight.double(), outer.weight.double().T
    if num_tokens < len(keys):
        kept = (keys.norm(dim=1) * values.norm(dim=1)).topk(num_tokens).indices.sort().values
        keys, values = keys[kept], values[kept]
    channels = keys.shape[1]
    gram = keys.T @ keys
    largest = torch.linalg.eigvalsh(gram)[-1]
    # Nothing is missing along (1, ..., 1): the outputs of a layer norm have mean zero.
    powers, directions = torch.linalg.eigh(gram + largest / channels)
    missing = (largest - powers).clamp_min(0)[: min(num_tokens - len(keys), channels - 2)]
    keys = torch.cat((keys, missing.sqrt()[:, None] * directions.T[: len(missing)]))
    values = torch.cat((values, values.new_zeros(len(missing), values.shape[1])))
    # The mean square over the directions of mean zero; all of them, once nothing is missing any more.
    return Tokens(keys, values, math.sqrt(keys.square().sum() * channels / (channels - 1)))


def only_segment(layer: Pattention) -> ParameterTokens:
    """The one segment of a layer that nobody has grown."""
    assert list(layer.segments) == [BASE]
    return cast(ParameterTokens, layer.segments[BASE])


def mean_even_part(activation: Activation, rms: float) -> float:
    """The mean of f(z) - z / 2 over normally distributed z with mean 0 and standard deviation `rms`."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    z = rms * torch.from_numpy(nodes)
    even = (activation(z) - z / 2) * torch.from_numpy(weights / weights.sum())
    return float(even.sum())
