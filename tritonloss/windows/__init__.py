"""Losses of sliding windows, and their statistics."""
