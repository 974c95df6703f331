"""What every loss stands on; no device code."""
