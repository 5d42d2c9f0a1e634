"""Sections of the configuration about training: optimizers, steps, workers, checkpoints, tracking."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pipeline.sections.base import Count, Fraction, ModelName, Positive, Precision, Section, Title


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    lr: Positive = 1e-6
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Positive | None = 1.0
    """Global gradient-norm bound; null: none."""
    schedule: Literal["cosine", "linear", "constant", "hold_decay"] = "cosine"
    """After the warm-up; `hold_decay` stays at lr and falls linearly over the last `decay_fraction` of all steps."""
    decay_fraction: Fraction = 0.5
    """Share of all steps in which `hold_decay` falls."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Linear warm-up; default: `warmup_fraction` of all steps."""
    warmup_fraction: Fraction = 0.1
    final_lr_fraction: Fraction = 0.0
    """Where cosine and linear end, as a share of lr."""


class CriticOptimizerConfig(OptimizerConfig):
    """The same for the critic, which has more to learn than the policy."""

    lr: Positive = 1e-5


class CriticConfig(Section):
    """The value network V(s), for objectives that have one. It starts from the policy's weights, with V = 0."""

    architecture: Literal["separate", "head"] = "separate"
    """A transformer of its own (with LoRA where the policy has it), or a linear head on the policy's hidden states,
    which its loss does not change."""
    optimizer: CriticOptimizerConfig = CriticOptimizerConfig()
    """Its own AdamW and schedule."""
    steps_alone: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps at the start that train the critic alone (they count as steps, of the policy's schedule as well)."""


class TrainConfig(Section):
    """How long, and in what portions."""

    epochs: Count = 1
    max_steps: Count | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    rows_per_step: Count = 16
    """Prompts per optimizer step, over all workers: the effective batch, whatever the worker count."""
    tokens_per_micro_batch: Count = 4096
    """Padded tokens of one forward on one worker; gradients accumulate until the step's rows are through."""
    eval_every: Count | None = None
    """Evaluate on the held-out rows every N steps; default: at the end of each epoch."""
    skip_nan: Annotated[int, Field(ge=0)] = 0
    """So many steps in a row whose loss or gradient is not finite are left out, with a warning that names their rows; the
    next one stops the run. 0: the first one does."""
    hang_timeout: Positive = 600
    """Seconds in which no worker makes progress (a micro-batch, a piece of a checkpoint, another try to reach storage) after
    which workers end and start again from the last checkpoint; without Ray, never."""


def _workers(value: Any) -> Any:
    """A number, or [min, max]; where both are the same, the number."""
    bounds = list(value) if isinstance(value, list | tuple) else [value, value]
    bounds = [int(count) if isinstance(count, str) and count.isdecimal() else count for count in bounds]
    if len(bounds) != 2 or any(type(count) is not int for count in bounds) or not 1 <= bounds[0] <= bounds[1]:
        raise ValueError(
            f"give a number of workers, or [min, max] with 1 ≤ min ≤ max for elastic training; not {value!r}"
        )
    return bounds[0] if bounds[0] == bounds[1] else tuple(bounds)


class ScalingConfig(Section):
    """Workers and what each one gets."""

    workers: Annotated[Count | tuple[Count, Count], BeforeValidator(_workers)] = 1
    """A number, or [min, max]: training starts with as many as there is room for, and goes on from the last step with more
    or fewer when nodes join or leave. The rows of each step, and the effective batch, stay the same."""
    resize_seconds: Positive = 60
    """How often elastic training looks for room for more workers. Each change costs a start of all workers."""
    cpus_per_worker: Positive = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    zero_stage: Literal[0, 1, 2, 3] = 2
    """One worker without offload has nothing to share: whatever this says, float32 runs at stage 0 there, bfloat16 at most at stage 1."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory (needs a C++ compiler: DeepSpeed builds its CPU Adam)."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Worker failures in a row, without a new checkpoint between them, that a run bears; −1: any number."""
    data_actors: Count | None = None
    """Upper bound of actors per Ray Data stage; default: what the cluster can hold."""

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change while a run goes on."""
        return isinstance(self.workers, tuple)

    @property
    def least_workers(self) -> int:
        """Fewest workers to train with."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def most_workers(self) -> int:
        """Most workers to train with."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers


class CheckpointConfig(Section):
    """When to save, what to keep."""

    every: Count = 100
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep: Count = 2
    """Newest checkpoints to keep, beside the best."""
    in_background: bool = True
    """Write while training goes on, from a copy in host memory: 12 bytes a parameter, shared among the workers."""
    patience: Annotated[float, Field(ge=0)] = 300
    """Seconds for which storage may be full or out of reach before the run stops."""
    best: Annotated[str, Field(pattern=r"^[-−]?[^\s-]\S*$")] | None = "eval/loss"
    """Metric whose lowest value marks the best checkpoint (prefix - for highest, e.g. -eval/accuracy), which is kept. A step whose
    evaluation is better than all before is saved for it; a metric of training steps is compared where a checkpoint is due anyway.
    What is not finite is never best. null: none is marked."""
    export_dtype: Precision = "auto"
    """Precision of the exported safetensors; `auto`: the one that training computed in. Rounding float32 training to bfloat16 takes
    away an update that is small beside the weights."""


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = True
    uri: str | None = None
    """Default: MLFLOW_TRACKING_URI, else a sqlite file in `storage`."""
    experiment: Title = "qalign"
    register_as: ModelName | None = None
    """Register the exported model under this name (copies the weights)."""
    copy_model: bool = False
    """Copy the exported model into the run's artifacts; default: only its path is recorded."""
