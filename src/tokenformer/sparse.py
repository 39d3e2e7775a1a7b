"""Pattention that computes some of its tokens: those of the groups that a router chooses for the input.

With tau and the exact norm ||A|| of *all* scores, u = tau x / ||A|| holds everything a row decides: the weight of token
i is f(u k_i). A row of output is

    f(u K_g^T) V_g over the chosen groups g   +   up (down u) + bias

where the second part, the remainder, is the best map of low rank for what the tokens left out would have said. The norm
comes from the Gram identity ||x K^T||^2 = x (K^T K) x^T = ||R x||^2 with R the triangular factor of the keys' QR
decomposition, so no score of a token left out is needed, and half of R is zero.

Shapes: R rows (inputs), D_in and D_out channels, N tokens in G groups of S, k groups chosen.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from tokenformer.errors import UserError
from tokenformer.ops import get_activation
from tokenformer.ops.activations import Activation
from tokenformer.ops.products import linear
from tokenformer.pattention import BASE, ParameterTokens, Pattention

SIZES = ("num_tokens", "group_size", "active", "rank", "router_rank")
# The triangle is read in so many horizontal strips, each from its diagonal on: 9/16 of the square.
_STRIPS = 8
# The weighted sum of values is done in up to so many parts, because one part is the work of one thread.
_PARTS = 8


def norm_factor(key: torch.Tensor) -> torch.Tensor:
    """The upper triangular factor (min(N, D_in), D_in) with ||x K^T|| = ||x factor^T||, for keys (N, D_in)."""
    return cast(torch.Tensor, torch.linalg.qr(key.detach().double(), mode="r").R).to(key.dtype)


def triangle_elements(num_tokens: int, in_features: int) -> int:
    """Elements of the norm's factor that a decoding step reads."""
    rows = min(num_tokens, in_features)
    return sum((stop - start) * (in_features - start) for start, stop in _strips(rows))


