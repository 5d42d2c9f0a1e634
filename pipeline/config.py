"""One frozen, typed configuration for every job: its sections, their ranges, and what fits together.

Left out: reading it from files and command lines, and messages about mistakes (`config_file`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    model_validator,
)

from pipeline.contracts import Objective
from pipeline.errors import UserError
from pipeline.objectives import OBJECTIVES, resolve
from pipeline.records import RecordKind


class ConfigError(UserError, ValueError):
    """A configuration that cannot work: one line that names the key and the remedy."""


class Section(BaseModel):
    """A part of the configuration: frozen, and refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
Precision = Literal["auto", "float32", "bfloat16"]
Attention = Literal["auto", "sdpa", "eager", "flex_attention"]


# --------------------------------------------------------------------------------------------------- data


def _check_answer_pattern(pattern: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"answer_pattern: no regular expression ({error})") from None
    if groups != 1:
        raise ValueError(f"answer_pattern: needs one group (…) around the answer, has {groups}")


class TrajectoryColumns(Section):
    """Where one trajectory lies in a record of another layout; columns may be dotted: `model_a.solution`."""

    steps: Name
    """Column with the text (cut into steps at `separator`) or a list of steps."""
    separator: str | None = "\n"
    """Ends each step of a text, and stays with it; null: the text is one step."""
    reward: float | str | None = None
    """Terminal reward: a column with a number or true/false (1 or 0), or a number for all records."""
    answer: Name | None = None
    """Column with the right answer: the terminal reward is 1 where the trajectory's answer matches, else 0."""
    answer_pattern: str = r"(?:####|\bA:|(?i:\banswer)(?: is)?:?|\\boxed\{)\s*([^\n]+)"
    """Regular expression whose group, at its last match, is the answer (the whole text where it has no match)."""
    step_rewards: Name | None = None
    """Column with one reward per step."""
    step_logprobs: Name | None = None
    """Column with one log-probability per step, under the policy that wrote it."""

    @model_validator(mode="after")
    def _one_reward(self) -> TrajectoryColumns:
        if self.reward is not None and self.answer is not None:
            raise ValueError("answer: remove it, or remove reward (only one can be the terminal reward)")
        _check_answer_pattern(self.answer_pattern)
        return self


class Source(Section):
    """One place records come from."""

    path: Name
    """File, glob or folder of jsonl / parquet files, a folder saved by `datasets`, or a data set's hub name."""
    format: Literal["auto", "jsonl", "parquet", "huggingface"] = "auto"
    """`auto` goes by the file ending; `huggingface` reads a saved folder or a hub name."""
    columns: dict[str, str] = {}
    """Our field: your column (dotted where nested), e.g. {prompt: question, chosen: best_answer}."""
    subset: str | None = None
    """Configuration name of a Hugging Face data set."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    trajectories: tuple[TrajectoryColumns, ...] = ()
    """For data.kind=trajectory: where each trajectory of a record lies, when the columns are not ours."""
    share: Annotated[float, Field(gt=0)] | None = None
    """Share of this source in the mix. Set it on all sources or none (= every row of every source is used)."""


def _around_prompt(template: str) -> str:
    if template.count("{prompt}") != 1:
        raise ValueError("needs {prompt} once, where the prompt goes")
    return template


class DataConfig(Section):
    """Which records, and how they become token rows."""

    kind: RecordKind
    """What one record is; has to fit the objective."""
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Training records."""
    eval_sources: tuple[Source, ...] = ()
    """Held-out records. Empty: `eval_fraction` of the training prompts is held out."""
    eval_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the training prompts to hold out (by prompt, so that no prompt is on both sides)."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens of prompt + one response. Prompts are cut from the left first; then responses from the right, counted."""
    max_prompt_length: Annotated[int, Field(ge=1)] | None = None
    """A tighter bound on the prompt alone."""
    prompt_template: Annotated[str, AfterValidator(_around_prompt)] | None = None
    """Text around plain-text prompts, e.g. "Question: {prompt}\\nAnswer:". Dialogues have their chat template."""
    chat_template: str | None = None
    """Jinja template that replaces the tokenizer's own for message lists."""
    append_eos: bool = True
    """End each response with the tokenizer's EOS (never when a chat template already ended the turn, nor after a cut)."""
    ties: Literal["refuse", "first"] = "refuse"
    """Tied ranks: quarantine the record, or take the order in the file."""
    max_bad_fraction: Fraction = 0.1
    """Stop when more than this share of the records is unusable."""

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        shares = [source.share is None for source in self.sources]
        if any(shares) and not all(shares):
            raise ValueError("sources: set `share` on all sources or on none")
        if self.eval_sources and self.eval_fraction:
            raise ValueError("eval_fraction: remove it, or remove eval_sources (only one can name the held-out rows)")
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError("max_prompt_length: must be below max_length, or no room is left for a response")
        return self


