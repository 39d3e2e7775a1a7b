"""A Transformer grown by widening it: what growing a TokenFormer by tokens is compared with.

A wider layer is made of copies: each of its units (a channel of the residual stream, a head, a neuron of the
feed-forward) stands for one of the old units. It reads what that unit reads, and what it sends on is divided by the
number of copies, so that what is read from all of them together is what was read before. That much Net2WiderNet (Chen,
Goodfellow and Shlens 2016) and HyperCloning (Samragh et al. 2024) share, and it leaves the function unchanged:

- the residual stream: k copies of every channel, one after the other. A layer norm of k copies of a vector is k copies
  of its layer norm, and of unequal numbers of copies it is not: hence whole multiples.
- a head: copied whole, with its query, key and value, so that rotary positions and the scale of attention stay.
- the logits: with a tied embedding, the product with k copies of the hidden state would be k times as large, and the
  embedding cannot be divided, as it is the input too. So the weight and the bias of the final layer norm are.

Copies that are equal get equal gradients and, but for rounding, stay equal: without noise, what is trained is still the
small model. It takes noise for the new parameters to be of use.

Shapes: D channels, H heads, F neurons of the feed-forward, V vocabulary.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from tokenformer.baselines.loading import load_transformer
from tokenformer.baselines.transformer import num_parameters
from tokenformer.errors import UserError
from tokenformer.folders import new_folder
from tokenformer.models.loading import copy_tokenizer, model_folder, quiet

Method = Literal["net2net", "hypercloning", "width"]

# What must not change: depth, vocabulary, and what a head and a block compute.
_SAME = (
    "vocab_size",
    "num_hidden_layers",
    "hidden_act",
    "use_parallel_residual",
    "layer_norm_eps",
    "attention_bias",
    "tie_word_embeddings",
    "rope_parameters",
)


def wider_config(
    config: GPTNeoXConfig, *, hidden_size: int | None = None, intermediate_size: int | None = None
) -> GPTNeoXConfig:
    """The configuration of a wider model: more heads of the same size, more neurons, all else as it is.

    Args:
        config: of the model to widen.
        hidden_size: channels afterwards, a multiple of the size of a head; as it is if not given.
        intermediate_size: neurons of the feed-forward afterwards; if not given, as many times more as channels.

    Raises:
        UserError: nothing to widen, a size that shrinks, or channels that make no whole heads.
    """
    if hidden_size is None and intermediate_size is None:
        raise UserError("nothing to widen: give hidden_size or intermediate_size after growing")
    head = config.hidden_size // config.num_attention_heads
    hidden = config.hidden_size if hidden_size is None else hidden_size
    if hidden % head:
        raise UserError(f"hidden_size {hidden} makes no whole heads of {head} channels: give a multiple of {head}")
    if intermediate_size is None:
        intermediate_size = config.intermediate_size * hidden // config.hidden_size
    wider = copy.deepcopy(config)
    wider.hidden_size, wider.num_attention_heads = hidden, hidden // head
    wider.intermediate_size = intermediate_size
    _check_sizes(config, wider)
    return wider


@torch.no_grad()
def widen(
    model: GPTNeoXForCausalLM,
    config: GPTNeoXConfig,
    *,
    method: Method,
    noise: float = 0.0,
    seed: int = 0,
) -> GPTNeoXForCausalLM:
    """A wider Transformer that begins from the weights of a smaller one.

    - `net2net`: heads and neurons beyond the old ones are copies of old ones drawn at random; the residual stream grows
      by whole multiples. Noise is added to what each copy but the first reads, so the logits change a little.
    - `hypercloning`: heads and neurons are copied in turn. Noise is added to what copies send on, such that it adds up
      to zero over the copies of a unit: the logits do not change, whatever the noise (10 dB in the paper, a noise of
      0.32). It does not reach a layer that reads from no copies.
    - `width`: the old weights stand in the corner of new, freshly initialised ones. The function is not kept, the loss
      jumps.

    Args:
        model: unchanged by this.
        config: of the wider model, as `wider_config` makes it.
        method: see above.
        noise: standard deviation, relative to the root mean square of the weights of each layer. With 0 the logits are
            unchanged and copies stay equal for ever; `width` has no copies and takes no noise.
        seed: of copies, noise and new weights.

    Returns:
        A new model of the same dtype, on the same device, in the same mode.

    Raises:
        UserError: not a GPTNeoX, nothing to widen, a size that shrinks, channels or heads that are no whole multiple
            of the old (`width` needs whole heads only), anything else that differs, a negative noise, an unknown
            method.
    """
    if method not in get_args(Method):
        raise UserError(f"unknown method '{method}': use one of {', '.join(get_args(Method))}")
    _check(model, config, method, noise)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wider = GPTNeoXForCausalLM(copy.deepcopy(config))
        nn.Module.to(wider, model.dtype)  # transformers' own `to` has lost its types
        if method == "width":
            _fill_corner(model, wider)
        else:
            _Widening(model.config, config, method, noise).fill(model, wider)
    wider.generation_config = copy.deepcopy(model.generation_config)
    nn.Module.to(wider, model.device)
    return wider.train(model.training)


def widen_folder(
    source: str,
    out: str,
    *,
    method: Method,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Widen the Transformer in a folder and write it to a new one, with its tokenizer.

    Args:
        source: folder of a GPTNeoX, such as a training run.
        out: folder to write; must not hold anything yet.
        method: net2net and hypercloning keep the function; width does not, and the loss jumps.
        hidden_size: channels afterwards; as they are if not given.
        intermediate_size: neurons of the feed-forward afterwards; as many times more as channels if not given.
        noise: on copies, relative to the weights; without it, copies stay equal for ever.
        seed: of copies, noise and new weights.

    Returns:
        `out`, and the parameters without embeddings `before` and `after`.

    Raises:
        UserError: as `widen` and `load_transformer`; a folder that is not empty. Nothing is written then.
    """
    with new_folder(Path(out)) as partial:
        small = load_transformer(source)
        config = wider_config(small.config, hidden_size=hidden_size, intermediate_size=intermediate_size)
        wider = widen(small, config, method=method, noise=noise, seed=seed)
        with quiet():
            wider.save_pretrained(partial)
        copy_tokenizer(model_folder(source), partial)
    return {"out": out, "before": num_parameters(small), "after": num_parameters(wider)}


