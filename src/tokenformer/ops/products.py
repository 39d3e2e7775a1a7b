"""The product of inputs and weights, in the form that reads the weights fastest."""

import torch
import torch.nn.functional as F
from torch import nn


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T for inputs (..., D_in) and weights (D_out, D_in), as `torch.nn.functional.linear`.

    Compiled for a CPU and without gradients, a single row (the one token of a decoding step) is written as its dot
    products with the rows of the weights. The loop made of that reads memory about twice as fast as the matrix products
    of the libraries, which are built for many rows, and it sums in float32 what they may round.
    """
    if torch.compiler.is_compiling() and _is_decoding(x, weight):
        wide = torch.promote_types(x.dtype, torch.float32)
        # as_strided, not reshape: the compiler then stores the row, instead of computing the layer norm and residual
        # sum that it came from anew in each of the dot products.
        row = x.contiguous().as_strided((x.shape[-1],), (1,))
        dots = (row.to(wide) * weight.to(wide)).sum(-1)
        return dots.to(x.dtype).view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight)


def _is_decoding(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        x.numel() == x.shape[-1]
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and not torch.is_grad_enabled()
        # Quantised and sharded weights, graphs for other programs, and autocast know the product by its name.
        and type(weight) in (torch.Tensor, nn.Parameter)
        and not torch.compiler.is_exporting()
        and not torch.is_autocast_enabled("cpu")
    )
