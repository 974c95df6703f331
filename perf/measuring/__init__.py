"""What is measured on the machine at hand: times, memory, launches, host time."""
