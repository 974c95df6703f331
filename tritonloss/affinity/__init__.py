"""Losses of neighbouring pixels: affinity fields."""
