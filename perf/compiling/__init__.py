"""Kernels compiled for GPUs that need not be there, and what their machine code tells."""
