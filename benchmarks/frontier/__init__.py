"""The controlled-sentiment experiment in scale model: run it with `python -m benchmarks.frontier`.

What does each objective's reward cost in KL, calibration and diversity? Reading order: `methods` (every setting, as data) → `worlds`
(a model's samples become training files) → `curves` (one objective's sweep, and its points) → `claims` (what the papers say) →
`report` (table and page) → `__main__` (which sweeps, and two at a time).
"""
