"""Region mutual information."""
