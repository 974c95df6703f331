"""Losses of single pixels."""
