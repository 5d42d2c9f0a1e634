"""Seconds and memory of an optimizer step, side by side with what else people would use: `python -m benchmarks.throughput`."""
