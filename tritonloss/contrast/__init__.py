"""Losses between embeddings of pixels: contrast with those of other pixels, and what is kept."""
