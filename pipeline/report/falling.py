"""The curve that people ask about most: the reward of the chosen responses, which falls while training succeeds."""

from __future__ import annotations

from collections.abc import Mapping

FALLING = (
    "The chosen reward fell while the margin grew. That is expected when the reference was trained on the chosen responses: "
    "E_ref[β log π/π_ref] = −β·KL(π_ref‖π) ≤ 0, so probability leaves the data, less of it from the chosen side. "
    "If it worries you, add likelihood (for DPO: objective.nll_weight=0.1)."
)


def chosen_falls(metrics: Mapping[str, float]) -> bool:
    """Whether the run shows the effect that `FALLING` explains: rewards start at 0, so signs tell. Held-out rows first:
    one training step alone is noisy."""
    prefix = "eval/" if "eval/reward/chosen" in metrics else ""
    return metrics.get(f"{prefix}reward/chosen", 0.0) < -0.01 and metrics.get(f"{prefix}reward/margin", 0.0) > 0.01
