"""Fit the tokens of a converted model to what the Transformer computes on text, one layer after the other.

Each layer sees what the converted model hands it, earlier errors included, and aims at what the Transformer has at
that place, so that errors are corrected on the way instead of adding up. Values are fitted by least squares, with keys
and tau kept; this also finds the biases that the closed form has no place for. Before that, the keys of a feed-forward
are fitted to the neurons: in GPT-NeoX they read what attention reads, in a TokenFormer what attention leaves.

Shapes: B rows, T positions, D channels, N parameter tokens, R = B T.
"""

import torch

from tokenformer.convert.closed_form import feedforward_tokens, linear_tokens, only_segment
from tokenformer.convert.pretrained import Affine, BlockStates, Pretrained, PretrainedBlock, mix_values
from tokenformer.models import TokenFormerForCausalLM
from tokenformer.modules import TokenFormerBlock
from tokenformer.ops import get_activation
from tokenformer.ops.fused import segment_activities
from tokenformer.ops.normalization import get_normalization
from tokenformer.pattention import Pattention

# Of the mean square of a feature, added to each: keeps what the text does not determine at the closed form.
RIDGE = 1e-3
_CHUNK = 4096


@torch.no_grad()
def fit(model: TokenFormerForCausalLM, pretrained: Pretrained, ids: torch.Tensor) -> None:
    """Fit `model`, which the closed form has initialised, on ids (B, T), in place."""
    target, hidden = pretrained.embed(ids), model.model.embed_tokens(ids)
    for block, layer in zip(pretrained.blocks, model.model.layers, strict=True):
        states = pretrained.run_block(block, target)
        hidden = _fit_block(layer, block, states, hidden, pretrained)
        target = states.after


def _fit_block(
    layer: TokenFormerBlock, block: PretrainedBlock, states: BlockStates, hidden: torch.Tensor, pretrained: Pretrained
) -> torch.Tensor:
    """Fit one block; returns what it leaves, (B, T, D)."""
    attention, config = layer.attention, layer.attention.config
    normed = layer.attention_norm(hidden)
    for name in ("query", "key", "value"):
        fit_values(getattr(attention, name), normed, getattr(states, name))
    mixed = mix_values(
        attention.query(normed),
        attention.key(normed),
        attention.value(normed),
        config.num_attention_heads,
        config.rotary_dim,
        pretrained.rope_theta,
    )
    # Pattention does not see the norm of its input: begin with the typical one.
    typical = mixed.norm(dim=-1).mean().item()
    activation = get_activation(config.activation)
    linear_tokens(block.output, attention.output.num_tokens, activation, input_norm=typical).write(attention.output)
    fit_values(attention.output, mixed, states.middle - hidden)
    hidden = hidden + attention.output(mixed)

    normed = layer.ffn_norm(hidden)
    inner = fit_affine(block.inner, normed, states.neurons)
    tokens = feedforward_tokens(inner, block.outer, layer.ffn.num_tokens)
    scores = normed @ tokens.key.to(normed.dtype).T
    tokens._replace(scale=scores.norm(dim=-1).median().item()).write(layer.ffn)
    fit_values(layer.ffn, normed, states.after - hidden)
    return hidden + layer.ffn(normed)


def fit_values(layer: Pattention, x: torch.Tensor, target: torch.Tensor) -> None:
    """Move the values of a layer of one segment, by least squares, to give `target` (B, T, D) for `x` (B, T, D)."""
    segment = only_segment(layer)
    features = torch.cat([_features(layer, rows) for rows in x.flatten(0, 1).split(_CHUNK)])
    missing = target.flatten(0, 1) - features @ segment.value
    segment.value.add_(_solve(features, missing))


def fit_affine(affine: Affine, x: torch.Tensor, target: torch.Tensor) -> Affine:
    """A weight that gives `target` (B, T, F) for `x` (B, T, D) without the bias, close to that of `affine`."""
    x, target = x.flatten(0, 1), target.flatten(0, 1)
    weight = affine.weight + _solve(x, target - x @ affine.weight.T).T
    return Affine(weight - weight.mean(-1, keepdim=True), affine.bias)


def _features(layer: Pattention, x: torch.Tensor) -> torch.Tensor:
    """The weights (R, N) that the layer gives its values."""
    segment = only_segment(layer)
    activities, total = segment_activities(
        x, segment.key, normalization=layer.normalization, activation=layer.activation
    )
    kind = get_normalization(layer.normalization)
    return kind.weights(activities, total, layer.scale, get_activation(layer.activation), layer.eps)


def _solve(features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The ridge solution X (N, D) of features (R, N) X = target (R, D)."""
    gram = features.new_zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    product = features.new_zeros(features.shape[1], target.shape[1], dtype=torch.float64)
    # In chunks: float64 copies of all rows would be the largest tensors of the conversion.
    for some, wanted in zip(features.split(_CHUNK), target.split(_CHUNK), strict=True):
        gram += some.double().T @ some.double()
        product += some.double().T @ wanted.double()
    ridge = RIDGE * gram.diagonal().mean()
    solution = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), product)
    return solution.to(features.dtype)
