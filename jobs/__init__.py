"""Entry points: one module per job, each `python -m jobs.<job> CONFIG.yaml key.path=value …` or `qalign <job> …`."""
