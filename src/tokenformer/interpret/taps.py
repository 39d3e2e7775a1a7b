"""The one place where a model is tapped: what a Pattention is given can be changed there, and seen.

Tapped is `Pattention.attend`, through which every call goes, those of PEFT's wrappers and of layers with a bias among
them, and which is given the segments that take part. Changes come first, in the order in which they were made; whoever
looks on sees what the layer computes after all of them, whether it began to look before or after.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from tokenformer.pattention import Pattention

# Keys (n, D_in) and values (n, D_out) of the tokens that take part, by segment.
Tokens = dict[str, tuple[torch.Tensor, torch.Tensor]]
# By segment, where a token exists.
Visible = Mapping[str, torch.Tensor]


@dataclass
class Call:
    """What one call of a Pattention computes with.

    Attributes:
        x: inputs (..., D_in).
        tokens: of the segments that take part.
        visible: as for `Pattention.forward`.
    """

    x: torch.Tensor
    tokens: Tokens
    visible: Visible | None


Edit = Callable[[Call], None]
See = Callable[[Call, torch.Tensor], None]


@dataclass
class _Tap:
    edits: list[Edit] = field(default_factory=list)
    seeing: list[See] = field(default_factory=list)


_TAPS: WeakKeyDictionary[Pattention, _Tap] = WeakKeyDictionary()


@contextmanager
def tapped(
    *, edits: Mapping[Pattention, Edit] | None = None, seeing: Mapping[Pattention, See] | None = None
) -> Iterator[None]:
    """Change what layers compute with, or look on, as long as the context lasts.

    Args:
        edits: by layer, called with each call before it is computed, to change it.
        seeing: by layer, called with each call and its output (..., D_out) afterwards.
    """
    edits, seeing = dict(edits or {}), dict(seeing or {})
    try:
        for layer, edit in edits.items():
            _tap(layer).edits.append(edit)
        for layer, see in seeing.items():
            _tap(layer).seeing.append(see)
        yield
    finally:
        for layer, edit in edits.items():
            _remove(_tap(layer).edits, edit)
        for layer, see in seeing.items():
            _remove(_tap(layer).seeing, see)
        for layer in {**edits, **seeing}:
            if not _TAPS[layer].edits and not _TAPS[layer].seeing:
                _untap(layer)


def _tap(layer: Pattention) -> _Tap:
    if layer not in _TAPS:
        _TAPS[layer] = _Tap()
        # On the instance: the layer is itself again as soon as the attribute is gone.
        layer.attend = partial(_attend, layer)  # type: ignore[method-assign]  # of this layer alone
    return _TAPS[layer]


def _untap(layer: Pattention) -> None:
    del _TAPS[layer]
    del layer.attend


def _remove(entries: list[Any], entry: Any) -> None:
    for i, other in enumerate(entries):
        if other is entry:
            del entries[i]
            return


# A compiled model leaves its graph here and runs the layer eagerly: what looks on may be any Python.
@torch.compiler.disable
def _attend(
    layer: Pattention, x: torch.Tensor, segments: Mapping[str, nn.Module], visible: Visible | None = None
) -> torch.Tensor:
    """In place of `Pattention.attend`."""
    tap = _TAPS[layer]
    plain = partial(type(layer).attend, layer)
    if not tap.edits and not tap.seeing:
        return plain(x, segments, visible)
    call = Call(x, {name: segment(x) for name, segment in segments.items()}, visible)
    for edit in tap.edits:
        edit(call)
    given: Any = {name: partial(_given, pair) for name, pair in call.tokens.items()}
    output: torch.Tensor = plain(x, given, call.visible)
    for see in tap.seeing:
        see(call, output)
    return output


def _given(pair: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pair