def _check_sizes(old: GPTNeoXConfig, new: GPTNeoXConfig) -> None:
    sizes = [(name, getattr(old, name), getattr(new, name)) for name in ("hidden_size", "intermediate_size")]
    for name, before, after in sizes:
        if after < before:
            raise UserError(f"{name}={after} is less than the {before} there are: widening cannot shrink")
    if all(before == after for _, before, after in sizes):
        raise UserError(
            f"nothing to widen: hidden_size is {old.hidden_size} and intermediate_size {old.intermediate_size} already"
        )


def _check(model: Any, config: Any, method: Method, noise: float) -> None:
    """Raises what `widen` raises, before anything is computed."""
    if not isinstance(model, GPTNeoXForCausalLM) or not isinstance(config, GPTNeoXConfig):
        raise UserError(
            f"only a GPTNeoXForCausalLM can be widened, to a GPTNeoXConfig: got {type(model).__name__} and "
            f"{type(config).__name__}"
        )
    old = model.config
    _check_sizes(old, config)
    for name in _SAME:
        if (before := getattr(old, name)) != (after := getattr(config, name)):
            raise UserError(f"{name} is {before} in the model and {after} in the wider one: widening keeps it")
    if config.hidden_size * old.num_attention_heads != config.num_attention_heads * old.hidden_size:
        raise UserError(
            f"heads of {old.hidden_size // old.num_attention_heads} channels are to keep their size: hidden_size "
            f"{config.hidden_size} with {config.num_attention_heads} heads does not"
        )
    if method != "width" and config.hidden_size % old.hidden_size:
        raise UserError(
            f"hidden_size {config.hidden_size} is no whole multiple of {old.hidden_size}, which {method} needs to keep "
            f"the layer norms: give {-(-config.hidden_size // old.hidden_size) * old.hidden_size}"
        )
    if not 0 <= noise < math.inf:
        raise UserError(f"noise must be at least 0 and finite, got {noise}")
    if noise and method == "width":
        raise UserError(f"noise {noise}: width makes no copies that it could be added to, so leave it out")


def _fill_corner(small: GPTNeoXForCausalLM, wider: GPTNeoXForCausalLM) -> None:
    """Old weights at the beginning of every dimension; old heads come first in the fused projection."""
    old = dict(small.named_parameters())
    for name, parameter in wider.named_parameters():
        parameter[tuple(slice(size) for size in old[name].shape)] = old[name].to(parameter.device)


