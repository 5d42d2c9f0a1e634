"""Every data contract of the pipeline behind a user's record, in the order in which a batch meets them.

    record ──data──▶ row ──collate──▶ Batch ──model──▶ PolicyOut ──objective──▶ LossOut

Symbols, here and in every docstring: B prompts, K responses per prompt (best first), P prompt tokens,
R response tokens, S steps of a trajectory, n latent thoughts, D hidden width, T tokens of a packed row `[prompt | response 1 | … | response K]`. β is the strength of
the KL leash, ρ a token's log-ratio log π − log π_ref, ℓ = Σρ its sum over a response.

Left out on purpose: how any of these is produced. Each producer is a module of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict, field_validator
from torch import Tensor

from pipeline.records import RecordKind
from pipeline.sections.base import representable

# --------------------------------------------------------------------------------------------------- rows

ROW_SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.int64(), nullable=False),  # place of the record in its sources: sorts rows, joins caches
        pa.field("source", pa.string(), nullable=False),  # "file:line", for messages to people
        pa.field("source_index", pa.int16(), nullable=False),  # which of data.sources (mixing)
        pa.field("prompt_hash", pa.int64(), nullable=False),  # equal prompts never straddle train and eval
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),  # [P]
        pa.field("response_ids", pa.list_(pa.list_(pa.int32())), nullable=False),  # K × [R_k], best first
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("trained", pa.list_(pa.list_(pa.bool_()))),  # K × [R_k]; null: all tokens are the policy's
        pa.field("token_rewards", pa.list_(pa.list_(pa.float32()))),  # K × [R_k]; null: the kind has no rewards
        pa.field("behaviour_logprobs", pa.list_(pa.float32())),  # K, null where not logged; null: nowhere
        pa.field("step_ends", pa.list_(pa.list_(pa.int32()))),  # K × steps: last token of each; null: no trajectories
        pa.field("mismatched", pa.bool_(), nullable=False),  # the last response answers another prompt
    ]
)
"""Tokenised rows, as `prepare` writes them. The label of an unpaired response is a reward of ±1 on its last token."""

REFERENCE_SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.int64(), nullable=False),
        pa.field("ref_logprobs", pa.list_(pa.list_(pa.float32())), nullable=False),  # K × [R_k], nats
    ]
)
"""Per-token reference log-probabilities, a cache of its own that joins the rows by `row_id`."""

STATES_SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.int64(), nullable=False),
        pa.field("ref_states", pa.large_binary(), nullable=False),  # [n, D] of the manifest's dtype, n trained tokens
    ]
)
"""The reference's last hidden states, for an exact KL without its trunk. Optional; joins the rows by `row_id`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt with its K responses, ready for `collate`. Built from `ROW_SCHEMA` ⋈ `REFERENCE_SCHEMA`."""

    row_id: int
    prompt_ids: list[int]  # [P]
    response_ids: list[list[int]]  # K × [R_k]
    ref_logprobs: list[list[float]] | None = None  # K × [R_k]
    ref_states: Tensor | None = None  # [n, D]: the reference's states that predict the row's n trained tokens
    weight: float = 1.0  # 0 = filler: keeps ranks in step, changes nothing
    trained: list[list[bool]] | None = None  # K × [R_k]: False on the environment's tokens
    token_rewards: list[list[float]] | None = None  # K × [R_k]
    behaviour_logprobs: list[float | None] | None = None  # K
    mismatched: bool = False  # the last response answers another prompt
    step_ends: list[list[int]] | None = None  # K × steps: the token with which each ends

    @property
    def tokens(self) -> int:
        """Length T of the packed row: what a step of this row costs."""
        return len(self.prompt_ids) + sum(map(len, self.response_ids))


# ------------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True, slots=True)
class Batch:
    """B packed rows, padded on the right. `segment` is 0 on the prompt, k on response k, −1 on padding."""

    input_ids: Tensor  # [B, T] int64
    position_ids: Tensor  # [B, T] int64: restart at the prompt's end for each response
    segment: Tensor  # [B, T] int64
    predictor: Tensor  # [B, K, R] int64: index into T of the hidden state that predicts this response token
    response_ids: Tensor  # [B, K, R] int64
    response_mask: Tensor  # [B, K, R] bool: tokens that are trained on (neither padding nor the environment's)
    valid: Tensor  # [B, K] bool: responses to this prompt (ragged K) that have a token to train on
    weight: Tensor  # [B] float32: 0 for fillers
    row_ids: Tensor  # [B] int64
    ref_logprobs: Tensor | None = None  # [B, K, R] float32, 0 where masked
    ref_states: Tensor | None = None  # [N, D], in the order of response_mask's True places
    token_rewards: Tensor | None = None  # [B, K, R] float32; may stand on the environment's tokens, too
    behaviour_logprobs: Tensor | None = None  # [B, K] float32: log μ(response), nan where not logged
    step_ends: Tensor | None = (
        None  # [B, K, S] int64: index into R of the token that ends each step, −1 where there is none
    )
    carried: Mapping[str, float] = field(default_factory=dict)  # `Needs.carried` metrics of the step before
    seed: int = 0  # of what its forward draws (dropout in adapters)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {k: v.to(device, non_blocking=True) for k, v in moved.items() if isinstance(v, Tensor)}
        return Batch(**(moved | tensors))

    @property
    def returns(self) -> Tensor:
        """Each response's sum of rewards. [B, K]"""
        assert self.token_rewards is not None
        return self.token_rewards.sum(-1)


