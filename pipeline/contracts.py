"""Every data contract of the pipeline, in the order in which a batch meets them.

    record ──data──▶ row ──collate──▶ Batch ──model──▶ PolicyOut ──objective──▶ LossOut

Symbols, here and in every docstring: B prompts, K responses per prompt (best first), P prompt tokens,
R response tokens, T tokens of a packed row `[prompt | response 1 | … | response K]`. β is the strength of
the KL leash, ρ a token's log-ratio log π − log π_ref, ℓ = Σρ its sum over a response.

Left out on purpose: how any of these is produced. Each producer is a module of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, ClassVar, Literal

import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, model_validator
from torch import Tensor

# ------------------------------------------------------------------------------------------------ records

Text = Annotated[str, StringConstraints(strict=True, min_length=1)]


class Message(BaseModel):
    """One turn of a dialogue, as chat templates read it."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    role: Text
    content: Annotated[str, StringConstraints(strict=True)]


Prompt = Annotated[str, StringConstraints(strict=True)] | Annotated[list[Message], Field(min_length=1)]
"""Plain text (may be empty: unconditional), or the dialogue up to the answer."""


class Record(BaseModel):
    """What a user's file holds, one per line. Unknown columns are ignored, wrong ones are refused."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    prompt: Prompt
    weight: Annotated[FiniteFloat, Field(ge=0)] = 1.0

    @property
    def ranked(self) -> list[str]:
        """The responses, best first."""
        raise AssertionError("a record kind says how its responses are ranked")


class Demonstration(Record):
    """{"prompt": …, "response": "…"}"""

    response: Text

    @property
    def ranked(self) -> list[str]:
        return [self.response]


class PreferencePair(Record):
    """{"prompt": …, "chosen": "…", "rejected": "…", "weight": 1.0}"""

    chosen: Text
    rejected: Text

    @model_validator(mode="after")
    def _differ(self) -> PreferencePair:
        if self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same text")
        return self

    @property
    def ranked(self) -> list[str]:
        return [self.chosen, self.rejected]


class Ranking(Record):
    """{"prompt": …, "responses": ["…", …], "ranks": [1, 2, …]} (1 = best) or "scores" (higher = better)."""

    responses: Annotated[list[Text], Field(min_length=2)]
    ranks: list[Annotated[FiniteFloat, Field()]] | None = None
    scores: list[FiniteFloat] | None = None

    @model_validator(mode="after")
    def _orderable(self) -> Ranking:
        if (self.ranks is None) == (self.scores is None):
            raise ValueError("give either ranks (1 = best) or scores (higher = better)")
        if len(self.keys) != len(self.responses):
            raise ValueError(f"{len(self.responses)} responses but {len(self.keys)} ranks or scores")
        if len(set(self.responses)) != len(self.responses):
            raise ValueError("two responses are the same text")
        return self

    @property
    def keys(self) -> list[float]:
        """Ascending sort keys: the best response has the lowest."""
        return list(self.ranks) if self.ranks is not None else [-score for score in self.scores or []]

    @property
    def ranked(self) -> list[str]:
        order = sorted(range(len(self.responses)), key=self.keys.__getitem__)
        return [self.responses[k] for k in order]

    @property
    def tied(self) -> bool:
        return len(set(self.keys)) < len(self.keys)


RecordKind = Literal["demonstration", "preference", "ranking"]
"""Kinds of record. Unpaired (prompt, response, label) and Trajectory (prompt, steps) join here, in `RECORDS`,
and as columns of `ROW_SCHEMA`; nothing else in the pipeline lists the kinds."""

RECORDS: dict[str, type[Record]] = {
    "demonstration": Demonstration,
    "preference": PreferencePair,
    "ranking": Ranking,
}

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
    ]
)
"""Tokenised rows, as `prepare` writes them. Environment masks and token rewards will be further columns."""

REFERENCE_SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.int64(), nullable=False),
        pa.field("ref_logprobs", pa.list_(pa.list_(pa.float32())), nullable=False),  # K × [R_k], nats
    ]
)
"""Per-token reference log-probabilities, a cache of its own that joins the rows by `row_id`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt with its K responses, ready for `collate`. Built from `ROW_SCHEMA` ⋈ `REFERENCE_SCHEMA`."""

    row_id: int
    prompt_ids: list[int]  # [P]
    response_ids: list[list[int]]  # K × [R_k]
    ref_logprobs: list[list[float]] | None = None  # K × [R_k]
    weight: float = 1.0  # 0 = filler: keeps ranks in step, changes nothing

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
    response_mask: Tensor  # [B, K, R] bool: tokens that are trained on
    valid: Tensor  # [B, K] bool: responses that exist (ragged K)
    weight: Tensor  # [B] float32: 0 for fillers
    row_ids: Tensor  # [B] int64
    ref_logprobs: Tensor | None = None  # [B, K, R] float32, 0 where masked

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: v.to(device, non_blocking=True) if v is not None else None for k, v in moved.items()})


@dataclass(frozen=True, slots=True)
class PolicyOut:
    """What one forward of the policy yields; optional fields are filled as `Needs` asks."""

    logprobs: Tensor  # [B, K, R] float32: log π(response token | prefix), 0 where masked


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


TermGroup = Literal["policy", "critic", "latent"]


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
    reference: Literal["none", "token", "distribution"] = "none"


class Objective(BaseModel):
    """A training objective: its hyper-parameters (this model *is* the config section `objective`) and its maths.

    Subclasses set `needs`, define `weight` and `__call__`, and pick tensors for a pure function that has
    worked-number tests. `pipeline.objectives.OBJECTIVES` names the built-in ones; a user's own class is given
    as a dotted path, `objective: {name: "my_package.my_module:MyObjective", …}`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    needs: ClassVar[Needs]

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
