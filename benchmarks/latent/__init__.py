"""LTA-Thinker (arXiv 2509.12875) and SoftCoT in scale model: run it with `python -m benchmarks.latent`.

Reading order: `methods` (every setting, as data) → `runs` (one world, one run, one score) → `report` (tables and claims) →
`__main__` (which runs, and two at a time).
"""