@dataclass(frozen=True)  # no slots: under ZeRO-3 DeepSpeed looks for tensors in its __dict__
class PolicyOut:
    """What one forward of the policy (and the critic) yields; optional fields are filled as `Needs` asks."""

    logprobs: Tensor  # [B, K, R] float32: log π(response token | prefix), 0 where masked
    kl: Tensor | None = None  # [B, K, R] float32: KL of the two next-token distributions, 0 where masked
    values: Tensor | None = None  # [B, K, R] float32: V(s) of the state before the token, 0 where masked
    states: Tensor | None = None  # [N, D], detached: hidden states behind the N trained tokens, for a value head
    scores: Tensor | None = None  # [B, K] float32: a reward model's verdict (it has no log-probs: they are 0)
    thoughts: Tensor | None = None  # [B, n, D] float32: latent thoughts between the prompt and its responses
    question: Tensor | None = None  # [B, D] float32: what the prior made of the prompt's last token
    steps: Tensor | None = (
        None  # [B, S, D] float32: and of the tokens that end the best response's steps; 0 behind them
    )
    step_texts: Tensor | None = None  # [B, S, D] float32, detached: mean input embedding of each of these steps' tokens


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean that has not been divided yet: totals and weights add up over micro-batches and ranks."""

    total: Tensor  # scalar
    weight: Tensor  # scalar

    @classmethod
    def of(cls, values: Tensor, weights: Tensor) -> Mean:
        """Weighted sum of `values`, detached, as metrics are; `weights` has a shape that broadcasts to `values`."""
        weights = weights.to(values.dtype).expand_as(values)
        # where(): a masked-out inf or nan must not leak through 0 · inf.
        kept = torch.where(weights > 0, values.detach(), torch.zeros_like(values))
        return cls((kept * weights).sum(), weights.sum())


TermGroup = Literal["policy", "critic"]


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of the loss: coefficient · total / (the whole optimizer step's weight over all ranks)."""

    total: Tensor  # scalar, differentiable
    coefficient: float = 1.0
    group: TermGroup = "policy"  # whose parameters (and optimizer) it moves


@dataclass(frozen=True, slots=True)
class LossOut:
    """Totals, never means: `loop.train_step` alone divides, by the weights of `Objective.weight`."""

    terms: Mapping[str, Term]
    metrics: Mapping[str, Mean] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------- objectives


@dataclass(frozen=True, slots=True)
class Needs:
    """What an objective asks of the pipeline. The pipeline supplies it and never asks for the objective's name."""

    records: frozenset[RecordKind]
    reference: Literal["none", "token"] = "none"
    """Log-probs of the response tokens under the reference, computed once and cached."""
    kl: Literal["none", "forward", "reverse"] = "none"
    """Exact per-token KL over the vocabulary: forward = KL(π_ref ‖ π), reverse = KL(π ‖ π_ref)."""
    critic: bool = False
    """V(s) before each response token, from a network with an optimizer of its own (config section `critic`)."""
    behaviour: bool = False
    """Log-probs under the policy that made the data; refused unless every row has them."""
    mismatched: bool = False
    """Behind each row's own response one to another prompt (`prepare` picks it)."""
    carried: tuple[str, ...] = ()
    """Metrics whose global value in the step before comes back in `Batch.carried`."""
    model: Literal["policy", "reward"] = "policy"
    """A language model, or the same trunk with a scalar head that scores whole responses."""
    latent: Literal["none", "thoughts", "steps"] = "none"
    """Latent thoughts before the answer (config section `latent`); `steps`: also what the prior makes of the best
    response's steps."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """A range that a metric must not leave: the pipeline warns, once, in these words."""

    metric: str
    advice: str
    low: float = -math.inf
    high: float = math.inf


class Objective(BaseModel):
    """A training objective: its hyper-parameters (this model *is* the config section `objective`) and its maths.

    Subclasses set `needs`, define `weight` and `__call__`, and pick tensors for a pure function that has
    worked-number tests. `pipeline.objectives.OBJECTIVES` names the built-in ones; a user's own class is given
    as a dotted path, `objective: {name: "my_package.my_module:MyObjective", …}`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    needs: ClassVar[Needs]
    alarms: ClassVar[tuple[Alarm, ...]] = ()
    _numbers = field_validator("*")(representable)
    bradley_terry: ClassVar[bool] = False
    """Whether σ(implied reward − implied reward) is the probability that the loss gives a preference: it can be calibrated."""

    def needed(self) -> Needs:
        """What this configuration needs, where hyper-parameters change it; default: `needs`."""
        return self.needs

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        """Denominator of each term of `__call__`, from masks and weights alone (so that it is known before
        the first backward and can be summed over ranks and micro-batches). Scalars, by term name."""
        raise NotImplementedError

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        """Undivided loss terms, under the names that `weight` returns, and the objective's own metrics."""
        raise NotImplementedError

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """Implicit reward of each response token, [B, K, R], 0 where masked: the credit that the heatmap shows."""
        raise NotImplementedError

    def implied_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """Implicit reward of each response, [B, K]: what margins, accuracy and calibration are computed from."""
        return self.token_reward(out, batch).sum(-1)
