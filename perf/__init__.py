"""Benchmarks and reports: `python -m perf report | compile-only | compare | record | train`."""
