"""Losses of overlap between a class's probabilities and its pixels: dice, Tversky, IoU, Lovász."""