def _strips(rows: int) -> list[tuple[int, int]]:
    edges = [rows * i // _STRIPS for i in range(_STRIPS + 1)]
    return [(start, stop) for start, stop in itertools.pairwise(edges) if stop > start]


class SparsePattention(nn.Module):
    """A Pattention (`l2_gelu`, one segment) of which each input computes `active` groups of tokens.

    Made from a trained layer by `tokenformer.sparsity.sparsify`, which orders the tokens, and fits router and
    remainder; a new one chooses at random and has no remainder.

    Args:
        in_features: channels of the input and of keys.
        out_features: channels of the output and of values.
        num_tokens: parameter tokens, a multiple of `group_size`.
        group_size: tokens that are computed together; they lie together in memory.
        active: groups that an input computes.
        rank: of the remainder; 0 leaves its bias.
        router_rank: channels through which the router sees the input.
        activation: by name or as a callable.
        eps: added to the sum of squares of the scores of a row.
        device: of the parameters.
        dtype: of the parameters. `scale` stays float32 or better.

    Attributes:
        key: (N, D_in), ordered by group.
        value: (N, D_out), likewise.
        factor: (min(N, D_in), D_in), upper triangular.
        router_down: (router_rank, D_in)
        router_up: (G, router_rank); the groups with the highest router_up (router_down u) + router_bias are computed.
        router_bias: (G,)
        down: (rank, D_in)
        up: (D_out, rank)
        bias: (D_out,)
        scale: tau, a scalar buffer.
        kind: as of the layer that this one stands for.

    Raises:
        UserError: sizes that do not fit together.
    """

    scale: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_tokens: int,
        *,
        group_size: int,
        active: int,
        rank: int,
        router_rank: int,
        activation: str | Activation = "gelu",
        eps: float = 1e-12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(num_tokens, group_size, active)
        for name, size in (("rank", rank), ("router_rank", router_rank)):
            if not 0 <= size <= in_features:
                raise UserError(f"{name} must lie between 0 and the {in_features} channels, got {size}")
        self.in_features, self.out_features = in_features, out_features
        self.num_tokens, self.group_size, self.active = num_tokens, group_size, active
        self.rank, self.router_rank = rank, router_rank
        self.activation, self.eps = activation, eps
        self.kind: str | None = None

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.key, self.value = empty(num_tokens, in_features), empty(num_tokens, out_features)
        self.factor = empty(min(num_tokens, in_features), in_features)
        self.router_down, self.router_up = empty(router_rank, in_features), empty(self.num_groups, router_rank)
        self.router_bias = empty(self.num_groups)
        self.down, self.up, self.bias = empty(rank, in_features), empty(out_features, rank), empty(out_features)
        scale_dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.register_buffer("scale", torch.full((), num_tokens**0.5, device=device, dtype=scale_dtype))
        self.reset_parameters()

    @property
    def num_groups(self) -> int:
        """Groups of tokens."""
        return self.num_tokens // self.group_size

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Keys and router at random, values so that unit weights give unit variance, no remainder."""
        nn.init.normal_(self.key, std=0.02)
        nn.init.normal_(self.value, std=self.num_tokens**-0.5)
        nn.init.normal_(self.router_down, std=self.in_features**-0.5)
        nn.init.normal_(self.router_up, std=1)
        for parameter in (self.router_bias, self.down, self.up, self.bias):
            parameter.zero_()
        if not self.key.is_meta:
            self.factor.copy_(norm_factor(self.key))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D_in) to (..., D_out); one row reads the memory of its groups only, several that of their union."""
        rows = x.reshape(-1, self.in_features)
        one = len(rows) == 1
        directions = self._directions(rows, one)
        chosen = self.choose(directions)
        shares = self._one_row(directions, chosen) if one else self._many_rows(directions, chosen)
        rest = linear(linear(directions, self.down), self.up) + self.bias if self.rank else self.bias
        return (shares + rest).view(*x.shape[:-1], self.out_features)

    def directions(self, x: torch.Tensor) -> torch.Tensor:
        """u = tau x / ||A|| (R, D_in), whose products with the keys are the normalised scores, for x (R, D_in)."""
        return self._directions(x, one=False)

    def choose(self, directions: torch.Tensor) -> torch.Tensor:
        """Groups (R, k) that rows compute."""
        preferences = linear(linear(directions, self.router_down), self.router_up) + self.router_bias
        return preferences.topk(self.active, dim=-1, sorted=False).indices

    def _directions(self, rows: torch.Tensor, one: bool) -> torch.Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        if one:
            parts = [
                linear(rows[:, start:], self.factor[start:stop, start:]).to(wide).square().sum(-1, keepdim=True)
                for start, stop in _strips(len(self.factor))
            ]
            total = torch.stack(parts).sum(0)
        else:
            total = F.linear(rows, self.factor).to(wide).square().sum(-1, keepdim=True)
        return (rows * (self.scale / torch.sqrt(total + self.eps))).to(rows.dtype)

    def _one_row(self, directions: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        tokens = (chosen[0][:, None] * self.group_size + torch.arange(self.group_size, device=chosen.device)).flatten()
        if torch.compiler.is_compiling():
            # Dot products in one loop with the look-up, which reads each chosen key once and writes none of them.
            wide = torch.promote_types(directions.dtype, torch.float32)
            groups = self.key.view(self.num_groups, self.group_size, -1)[chosen[0]]
            row = directions.contiguous().as_strided((self.in_features,), (1,))
            scores = (row.to(wide) * groups.to(wide)).sum(-1)
        else:
            scores = linear(directions, self.key.index_select(0, tokens))
        weights = get_activation(self.activation)(scores).to(self.value.dtype)
        # Not a matrix product, which would copy the chosen values first.
        parts = (math.gcd(len(tokens), _PARTS), -1)
        sums = F.embedding_bag(tokens.view(parts), self.value, per_sample_weights=weights.reshape(parts), mode="sum")
        return sums.sum(0, keepdim=True)

    def _many_rows(self, directions: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        takes = torch.zeros(len(directions), self.num_groups, dtype=torch.bool, device=directions.device)
        takes.scatter_(1, chosen, True)
        key: torch.Tensor = self.key
        value: torch.Tensor = self.value
        # Compiled, shapes must not depend on the choice; and copying most of the tokens costs more than it saves.
        if not torch.compiler.is_compiling() and len(directions) * self.active < self.num_groups:
            union = takes.any(0).nonzero().squeeze(1)
            takes = takes[:, union]
            tokens = (union[:, None] * self.group_size + torch.arange(self.group_size, device=union.device)).flatten()
            key, value = key[tokens], value[tokens]
        weights = get_activation(self.activation)(F.linear(directions, key))
        weights = weights.view(len(directions), -1, self.group_size) * takes[..., None]
        return F.linear(weights.flatten(1), value.T)

    def elements_read(self) -> dict[str, int]:
        """Elements of weights that one input reads: `tokens`, `norm`, `router`, `remainder`."""
        channels = self.in_features + self.out_features
        return {
            "tokens": self.active * self.group_size * channels,
            "norm": triangle_elements(self.num_tokens, self.in_features),
            "router": self.router_rank * self.in_features + self.num_groups * (self.router_rank + 1),
            "remainder": self.rank * channels + self.out_features,
        }

    def sizes(self) -> dict[str, int]:
        """What the configuration says of this layer."""
        return {name: getattr(self, name) for name in SIZES}

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_tokens={self.num_tokens}, "
            f"active={self.active} of {self.num_groups} groups of {self.group_size}, rank={self.rank}, "
            f"router_rank={self.router_rank}"
        )

    # tau is a factor of every output: as a Pattention does, keep it out of .to(bfloat16).
    def _apply(self, fn: Any, recurse: bool = True) -> "SparsePattention":
        before = self.scale
        super()._apply(fn, recurse)
        if torch.finfo(self.scale.dtype).bits < 32:
            self.scale = before.to(device=self.scale.device)
        return self


def _check_sizes(num_tokens: int, group_size: int, active: int) -> None:
    if group_size < 1 or num_tokens < 1 or num_tokens % group_size:
        raise UserError(f"groups of {group_size} tokens do not divide {num_tokens} tokens")
    if not 1 <= active <= num_tokens // group_size:
        raise UserError(f"active must lie between 1 and the {num_tokens // group_size} groups, got {active}")


def sparse_like(dense: Pattention, *, group_size: int, active: int, rank: int, router_rank: int) -> SparsePattention:
    """An unfitted sparse layer of the sizes, activation, scale, device and dtype of a dense one."""
    like = next(iter(dense.parameters()))
    sparse = SparsePattention(
        dense.in_features,
        dense.out_features,
        dense.num_tokens,
        group_size=group_size,
        active=active,
        rank=rank,
        router_rank=router_rank,
        activation=dense.activation,
        eps=dense.eps,
        device=like.device,
        dtype=like.dtype,
    )
    sparse.scale = dense.scale.clone()
    sparse.kind = dense.kind
    return sparse


def apply_sparsity(model: nn.Module, description: Mapping[str, Mapping[str, int]]) -> None:
    """Put unfitted sparse layers where a configuration says that they are, so that weights can be loaded.

    Args:
        model: with a dense Pattention everywhere.
        description: by the name of a layer in `model`, whole numbers for the names of `SIZES`.

    Raises:
        UserError: a layer that does not exist, other sizes than these, or sizes that do not fit.
    """
    for name, sizes in description.items():
        if (
            not isinstance(sizes, Mapping)
            or set(sizes) != set(SIZES)
            or any(type(n) is not int for n in sizes.values())
        ):
            raise UserError(f"sparsity of {name}: give whole numbers for {', '.join(SIZES)}, got {sizes}")
        try:
            dense = model.get_submodule(name)
        except AttributeError:
            dense = None
        if not isinstance(dense, Pattention):
            raise UserError(f"sparsity of {name}: the model has no such Pattention layer")
        if sizes["num_tokens"] != dense.num_tokens:
            raise UserError(f"sparsity of {name}: it has {dense.num_tokens} tokens, not {sizes['num_tokens']}")
        sizes = {key: value for key, value in sizes.items() if key != "num_tokens"}
        try:
            model.set_submodule(name, sparse_like(dense, **sizes))
        except UserError as error:
            raise UserError(f"sparsity of {name}: {error}") from error


def dense_like(sparse: SparsePattention) -> Pattention:
    """The Pattention with all tokens of a sparse layer, in its order: what it was made from, but for the order."""
    dense = Pattention(
        sparse.in_features,
        sparse.out_features,
        sparse.num_tokens,
        activation=sparse.activation,
        eps=sparse.eps,
        device=sparse.key.device,
        dtype=sparse.key.dtype,
    )
    base = cast(ParameterTokens, dense.segments[BASE])
    base.key, base.value = sparse.key, sparse.value
    dense.scale = sparse.scale.clone()
    dense.kind = sparse.kind
    return dense


def sparse_layers(model: nn.Module) -> dict[str, SparsePattention]:
    """The sparse layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparsePattention)}


def refuse_sparse(model: nn.Module, verb: str) -> None:
    """Say that a sparse model has to be dense first.

    Raises:
        UserError: it has sparse layers, whose router and remainder belong to the tokens that they have now.
    """
    if sparse_layers(model):
        raise UserError(f"the model is sparse and cannot be {verb}: make it dense first (tokenformer.sparsity.densify)")