# -------------------------------------------------------------------------------------------------- model


class LoraSection(Section):
    """Low-rank adapters (peft). The reference is the same model with the adapter off."""

    r: Count = 16
    alpha: Positive = 32.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class ModelConfig(Section):
    """The policy, and what it is compared with."""

    path: Name
    """Hub name, folder, `package:smollm2` (ships with the demo extra), or a run's folder (starts from its export)."""
    reference: str | None = None
    """The frozen reference; default: the model that training starts from."""
    dtype: Precision = "auto"
    """`auto`: bfloat16 where the processor has it natively, else float32. Master weights are float32 either way."""
    attention: Attention = "auto"
    """Attention implementation of transformers. `auto`: flex_attention on a GPU (it skips what a response may not see), else sdpa."""
    lora: LoraSection | None = None
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Only for models whose code you have read."""

    @property
    def unpacked_attention(self) -> Attention:
        """For rows of one text (generation): a block mask would gain nothing."""
        return "eager" if self.attention == "eager" else "sdpa"


# ----------------------------------------------------------------------------------------------- training


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


class ScalingConfig(Section):
    """Workers and what each one gets."""

    workers: Count = 1
    cpus_per_worker: Positive = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    zero_stage: Literal[0, 1, 2, 3] = 2
    """One float32 worker without offload runs at stage 0 whatever this says: it has nothing to share."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory (needs a C++ compiler: DeepSpeed builds its CPU Adam)."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Worker failures after which a run gives up; −1: never."""
    data_actors: Count | None = None
    """Upper bound of actors per Ray Data stage; default: what the cluster can hold."""


class CheckpointConfig(Section):
    """When to save, what to keep."""

    every: Count = 100
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep: Count = 2
    """Newest checkpoints to keep, beside the best."""
    best: str = "eval/loss"
    """Metric whose lowest value marks the best checkpoint (prefix − for highest, e.g. −eval/accuracy)."""
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the exported safetensors."""


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = True
    uri: str | None = None
    """Default: MLFLOW_TRACKING_URI, else a sqlite file in `storage`."""
    experiment: str = "qalign"
    register_as: str | None = None
    """Register the exported model under this name (copies the weights)."""
    copy_model: bool = False
    """Copy the exported model into the run's artifacts; default: only its path is recorded."""


class SamplingConfig(Section):
    """Sampling from a model: in the demo, `jobs.eval` and `jobs.decode`."""

    max_new_tokens: Count = 64
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 = greedy."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """0 = off."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    per_prompt: Count = 1
    """Completions per prompt."""
    batch_size: Count = 64
    """Sequences decoded at a time on one actor."""
    seed: int = 0
    prompts: Source | None = None
    """Where prompts come from (column `prompt`); default: the held-out rows of `data`."""
    limit: Count | None = None
    """At most this many prompts."""
    scorer: str | None = None
    """`vader`, `verifiable` (the right answer), `classifier:NAME` (a sequence classifier, or a run of reward_model), or a dotted
    path `package.module:function` from (prompt, response) to a number."""
    output: str | None = None
    """File that `jobs.decode` writes (jsonl or parquet); default: in the run's folder."""

    @model_validator(mode="after")
    def _bounds(self) -> SamplingConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError("min_new_tokens: must not exceed max_new_tokens")
        return self


