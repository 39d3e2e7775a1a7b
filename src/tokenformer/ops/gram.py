"""The norm of a row of scores without the scores: ||X K^T||^2 = x (K^T K) x^T.

With a factor L of the Gram matrix K^T K = L L^T the sum of squares of a row is ||x L||^2, at a cost of D_in^2 a row
whatever the number of tokens, and the Gram matrices of segments add. So any subset of the tokens can be evaluated
exactly as part of the whole: pass `sum_of_squares(x, factor)` as `total` to `pattention`. Holds for `l2_gelu`, whose
norm is taken before the nonlinearity.
"""

import torch


def gram_matrix(key: torch.Tensor) -> torch.Tensor:
    """K^T K of keys (N, D_in), as (D_in, D_in) in float64. Gram matrices of segments add."""
    key = key.detach().double()
    return key.T @ key


def gram_factor(gram: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A square L (D_in, D_in) with L L^T = `gram`.

    From the eigenvalues, because fewer tokens than channels leave the matrix singular and a Cholesky factor undefined.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    return (eigenvectors * eigenvalues.clamp_min(0).sqrt()).to(dtype)


def sum_of_squares(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Sum of squares (..., 1) of the scores of inputs `x` (..., D_in) against the keys behind `factor`."""
    x = x.to(torch.promote_types(x.dtype, factor.dtype))
    return torch.linalg.vector_norm(x @ factor.to(x.dtype), dim=-1, keepdim=True).square()
