"""What is counted of labels."""
