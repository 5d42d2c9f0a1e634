"""Sections of the configuration about sweeps: which keys take which values, and which trials go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.sections.base import Count, ModelName, Name, Section


class Range(Section):
    """Numbers that a sweep may take for one key."""

    low: float
    high: float
    log: bool = False
    """Even on a logarithmic scale."""
    integer: bool = False
    points: Annotated[int, Field(ge=2, le=1000)] = 5
    """How many of them a grid takes, both ends included."""

    @model_validator(mode="after")
    def _bounds(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low: {self.low:g} has to be below high, {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError("low: has to be above 0 on a logarithmic scale")
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError("integer: low and high have to be whole numbers")
        return self


Dimension = Range | tuple[Any, ...] | Literal["default"]


def _dimension(value: Any) -> Any:
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError("has no values; name some, or remove the key")
        return tuple(value)
    if isinstance(value, Mapping):
        return Range(**value)
    if isinstance(value, Range) or value == "default":
        return value
    raise ValueError("write a list of values, {low: …, high: …} or default")


def _space(value: Any) -> Any:
    """Dotted keys, as in YAML, or nested mappings, as dotted overrides on the command line make them."""
    if not isinstance(value, Mapping):
        return value

    def flat(prefix: str, node: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, inner in node.items():
            nested = isinstance(inner, Mapping) and inner and not inner.keys() & Range.model_fields.keys()
            found |= flat(f"{prefix}{key}.", inner) if nested else {f"{prefix}{key}": inner}
        return found

    if not value:
        raise ValueError("is empty; name a key to vary, e.g. {objective.beta: default}")
    return flat("", value)


class AshaConfig(Section):
    """Asynchronous successive halving: stops trials that are behind others at the same optimizer step."""

    grace: Count | None = None
    """Optimizer steps before a trial may be stopped; default: the steps between two evaluations."""
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """At each rung the best 1/reduction of the trials that came so far go on; rungs are this factor of steps apart."""


class SweepConfig(Section):
    """What `tune.sweep` varies, how it chooses, and when it stops a trial. Each trial is this configuration with overrides."""

    space: Annotated[dict[str, Annotated[Dimension, BeforeValidator(_dimension)]], BeforeValidator(_space)]
    """Dotted key: list of values, {low: …, high: …, log: true}, or `default` (for β, λ, divergence, objective, learning rate)."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """`optuna` (its TPE sampler) is an extra: pip install optuna."""
    trials: Count = 16
    """How many trials random and optuna make."""
    scheduler: Literal["fifo", "asha"] = "fifo"
    """`asha` stops early what is behind; `fifo` lets every trial end."""
    asha: AshaConfig = AshaConfig()
    metric: Name = "eval/accuracy"
    """Metric of the training loop that ranks trials; eval/… needs held-out rows."""
    mode: Literal["max", "min"] | None = None
    """Default: min where the metric's name ends in loss or error, else max."""
    max_concurrent_trials: Count | None = None
    """Default: what the cluster can hold."""
    max_failures: Annotated[int, Field(ge=0)] = 1
    """How often a trial whose worker died is taken up again from its last checkpoint."""
    evaluate: bool = False
    """Run `jobs.eval` on each finished trial: reward (sampling.scorer) and KL of the policy's own samples."""
    register_as: ModelName | None = None
    """Register the best model under this name in MLflow (copies the weights)."""

    @property
    def maximise(self) -> bool:
        """Whether more of the metric is better."""
        return self.mode == "max" if self.mode else not self.metric.endswith(("loss", "error"))
