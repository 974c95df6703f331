"""A small network, trained with each loss."""
