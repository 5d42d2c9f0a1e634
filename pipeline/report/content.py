"""What a sweep hands to its report: the trials, with their points on the reward–KL plane.

An evaluation hands over `pipeline.evaluation.results.Evaluation`, a run its metrics.jsonl.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Status = Literal["finished", "stopped", "running", "diverged", "failed"]


class Point(BaseModel):
    """One policy on the frontier, measured on its own samples."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    kl: float
    """KL(π ‖ π_ref) in nats per response."""
    reward: float
    """Mean reward under the sweep's scorer."""
    kl_error: float | None = None
    """Standard error of `kl`."""
    reward_error: float | None = None
    label: str = ""
    """Written beside the point: "0.1" for β = 0.1. Points of one objective and label are seeds: the line joins their means."""


class Trial(BaseModel):
    """One trial of a sweep."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    label: str
    objective: str
    """A series of the plots: the objective's name and what else tells its line apart, as in "f_dpo, forward_kl"."""
    parameters: dict[str, float | int | str | bool | None]
    """What the sweep varied, by dotted config key."""
    metrics: dict[str, float] = {}
    """The last value of each metric; `<name>_se`, where it is there, is the standard error of `<name>`."""
    status: Status = "finished"
    reason: str = ""
    """Of a trial that did not finish: why."""
    points: tuple[Point, ...] = ()
