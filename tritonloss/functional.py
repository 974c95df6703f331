"""The functional forms of all losses."""

from .structural_similarity import structural_similarity_loss

__all__ = ["structural_similarity_loss"]
