"""Counts of labels, and the margin offsets that follow from them."""