@dataclass(frozen=True)
class _Copies:
    """Which old unit each new one is a copy of. The old units come first, as the first copy of themselves.

    Attributes:
        source: (new,), the old unit.
        old: number of old units.
    """

    source: torch.Tensor
    old: int

    @classmethod
    def in_turn(cls, old: int, new: int) -> "_Copies":
        """0, 1, ..., old - 1, 0, 1, ..."""
        return cls(torch.arange(new) % old, old)

    @classmethod
    def at_random(cls, old: int, new: int) -> "_Copies":
        """0, 1, ..., old - 1, then old ones drawn at random with replacement (Net2WiderNet)."""
        return cls(torch.cat([torch.arange(old), torch.randint(old, (new - old,))]), old)

    def blocks(self, size: int) -> "_Copies":
        """Copies of units that each consist of `size` smaller ones, one after the other."""
        return _Copies((self.source[:, None] * size + torch.arange(size)).flatten(), self.old * size)

    @property
    def numbers(self) -> torch.Tensor:
        """(new,): how many copies there are of the unit that each new one is a copy of."""
        return torch.bincount(self.source, minlength=self.old)[self.source]


class _Widening:
    """Which units of a wider model are copies of which, and how weights are made of that.

    Args:
        old: configuration of the small model.
        new: of the wider one.
        method: `net2net` or `hypercloning`.
        noise: relative to the weights of a layer.
    """

    def __init__(self, old: GPTNeoXConfig, new: GPTNeoXConfig, method: Method, noise: float) -> None:
        choose: Callable[[int, int], _Copies] = _Copies.at_random if method == "net2net" else _Copies.in_turn
        self.layers = [
            (
                choose(old.num_attention_heads, new.num_attention_heads),
                choose(old.intermediate_size, new.intermediate_size),
            )
            for _ in range(old.num_hidden_layers)
        ]
        self.channels = _Copies.in_turn(old.hidden_size, new.hidden_size)
        self.words = _Copies.in_turn(old.vocab_size, new.vocab_size)
        self.head_size = old.hidden_size // old.num_attention_heads
        self.tied = old.tie_word_embeddings
        self.method, self.noise = method, noise

    def fill(self, small: Any, wider: Any) -> None:  # GPTNeoXForCausalLM, whose layers have no types
        """Give every parameter of `wider` its value."""
        channels = self.channels
        # Read as a layer from words, of which there is one copy each, to channels.
        wider.gpt_neox.embed_in.weight.copy_(self._weight(small.gpt_neox.embed_in.weight.T, channels, self.words).T)
        for before, after, (heads, neurons) in zip(
            small.gpt_neox.layers, wider.gpt_neox.layers, self.layers, strict=True
        ):
            mixed = heads.blocks(self.head_size)
            # Fused as (head, query / key / value, channel of the head).
            fused = heads.blocks(3 * self.head_size)
            self._linear(before.attention.query_key_value, after.attention.query_key_value, fused, channels)
            self._linear(before.attention.dense, after.attention.dense, channels, mixed)
            self._linear(before.mlp.dense_h_to_4h, after.mlp.dense_h_to_4h, neurons, channels)
            self._linear(before.mlp.dense_4h_to_h, after.mlp.dense_4h_to_h, channels, neurons)
            self._norm(before.input_layernorm, after.input_layernorm)
            self._norm(before.post_attention_layernorm, after.post_attention_layernorm)
        final = wider.gpt_neox.final_layer_norm
        self._norm(small.gpt_neox.final_layer_norm, final)
        if self.tied:
            final.weight.div_(channels.numbers)
            final.bias.div_(channels.numbers)
        else:
            self._linear(small.lm_head, wider.lm_head, self.words, channels)

    def _norm(self, before: nn.LayerNorm, after: nn.LayerNorm) -> None:
        after.weight.copy_(before.weight[self.channels.source])
        after.bias.copy_(before.bias[self.channels.source])

    def _linear(self, before: nn.Linear, after: nn.Linear, rows: _Copies, columns: _Copies) -> None:
        after.weight.copy_(self._weight(before.weight, rows, columns))
        if before.bias is not None:
            after.bias.copy_(before.bias[rows.source])

    def _weight(self, old: torch.Tensor, rows: _Copies, columns: _Copies) -> torch.Tensor:
        """A weight (out, in) whose rows are copies, and whose columns share what they send on."""
        weight = old.cpu()[rows.source][:, columns.source] / columns.numbers
        if not self.noise:
            return weight
        noise = torch.randn_like(weight) * (self.noise * weight.square().mean().sqrt())
        if self.method == "net2net":
            noise[: rows.old] = 0
        else:
            sums = torch.zeros_like(noise[:, : columns.old]).index_add_(1, columns.source, noise)
            noise -= sums[:, columns.source] / columns.numbers
            # Taking away the mean of c copies takes 1 / c of the variance, and all of it where there is one copy.
            noise *= (columns.numbers / (columns.numbers - 1).clamp(min=1)).sqrt()
        return weight + noise
