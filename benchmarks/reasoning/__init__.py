"""The headline of the DQO paper (arXiv 2410.09302) in scale model: run it with `python -m benchmarks.reasoning`.

Reading order: `methods` (every setting, as data) → `records` (samples become training files) → `runs` (one world, one run) →
`report` (table and plot) → `__main__` (which runs, and two at a time).
"""
