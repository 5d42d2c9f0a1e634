"""Sections of the configuration about what a model is asked for: completions, and what is measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.sections.base import Copies, Count, Name, Place, Positive, Section
from pipeline.sections.data import Source, TrajectoryColumns, check_answer_pattern


class SamplingConfig(Section):
    """Sampling from a model: in the demo, `jobs.eval` and `jobs.decode`."""

    max_new_tokens: Count = 64
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 = greedy."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """0 = off."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    per_prompt: Copies = 1
    """Completions per prompt."""
    batch_size: Count = 64
    """Sequences decoded at a time on one actor."""
    seed: int = 0
    n_latents: Annotated[int, Field(ge=0)] | None = None
    """Latent thoughts of models that have them; 0 = none; default: as many as in training."""
    thought_noise: Annotated[float, Field(ge=0)] = 0.0
    """sampling, best_of_n, vote: each completion's thoughts are drawn around the prior's, this share of their size apart."""
    prompts: Source | None = None
    """Where prompts come from (column `prompt`); default: the held-out rows of `data`."""
    limit: Count | None = None
    """At most this many prompts."""
    scorer: Place | None = None
    """`vader`, `verifiable` (the right answer), `classifier:NAME` (a sequence classifier, or a run of reward_model), or a dotted
    path `package.module:function` from (prompt, response) to a number."""
    output: Place | None = None
    """File that `jobs.decode` writes (jsonl or parquet; without an ending, a folder that `datasets` reads); default: in the
    run's folder."""

    @model_validator(mode="after")
    def _bounds(self) -> SamplingConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError("min_new_tokens: must not exceed max_new_tokens")
        return self


class DecodingConfig(Section):
    """How `jobs.decode` finds completions. Lengths, temperature, filters, seed, prompts and scorer are those of `sampling`."""

    method: Name = "sampling"
    """One of `pipeline.decoding.DECODERS`: sampling, beam, best_of_n, vote, args, controlled, transfer_q, proxy."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """sampling, best_of_n, vote, proxy: leave out tokens less likely than this share of the likeliest."""
    engine: Literal["transformers", "vllm", "auto"] = "transformers"
    """sampling, best_of_n: `vllm` needs a GPU and its package, and draws with other random numbers; `auto`: where both are there."""
    engine_memory: Annotated[float, Field(gt=0, le=1)] = 0.8
    """vllm: its share of the GPU's memory; other models need the rest."""
    beams: Copies = 4
    length_penalty: Annotated[float, Field(ge=-50, le=50)] = 1.0
    """beam: a response of n tokens scores Σ log π / n^length_penalty."""
    early_stopping: bool | Literal["never"] = False
    """beam: when a prompt with enough finished responses is done; as in transformers."""
    n: Copies = 8
    """best_of_n, vote: samples per completion."""
    candidates: Count = 10
    """args, controlled, transfer_q: likeliest tokens of the reference that are looked at."""
    alpha: Positive = 1.0
    """args, controlled, transfer_q: π ∝ π_ref · exp(Q/α); the smaller, the further from the reference."""
    rollouts: Copies = 2
    """controlled, transfer_q: sampled continuations per candidate."""
    rollout_tokens: Count | None = None
    """Tokens of one, at most; default: to `sampling.max_new_tokens`."""
    rollout_temperature: Annotated[float, Field(ge=0)] = 1.0
    """0: one greedy continuation per candidate."""
    reference: Place | None = None
    """args, controlled, transfer_q, proxy: the model before alignment; default: the run's reference."""
    baseline: Place | None = None
    """transfer_q: the aligned model that makes the roll-outs; default: the policy."""
    baseline_scorer: Place | None = None
    """transfer_q: the reward that the baseline was aligned to, where it is another than `sampling.scorer` (indirect transfer)."""
    beta: Positive | None = None
    """transfer_q, indirect: strength of the baseline's leash; default: objective.beta."""
    base: Place | None = None
    """proxy: the model that the policy's change is added to; default: the reference."""
    weight: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    """proxy: how much of the change is added."""
    logprobs: tuple[Literal["policy", "reference"], ...] = ("policy", "reference")
    """Models whose log-probabilities of the tokens are written; one that the decoder has no other use for is loaded for them."""
    rows_per_piece: Count = 64
    """Prompts that are decoded and written together: what a killed job repeats at most, per actor."""


class EvaluationConfig(Section):
    """What `jobs.eval` measures."""

    evaluators: tuple[Name, ...] | None = None
    """Names of `pipeline.evaluation.EVALUATORS`; default: all, those of samples where a scorer is set or --sample is given."""
    against: Place | None = None
    """A second model, run or checkpoint, whose samples of the same prompts are compared with the policy's."""
    bins: Annotated[int, Field(ge=2, le=1000)] = 10
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
        check_answer_pattern(self.answer_pattern)
        return self
