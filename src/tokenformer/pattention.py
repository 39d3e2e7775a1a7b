"""Pattention as a layer: an ordered set of named segments of parameter tokens (TokenFormer, Eq. 4).

A drop-in for a bias-free `nn.Linear`. Its segments are separate parameters, so freezing, learning rates, optimizer
state and saving per segment need no machinery of their own.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from tokenformer.errors import UserError
from tokenformer.ops import Backend, get_activation, get_normalization, pattention
from tokenformer.ops.activations import Activation

BASE = "base"


def check_segment_name(name: object) -> None:
    """Refuse what cannot name a segment: it becomes part of parameter names and an attribute of an `nn.ModuleDict`.

    Raises:
        UserError: not an identifier, or a name that `nn.ModuleDict` uses itself (`keys`, `type`, ...).
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise UserError(f"segment name {name!r} must be letters, digits and underscores, not starting with a digit")
    if hasattr(nn.ModuleDict(), name):
        raise UserError(f"segment name '{name}' is reserved by torch.nn.ModuleDict: choose another name")


class ParameterTokens(nn.Module):
    """One segment: `num_tokens` key-value pairs.

    A module that is called with the input and returns its parameters, rather than a pair of bare parameters: PEFT
    (LoRA on `segments.base.key`), hooks and wrappers then reach it like any layer.

    Attributes:
        key: (num_tokens, in_features)
        value: (num_tokens, out_features)
        limit: how many tokens take part, from the first; None for all, 0 as if the segment were not there. Not saved.
        gain: factor of the values: how loudly the segment speaks. Not saved.
    """

    limit: int | None
    gain: float

    def __init__(
        self,
        num_tokens: int,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, count in (("num_tokens", num_tokens), ("in_features", in_features), ("out_features", out_features)):
            if count < 1:
                raise UserError(f"{name} must be at least 1, got {count}")
        self.key = nn.Parameter(torch.empty(num_tokens, in_features, device=device, dtype=dtype))
        self.value = nn.Parameter(torch.empty(num_tokens, out_features, device=device, dtype=dtype))
        self.limit, self.gain = None, 1.0
        self.reset_parameters()

    @property
    def num_tokens(self) -> int:
        """Number of key-value pairs."""
        return self.key.shape[0]

    def reset_parameters(self) -> None:
        """Keys normal(0, 0.02) as published; values so that a row of unit weights gives outputs of unit variance.

        Models follow the published initialisation of values instead (`TokenFormerPreTrainedModel._init_weights`).
        """
        nn.init.normal_(self.key, std=0.02)
        nn.init.normal_(self.value, std=self.num_tokens**-0.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (n, in_features) and values (n, out_features) for input `x`, of the n tokens that take part."""
        key: torch.Tensor = self.key
        value: torch.Tensor = self.value
        if self.limit is not None:
            key, value = key[: self.limit], value[: self.limit]
        return key, value if self.gain == 1 else value * self.gain

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return f"num_tokens={self.num_tokens}"


class AdapterTokens(ParameterTokens):
    """A segment that is no part of the model: it stays out of `state_dict`, and so out of what the model saves.

    `tokenformer.tuning` adds, loads and saves such segments.

    Attributes:
        selected: whether it is to take part where adapters are not disabled. Not saved.
    """

    selected = False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Write nothing."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """Look for nothing, so that what is in memory stays."""


class Pattention(nn.Module):
    """Attention of inputs (..., in_features) over parameter tokens, giving (..., out_features).

    Args:
        in_features: channels of the input and of keys.
        out_features: channels of the output and of values.
        num_tokens: parameter tokens of the first segment, `base`.
        normalization: `l2_gelu` (the paper's), `gelu_l2`, `gelu_l1` or `softmax`.
        activation: by name or as a callable.
        scale: tau; sqrt(num_tokens) if not given. Stored state: it does not change when tokens are added or removed,
            which is what makes growing exact.
        eps: added to the sum of squares of the scores of a row.
        device: of the parameters; `meta` allocates nothing.
        dtype: of the parameters. `scale` stays float32 or better.

    Attributes:
        segments: `nn.ModuleDict` of `ParameterTokens` in the order in which they were added.
        scale: tau, a scalar buffer.
        kind: what the layer is for in its model (`qkv`, `output`, `ffn`); set by the model, read by `tokenformer.grow`.
        recompute: keep the scores alone for the backward pass, which makes the weights from them again. Not saved.
        backend: of `tokenformer.ops.pattention`. Not saved.

    Raises:
        UserError: a count below 1, an unknown normalization or activation, a scale that is not positive and finite.
    """

    scale: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_tokens: int,
        *,
        normalization: str = "l2_gelu",
        activation: str | Activation = "gelu",
        scale: float | None = None,
        eps: float = 1e-12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        get_normalization(normalization)
        get_activation(activation)
        if scale is not None and not 0 < scale < math.inf:
            raise UserError(f"scale must be positive and finite, got {scale}")
        self.in_features = in_features
        self.out_features = out_features
        self.normalization = normalization
        self.activation = activation
        self.eps = eps
        self.kind: str | None = None
        self.recompute = False
        self.backend: Backend = "auto"
        base = ParameterTokens(num_tokens, in_features, out_features, device=device, dtype=dtype)
        self.segments = nn.ModuleDict({BASE: base})
        self.initial_scale = float(num_tokens**0.5 if scale is None else scale)
        scale_dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.register_buffer("scale", torch.full((), self.initial_scale, device=device, dtype=scale_dtype))

    @property
    def num_tokens(self) -> int:
        """Parameter tokens of all segments together."""
        return sum(segment.num_tokens for segment in self._segments())

    @property
    def adapters(self) -> list[str]:
        """Names of the segments that are adapters."""
        names = zip(self.segments, self._segments(), strict=True)
        return [name for name, segment in names if isinstance(segment, AdapterTokens)]

    def reset_parameters(self) -> None:
        """Initialise every segment and set the scale to what the constructor was given."""
        for segment in self._segments():
            segment.reset_parameters()
        with torch.no_grad():
            self.scale.fill_(self.initial_scale)

    def forward(self, x: torch.Tensor, visible: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Pattention of `x` (..., in_features) over all segments, as (..., out_features).

        Args:
            x: inputs.
            visible: by segment name, booleans broadcastable to (..., tokens of that segment): where False, the token
                does not exist for that input. Segments not named are visible to all; names that this layer does not
                have are passed over, so that one mapping serves all layers of a model.

        Raises:
            UserError: no segment takes part.
        """
        return self.attend(x, dict(self.segments.items()), visible)

    def attend(
        self, x: torch.Tensor, segments: Mapping[str, nn.Module], visible: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """As `forward`, over `segments` by name instead of those of the layer; what wraps a layer adds its own."""
        taking_part = {}
        for name, segment in segments.items():
            key, value = segment(x)
            if len(key):
                taking_part[name] = key, value
        if not taking_part:
            raise UserError(f"no parameter token takes part: each of {', '.join(segments)} has the limit 0")
        keys, values = zip(*taking_part.values(), strict=True)
        masks = None
        if visible is not None:
            masks = [
                None if (mask := visible.get(name)) is None else mask[..., : len(key)]
                for name, (key, _) in taking_part.items()
            ]
        return pattention(
            x,
            keys,
            values,
            self.scale,
            normalization=self.normalization,
            activation=self.activation,
            eps=self.eps,
            visible=masks,
            backend=self.backend,
            recompute=self.recompute,
        )

    def add_segment(self, name: str, num_tokens: int, *, adapter: bool = False) -> ParameterTokens:
        """Append a segment of `num_tokens` tokens, initialised like a new layer's; the scale stays.

        The new parameters take device and dtype of the old ones. `tokenformer.grow` adds segments to whole models.

        Args:
            name: of the segment.
            num_tokens: in it.
            adapter: make it one that the model does not save (`AdapterTokens`).

        Raises:
            UserError: the name is taken or not usable, or the count is below 1.
        """
        if name in self.segments:
            raise UserError(f"segment '{name}' exists already: choose another name")
        check_segment_name(name)
        like = self._segments()[-1].key
        kind = AdapterTokens if adapter else ParameterTokens
        segment = kind(num_tokens, self.in_features, self.out_features, device=like.device, dtype=like.dtype)
        self.segments[name] = segment
        return segment

    def remove_segment(self, name: str) -> ParameterTokens:
        """Take a segment out and return it; the scale stays.

        Raises:
            UserError: there is no such segment, or it is the only one.
        """
        if name not in self.segments:
            raise UserError(f"no segment '{name}': this layer has {', '.join(self.segments)}")
        if len(self.segments) == 1:
            raise UserError(f"segment '{name}' is the only one: a layer needs at least one")
        return cast(ParameterTokens, self.segments.pop(name))

    @torch.no_grad()
    def merge_segments(self, name: str = BASE) -> None:
        """Put all segments into one, in order: a re-arrangement, the function stays (up to the order of summation).

        Raises:
            UserError: the name is not usable, a segment is an adapter's or an adapter (LoRA) sits on one, or a segment
                has a limit or a gain.
        """
        check_segment_name(name)
        segments = self._segments()
        if adapters := self.adapters:
            raise UserError(f"'{adapters[0]}' is an adapter: merge it first (tokenformer.tuning.merge_adapter)")
        if any(segment is not wrapped for segment, wrapped in zip(segments, self.segments.values(), strict=True)):
            raise UserError("an adapter sits on a segment: merge it first (peft: merge_and_unload)")
        if any(segment.limit is not None or segment.gain != 1 for segment in segments):
            raise UserError("a segment takes part in part: take away its limit and gain before merging")
        if len(segments) == 1 and name in self.segments:
            return
        like = segments[0].key
        merged = ParameterTokens(
            self.num_tokens, self.in_features, self.out_features, device=like.device, dtype=like.dtype
        )
        merged.key.copy_(torch.cat([segment.key for segment in segments]))
        merged.value.copy_(torch.cat([segment.value for segment in segments]))
        merged.requires_grad_(any(p.requires_grad for segment in segments for p in segment.parameters()))
        self.segments = nn.ModuleDict({name: merged})

    def _segments(self) -> list[ParameterTokens]:
        # PEFT puts wrappers around a segment that carries LoRA.
        return [
            next(module for module in segment.modules() if isinstance(module, ParameterTokens))
            for segment in self.segments.values()
        ]

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_tokens={self.num_tokens}, "
            f"normalization={self.normalization}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Pattention":
        before = self.scale
        super()._apply(fn, recurse)
        if torch.finfo(self.scale.dtype).bits < 32:
            # .to(bfloat16) would round tau, a factor of every output, to three digits.
            self.scale = before.to(device=self.scale.device)
        return self
