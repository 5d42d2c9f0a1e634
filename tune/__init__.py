"""Sweeps: many runs of one configuration, on workers that stay warm."""
