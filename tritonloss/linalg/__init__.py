"""Batches of small symmetric positive definite matrices: factor, determinant, solve, inverse."""

from .matrices import cholesky_ex, inv, logdet, solve

__all__ = ["cholesky_ex", "inv", "logdet", "solve"]
