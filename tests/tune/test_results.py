"""How trials appear on the frontier: which ones form a series, and what stands beside a point."""

from __future__ import annotations

import pytest

from tune.results import series_of


@pytest.mark.parametrize(
    ("objective", "overrides", "series"),
    [
        ("dpo", {"objective.beta": 0.3}, ("dpo", "0.3")),
        ("dpo", {"objective.beta": 0.3, "optimizer.lr": 1e-4, "seed": 1}, ("dpo", "0.3")),
        ("tdpo", {"objective.variant": 1, "objective.beta": 0.3}, ("tdpo, variant 1", "0.3")),
        ("tdpo", {"objective": {"name": "tdpo", "variant": 2, "beta": 0.3}}, ("tdpo, variant 2", "0.3")),
        ("f_dpo", {"objective.divergence": "forward_kl", "objective.beta": 0.3}, ("f_dpo, forward_kl", "0.3")),
        ("f_dpo", {"objective.divergence": "alpha", "objective.alpha": 0.7}, ("f_dpo, alpha, alpha 0.7", "0.1")),
        ("unlikelihood", {"objective.alpha": 0.5}, ("unlikelihood", "0.5")),
        ("sft", {"optimizer.lr": 1e-4}, ("sft", "")),
    ],
)
def test_the_strength_of_the_leash_is_the_label_and_the_rest_tells_series_apart(
    make_config, objective: str, overrides: dict, series: tuple[str, str]
) -> None:
    own = {key.partition(".")[2]: value for key, value in overrides.items() if key.startswith("objective.")}
    own |= overrides.get("objective", {})
    settings = ", ".join(f"{key}: {value}" for key, value in {"name": objective, **own}.items())
    assert series_of(make_config(f"objective={{{settings}}}"), overrides) == series
