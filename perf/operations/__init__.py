"""What is measured of every slice."""
