"""Losses of sliding windows (structural similarity, SSIM), and the statistics of windows."""
