"""Published results in scale model, through the real pipeline. Run as modules: `python -m benchmarks.reasoning`."""
