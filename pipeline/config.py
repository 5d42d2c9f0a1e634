"""One frozen, typed configuration for every job: YAML, dotted overrides, one-line errors.

`load("demo.yaml", ["objective.beta=0.3"])` reads the YAML, lays the overrides over it, and validates the whole:
an unknown key, a value out of range or a combination that cannot work is a `ConfigError` of one line, before any
cluster work starts. The precedence is overrides > YAML > defaults; nothing is changed after validation.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from pipeline.contracts import Objective, RecordKind
from pipeline.errors import UserError
from pipeline.objectives import OBJECTIVES, resolve


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


# --------------------------------------------------------------------------------------------------- data


class Source(Section):
    """One place records come from."""

    path: Name
    """File, glob or folder of jsonl / parquet files, a folder saved by `datasets`, or a data set's hub name."""
    format: Literal["auto", "jsonl", "parquet", "huggingface"] = "auto"
    """`auto` goes by the file ending; `huggingface` reads a saved folder or a hub name."""
    columns: dict[str, str] = {}
    """Our field: your column, e.g. {prompt: question, chosen: best_answer}."""
    subset: str | None = None
    """Configuration name of a Hugging Face data set."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    share: Annotated[float, Field(gt=0)] | None = None
    """Share of this source in the mix. Set it on all sources or none (= every row of every source is used)."""


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
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation of transformers; must take a 4-D mask."""
    lora: LoraSection | None = None
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Only for models whose code you have read."""


# ----------------------------------------------------------------------------------------------- training


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    lr: Positive = 1e-6
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Positive | None = 1.0
    """Global gradient-norm bound; null: none."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Linear warm-up; default: `warmup_fraction` of all steps."""
    warmup_fraction: Fraction = 0.1
    final_lr_fraction: Fraction = 0.0
    """Where cosine and linear end, as a share of lr."""


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
    """`vader`, or a dotted path `package.module:function` from (prompt, response) to a number."""
    output: str | None = None
    """File that `jobs.decode` writes (jsonl); default: in the run's folder."""


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
    train: TrainConfig = TrainConfig()
    scaling: ScalingConfig = ScalingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        needs = self.objective.needs
        if self.data.kind not in needs.records:
            raise ValueError(
                f"data.kind: {self.objective_name} trains on {' or '.join(sorted(needs.records))}, "
                f"not on {self.data.kind}; change data.kind or objective.name"
            )
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


# ------------------------------------------------------------------------------------------------- loading


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, set each `key.path=value` in turn, validate. Raises `ConfigError`.

    A number steps into a list (`data.sources.0.path=x`); a mapping or list replaces what was there.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such configuration file")
    where = str(path)
    try:
        tree = OmegaConf.load(path)
        if not OmegaConf.is_dict(tree):
            return validate(None)
        for where in overrides:
            key, equals, value = where.partition("=")
            if not (key and equals):
                raise ConfigError(f"{where}: overrides have the form key.path=value")
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
            OmegaConf.update(tree, key, parsed["value"], merge=False)
        where = str(path)
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError, TypeError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None
    return validate(plain)


def validate(plain: Any) -> RunConfig:
    """Plain JSON types → RunConfig, or a `ConfigError` of one line."""
    if not isinstance(plain, Mapping):
        raise ConfigError("a configuration is a mapping of sections (data, model, objective, …)")
    try:
        return RunConfig.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(_one_line(error, plain)) from None


def _one_line(error: ValidationError, plain: Mapping[str, Any]) -> str:
    """All problems of a validation in one line, each with its dotted key and, for a typo, the likely key."""
    problems = []
    found = error.errors()
    for problem in found:
        if any(other["loc"][: len(problem["loc"])] == problem["loc"] != other["loc"] for other in found):
            continue  # a list is "too short" only because of an item that is wrong itself
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(problem["loc"][-1]), _known_keys(problem["loc"][:-1], plain), n=1)
            message = "unknown key" + (f"; did you mean {near[0]}?" if near else "; remove it")
        elif problem["type"] == "missing":
            message = "missing; set it"
        elif problem["type"] != "value_error":
            message = f"{message[:1].lower()}{message[1:]}, not {problem['input']!r}"
        problems.append(f"{key}: {message}" if key else message)
    return " ".join(" | ".join(problems).split())


def _known_keys(location: tuple[int | str, ...], plain: Mapping[str, Any]) -> list[str]:
    """Field names of the section at `location`."""
    if location == ("objective",):
        return list(resolve(str(plain["objective"]["name"])).model_fields)
    model: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        model = _section_in(annotation)
        if model is None:
            return []
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    """The Section class in an annotation such as `tuple[Source, ...]` or `LoraSection | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section_in(inner)) is not None:
            return found
    return None


def json_schema() -> dict[str, Any]:
    """JSON schema of a configuration file, for completion in editors; one branch per built-in objective."""
    schema = RunConfig.model_json_schema()
    branches = []
    for name, objective in OBJECTIVES.items():
        branch = objective.model_json_schema()
        schema["$defs"].update(branch.pop("$defs", {}))
        branch["properties"] = {"name": {"const": name}, **branch.get("properties", {})}
        branch["required"] = ["name", *branch.get("required", [])]
        branches.append(branch)
    dotted = {"type": "object", "properties": {"name": {"type": "string", "pattern": ":"}}, "required": ["name"]}
    schema["properties"]["objective"] = {"anyOf": [*branches, dotted]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "qalign", **schema}


def digest(*parts: Any) -> str:
    """Short hash of plain JSON values: names caches and runs by what they are made of."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def describe() -> str:
    """Every key with its default and meaning, for `qalign keys`."""
    lines = _describe_section(RunConfig, "")
    for name, objective in OBJECTIVES.items():
        lines.append(f"\nobjective.name={name}: {(objective.__doc__ or '').strip().splitlines()[0]}")
        lines += _describe_section(objective, "objective.")
    return "\n".join(lines)


def _describe_section(model: type[BaseModel], prefix: str) -> list[str]:
    lines = []
    for name, info in model.model_fields.items():
        section = _section_in(info.annotation)
        if section is not None and name != "objective":
            lines += ["", f"[{prefix}{name}] {(section.__doc__ or '').strip().splitlines()[0]}"]
            lines += _describe_section(section, f"{prefix}{name}.")
        elif name != "objective":
            default = "required" if info.is_required() else repr(info.default)
            lines.append(f"{prefix}{name} = {default}    {(info.description or '').strip()}")
    return lines