class DecodingConfig(Section):
    """How `jobs.decode` finds completions. Lengths, temperature, filters, seed, prompts and scorer are those of `sampling`."""

    method: Name = "sampling"
    """One of `pipeline.decoding.DECODERS`: sampling, beam, best_of_n, args, controlled, transfer_q, proxy."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """sampling, best_of_n, proxy: leave out tokens less likely than this share of the likeliest."""
    beams: Count = 4
    length_penalty: float = 1.0
    """beam: a response of n tokens scores Σ log π / n^length_penalty."""
    early_stopping: bool | Literal["never"] = False
    """beam: when a prompt with enough finished responses is done; as in transformers."""
    n: Count = 8
    """best_of_n: samples per completion."""
    candidates: Count = 10
    """args, controlled, transfer_q: likeliest tokens of the reference that are looked at."""
    alpha: Positive = 1.0
    """args, controlled, transfer_q: π ∝ π_ref · exp(Q/α); the smaller, the further from the reference."""
    rollouts: Count = 2
    """controlled, transfer_q: sampled continuations per candidate."""
    rollout_tokens: Count | None = None
    """Tokens of one, at most; default: to `sampling.max_new_tokens`."""
    rollout_temperature: Annotated[float, Field(ge=0)] = 1.0
    """0: one greedy continuation per candidate."""
    reference: Name | None = None
    """args, controlled, transfer_q, proxy: the model before alignment; default: the run's reference."""
    baseline: Name | None = None
    """transfer_q: the aligned model that makes the roll-outs; default: the policy."""
    baseline_scorer: Name | None = None
    """transfer_q: the reward that the baseline was aligned to, where it is another than `sampling.scorer` (indirect transfer)."""
    beta: Positive | None = None
    """transfer_q, indirect: strength of the baseline's leash; default: objective.beta."""
    base: Name | None = None
    """proxy: the model that the policy's change is added to; default: the reference."""
    weight: float = 1.0
    """proxy: how much of the change is added."""
    logprobs: tuple[Literal["policy", "reference"], ...] = ()
    """Models whose log-probabilities of the tokens are written beside those that the decoder itself had."""
    rows_per_piece: Count = 64
    """Prompts that are decoded and written together: what a killed job repeats at most, per actor."""


class EvaluationConfig(Section):
    """What `jobs.eval` measures."""

    evaluators: tuple[Name, ...] | None = None
    """Names of `pipeline.evaluation.EVALUATORS`; default: all, those of samples where a scorer is set or --sample is given."""
    against: Name | None = None
    """A second model, run or checkpoint, whose samples of the same prompts are compared with the policy's."""
    bins: Annotated[int, Field(ge=2)] = 10
    """Bins of the reliability diagrams, all of the same width."""
    answer: Name = "answer"
    """For the scorer `verifiable`: the prompts' column with the right answer (dotted where nested)."""
    answer_pattern: str = TrajectoryColumns.model_fields["answer_pattern"].default
    """Regular expression whose group, at its last match, is the answer (the whole text where it has no match)."""
    label: str | int | None = None
    """For the scorer `classifier:…`: whose probability is the score, by name or index; needed where there are several labels."""
    credit_rows: Annotated[int, Field(ge=0)] = 4
    """Held-out rows whose tokens' credit is stored."""
    samples_shown: Annotated[int, Field(ge=0)] = 8
    """Prompts whose completions are stored side by side."""
    planted: Source | None = None
    """Records with prompt, response and `errors`, a list of [start, stop] places in the response (characters)."""

    @model_validator(mode="before")
    @classmethod
    def _planted_path(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("planted"), str):
            return {**value, "planted": {"path": value["planted"]}}
        return value

    @model_validator(mode="after")
    def _one_group(self) -> EvaluationConfig:
        _check_answer_pattern(self.answer_pattern)
        return self


# -------------------------------------------------------------------------------------------------- sweeps


class Range(Section):
    """Numbers that a sweep may take for one key."""

    low: float
    high: float
    log: bool = False
    """Even on a logarithmic scale."""
    integer: bool = False
    points: Annotated[int, Field(ge=2)] = 5
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
    register_as: str | None = None
    """Register the best model under this name in MLflow (copies the weights)."""

    @property
    def maximise(self) -> bool:
        """Whether more of the metric is better."""
        return self.mode == "max" if self.mode else not self.metric.endswith(("loss", "error"))


# ------------------------------------------------------------------------------------------------- the run


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

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Human part of the run's folder; the rest is a hash of what changes the run's meaning."""
    seed: int = 0
    storage: Annotated[Name, AfterValidator(_absolute), Field(validate_default=True)] = "outputs"
    """Folder for caches, runs and the MLflow database; on a cluster, a path that all nodes share."""
    checkpoint_from: str | None = None
    """Checkpoint, run or model that `jobs.eval` and `jobs.decode` read; default: this configuration's own run."""
    data: DataConfig
    model: ModelConfig
    objective: Annotated[SerializeAsAny[Objective], BeforeValidator(_objective)]
    optimizer: OptimizerConfig = OptimizerConfig()
    critic: CriticConfig = CriticConfig()
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
