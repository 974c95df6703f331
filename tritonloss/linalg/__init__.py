"""Batches of small symmetric positive definite matrices."""

from .matrices import cholesky_ex, inv, logdet, solve

__all__ = ["cholesky_ex", "inv", "logdet", "solve"]
