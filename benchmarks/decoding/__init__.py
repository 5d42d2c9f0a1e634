"""What each decoder buys, at which distance from the SFT model: `python -m benchmarks.decoding`."""
