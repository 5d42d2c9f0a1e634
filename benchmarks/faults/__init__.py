"""Breaks training and preparation on purpose, and shows that nothing is lost: `python -m benchmarks.faults`."""
