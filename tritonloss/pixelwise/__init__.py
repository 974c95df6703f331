"""Losses of single pixels: cross entropy, binary cross entropy, focal, margin-calibrated."""
