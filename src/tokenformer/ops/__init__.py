"""Pattention as functions: attention of inputs over learned key-value parameter tokens.

`pattention` is the one entry. `reference.py` states the equation, `fused.py` computes it fast, `gram.py` gives the norm
of scores that are not computed, `normalization.py` holds what the two phases of each normalisation are. On request,
`triton_kernels.py` computes what lies between the products.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

import torch

from tokenformer.errors import UserError
from tokenformer.ops.activations import Activation, get_activation
from tokenformer.ops.fused import fused_segments, segment_activities, segment_output
from tokenformer.ops.gram import gram_factor, gram_matrix, sum_of_squares
from tokenformer.ops.normalization import NORMALIZATIONS, get_normalization
from tokenformer.ops.reference import reference_pattention, reference_segments

__all__ = [
    "NORMALIZATIONS",
    "get_activation",
    "get_normalization",
    "gram_factor",
    "gram_matrix",
    "pattention",
    "reference_pattention",
    "segment_activities",
    "segment_output",
    "sum_of_squares",
]

Backend = Literal["auto", "fused", "reference", "triton"]

_HAS_TRITON = find_spec("triton") is not None
_TRITON: dict[str, Callable[..., torch.Tensor]] = {}


def pattention(
    x: torch.Tensor,
    keys: torch.Tensor | Sequence[torch.Tensor],
    values: torch.Tensor | Sequence[torch.Tensor],
    scale: torch.Tensor | float,
    *,
    normalization: str = "l2_gelu",
    activation: str | Activation = "gelu",
    eps: float = 1e-12,
    visible: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    total: torch.Tensor | None = None,
    backend: Backend = "auto",
    recompute: bool = False,
) -> torch.Tensor:
    """Pattention(x, K, V) = f(tau * A / ||A||) V with A = x K^T (TokenFormer, Eq. 4).

    Args:
        x: inputs, (..., D_in).
        keys: (N, D_in), or one such tensor per segment.
        values: (N, D_out), or one such tensor per segment.
        scale: tau, a scalar; sqrt(N) where the paper trains from scratch, kept when tokens are appended.
        normalization: `l2_gelu` f(tau A/||A||), `gelu_l2` tau f(A)/||f(A)||, `gelu_l1` tau^2 f(A)/||f(A)||_1, or
            `softmax` tau^2 softmax(A).
        activation: f, by name or as a callable; ignored by `softmax`.
        eps: added to the sum of squares under the root, or of magnitudes; rows of zeros give zeros.
        visible: booleans broadcastable to (..., N), one per segment where `keys` is a sequence (None: all visible).
            A token adds nothing, to norm or output, where it is False.
        total: row total (..., 1) over a larger set of tokens, of which the given ones are a part (fused only):
            the sum of squares, of magnitudes for `gelu_l1`, or the log-sum-exp for `softmax`.
        backend: `fused`, `reference`, `auto` (fused), or `triton`: kernels for `l2_gelu` with `gelu` that were
            checked by Triton's interpreter and never run on a GPU.
        recompute: keep the scores alone for the backward pass, which makes the weights again (fused only; results and
            gradients are the same).

    Returns:
        (..., D_out), in the dtype of the products.

    Raises:
        UserError: unknown normalization or activation, or Triton is asked for and not installed.
        ValueError: unknown backend, `total` given to the reference, or what Triton's kernels do not compute.
    """
    if isinstance(keys, torch.Tensor):
        keys = [keys]
    if isinstance(values, torch.Tensor):
        values = [values]
    if isinstance(visible, torch.Tensor):
        visible = [visible]
    if backend in ("auto", "fused"):
        return fused_segments(
            x,
            keys,
            values,
            scale,
            visible,
            normalization=normalization,
            activation=activation,
            eps=eps,
            total=total,
            recompute=recompute,
        )
    if backend == "triton":
        if not _HAS_TRITON:
            raise UserError("backend 'triton' needs Triton, which torch for CUDA brings along: use backend='fused'")
        return _triton_segments()(
            x, keys, values, scale, visible, normalization=normalization, activation=activation, eps=eps, total=total
        )
    if backend != "reference":
        raise ValueError(f"unknown backend '{backend}': use auto, fused, reference or triton")
    if total is not None:
        raise ValueError("the reference computes its own total: use backend='fused' with total=")
    get_normalization(normalization)
    return reference_segments(
        x, keys, values, scale, visible, normalization=normalization, activation=activation, eps=eps
    )


def _triton_segments() -> Callable[..., torch.Tensor]:
    # Not an import statement: what `export-hub` copies must not ask for Triton. Kept, because the compiler does not
    # follow this import: a graph breaks here if nothing called the kernels before.
    if "segments" not in _TRITON:
        _TRITON["segments"] = import_module("tokenformer.ops.triton_kernels").triton_segments
    return _TRITON["segments"]
