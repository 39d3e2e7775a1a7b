"""The next-token loss without the logits of a whole batch: torch's own, which makes those of a few positions at a time.

Shapes: R positions, D channels, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tokenformer.errors import UserError

# At most so many at a time, 32 MiB in float32. Torch's own choice, 8 positions of the paper's 150M shape, takes a CPU
# four times as long.
_LOGITS = 2**23


def fused_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Mean cross-entropy in nats of the logits `hidden weight^T`, a chunk of positions at a time.

    The gradients are made beside the loss, while the logits of a chunk are there. On a CPU the products are in float32
    or better, also under autocast: torch's chunks are that there, whatever they are given. Elsewhere they follow
    autocast.

    Args:
        hidden: (R, D).
        weight: (V, D).
        labels: (R,)
        num_items_in_batch: divisor of the sum; the number of labels that count if not given.
        ignore_index: a label that does not count.

    Raises:
        UserError: torch is too old.
    """
    require_fused_loss()
    dtype = _dtype_of_products(hidden)
    # torch returns the loss in the dtype of the products: of 16 bits, the sum would keep three digits, and the losses
    # of single positions are rounded before they are summed. The backward pass then repeats one of the products.
    reduction = "sum" if dtype.itemsize >= 4 else "none"
    with torch.autocast(hidden.device.type, enabled=False):
        loss = F.linear_cross_entropy(
            hidden.to(dtype),
            weight.to(dtype),
            labels,
            reduction=reduction,
            ignore_index=ignore_index,
            options=nn.LinearCrossEntropyOptions(
                batch_chunk_size=max(1, _LOGITS // len(weight)),
                # Compiled, torch sets this itself, with a warning.
                allow_retain_graph=torch.compiler.is_compiling(),
            ),
        )
        total = loss.sum(dtype=torch.promote_types(dtype, torch.float32))
    return total / ((labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch)


def require_fused_loss() -> None:
    """Raise `UserError` where torch does not have the loss."""
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        raise UserError(f"fused_loss needs torch 2.13 or newer, this is {torch.__version__}: leave it out")


def _dtype_of_products(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    if device == "cpu":
        return torch.promote_types(hidden.dtype, torch.float32)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
