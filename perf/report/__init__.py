"""The performance report, and the rows of others."""
