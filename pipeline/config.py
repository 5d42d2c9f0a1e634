"""One frozen, typed configuration for every job: its sections together, what fits together, and its identity.

Left out: the sections themselves (`sections`), reading them from files and command lines, and messages about mistakes (`config_file`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, model_validator

from pipeline.contracts import Objective
from pipeline.errors import ConfigError
from pipeline.objectives import OBJECTIVES, resolve
from pipeline.sections.base import Attention, Count, Fraction, Name, Place, Positive, Precision, Section
from pipeline.sections.data import DataConfig, Source, TrajectoryColumns
from pipeline.sections.latent import LatentConfig
from pipeline.sections.model import LoraSection, ModelConfig
from pipeline.sections.sampling import DecodingConfig, EvaluationConfig, SamplingConfig
from pipeline.sections.sweep import AshaConfig, Dimension, Range, SweepConfig
from pipeline.sections.training import (
    CheckpointConfig,
    CriticConfig,
    CriticOptimizerConfig,
    OptimizerConfig,
    ScalingConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "AshaConfig",
    "Attention",
    "CheckpointConfig",
    "ConfigError",
    "Count",
    "CriticConfig",
    "CriticOptimizerConfig",
    "DataConfig",
    "DecodingConfig",
    "Dimension",
    "EvaluationConfig",
    "Fraction",
    "LatentConfig",
    "LoraSection",
    "ModelConfig",
    "Name",
    "OptimizerConfig",
    "Positive",
    "Precision",
    "Range",
    "RunConfig",
    "SamplingConfig",
    "ScalingConfig",
    "Section",
    "Source",
    "SweepConfig",
    "TrackingConfig",
    "TrainConfig",
    "TrajectoryColumns",
    "digest",
]


def _objective(value: Any) -> Any:
    """{"name": "dpo", …} → Dpo(…); a dotted path names a user's own class."""
    if isinstance(value, Objective):
        return value
    if not isinstance(value, Mapping) or "name" not in value:
        raise ValueError(f"name: missing; write {{name: …}} with one of {', '.join(OBJECTIVES)} or a dotted path")
    parameters = {str(k): v for k, v in value.items() if k != "name"}
    return resolve(str(value["name"]))(**parameters)


def _absolute(path: str) -> str:
    """Workers have another current folder than the driver."""
    if "://" in path:
        raise ValueError("has to be a folder on a file system that all nodes see, not a URL")
    return str(Path(path).expanduser().absolute())


class RunConfig(Section):
    """Everything a job needs; each job reads the sections it uses."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = "run"
    """Human part of the run's folder; the rest is a hash of what changes the run's meaning."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the order of rows, new weights, dropout and generation."""
    storage: Annotated[Place, AfterValidator(_absolute), Field(validate_default=True)] = "outputs"
    """Folder for caches, runs and the MLflow database; on a cluster, a path that all nodes share."""
    checkpoint_from: Place | None = None
    """Checkpoint, run or model that `jobs.eval` and `jobs.decode` read; default: this configuration's own run."""
    data: DataConfig
    model: ModelConfig
    objective: Annotated[SerializeAsAny[Objective], BeforeValidator(_objective)]
    optimizer: OptimizerConfig = OptimizerConfig()
    critic: CriticConfig = CriticConfig()
    latent: LatentConfig = LatentConfig()
    train: TrainConfig = TrainConfig()
    scaling: ScalingConfig = ScalingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    sampling: SamplingConfig = SamplingConfig()
    decoding: DecodingConfig = DecodingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sweep: SweepConfig | None = None

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        records = self.objective.needed().records
        if self.data.kind not in records:
            settings = "" if self.data.kind not in self.objective.needs.records else " with these settings"
            raise ValueError(
                f"data.kind: {self.objective_name} trains on {' or '.join(sorted(records))}{settings}, "
                f"not on {self.data.kind}; change data.kind or the objective"
            )
        sections = {"sources": self.data.sources, "eval_sources": self.data.eval_sources}
        for name, sources in sections.items():
            for i, source in enumerate(sources):
                if source.trajectories and self.data.kind != "trajectory":
                    raise ValueError(f"data.{name}.{i}.trajectories: only for data.kind=trajectory; remove it")
        if self.scaling.offload_optimizer and self.scaling.zero_stage == 0:
            raise ValueError("scaling.offload_optimizer: needs scaling.zero_stage 1, 2 or 3")
        metric = (self.checkpoint.best or "").lstrip("-−")
        if (
            metric.startswith("eval/")
            and metric != "eval/loss"
            and not (self.data.eval_fraction or self.data.eval_sources)
        ):
            raise ValueError(
                f"checkpoint.best: {metric} is measured on held-out rows, and there are none; "
                "set data.eval_fraction or data.eval_sources"
            )
        return self

    @property
    def objective_name(self) -> str:
        """The registry's name of the objective, or its dotted path."""
        for name, objective in OBJECTIVES.items():
            if objective is type(self.objective):
                return name
        return f"{type(self.objective).__module__}:{type(self.objective).__qualname__}"

    def dump(self) -> dict[str, Any]:
        """Plain JSON types; `RunConfig.model_validate` of it gives an equal configuration."""
        plain = self.model_dump(mode="json")
        plain["objective"] = {"name": self.objective_name, **plain["objective"]}
        return plain


def digest(*parts: Any) -> str:
    """Short hash of plain JSON values: names caches and runs by what they are made of."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
