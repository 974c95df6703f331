"""Batched small symmetric positive definite matrices, through their Cholesky factor."""

import math

import torch
from torch import Tensor


def cholesky_ex(A: Tensor) -> tuple[Tensor, Tensor]:
    """(L, info) with A = L L^T, from the lower triangle; where info is not 0, L is NaN."""
    factor, info = torch.linalg.cholesky_ex(A)
    # NaN in the place of a failed matrix, so that nothing of it reaches the gradient.
    return torch.where((info == 0)[..., None, None], factor, math.nan), info


def logdet(A: Tensor) -> Tensor:
    """Log det A = 2 sum log diag L; NaN where A is not positive definite."""
    factor, _ = cholesky_ex(A)
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def solve(A: Tensor, B: Tensor) -> Tensor:
    """X with A X = B, by two substitutions; NaN where A is not positive definite."""
    factor, _ = cholesky_ex(A)
    half = torch.linalg.solve_triangular(factor, B, upper=False)
    solution: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solution


def inv(A: Tensor) -> Tensor:
    """The inverse, symmetric; NaN where A is not positive definite."""
    identity = torch.eye(A.size(-1), dtype=A.dtype, device=A.device)
    inverse = solve(A, identity.expand(A.shape))
    return (inverse + inverse.mT) / 2
