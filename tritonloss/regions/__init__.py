"""Losses of regions of pixels: region mutual information (RMI)."""
