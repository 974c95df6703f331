"""What is measured, counted and predicted of the losses: `python -m perf COMMAND`."""
