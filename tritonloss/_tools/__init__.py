"""The command line, and what runs offline."""
