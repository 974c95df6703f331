"""Losses of how far regions overlap."""
