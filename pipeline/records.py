"""What a user's files hold: one record per prompt, of one of five kinds.

    demonstration   preference   ranking   unpaired   trajectory

Left out: the many layouts that such records come in (`layouts`, `trajectories`), and tokens (`rendering`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, model_validator

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


class Unpaired(Record):
    """{"prompt": …, "response": "…", "label": true}: good or bad, with nothing to compare it with."""

    response: Text
    label: bool

    @property
    def ranked(self) -> list[str]:
        return [self.response]


class Step(BaseModel):
    """A stretch of a trajectory: written by the policy, or by the environment (a tool's output, another speaker)."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    text: Text
    reward: FiniteFloat = 0.0
    """Process reward: lands on the step's last token."""
    role: Literal["policy", "environment"] = "policy"
    """Environment tokens are context: never trained on, without importance ratio."""
    speaker: Text = "user"
    """Of an environment step in a dialogue: the role under which the chat template writes it."""
    logprob: FiniteFloat | None = None
    """Log-probability of the whole step under the policy that wrote it, nats; the last one includes the end token."""


class Trajectory(BaseModel):
    """One way from the prompt to an end, with its rewards."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    steps: Annotated[list[Step], Field(min_length=1)]
    reward: FiniteFloat = 0.0
    """Terminal reward: lands on the trajectory's last token."""

    @property
    def total(self) -> float:
        """The undiscounted return: what trajectories of one prompt are ranked by."""
        return self.reward + sum(step.reward for step in self.steps)

    @property
    def behaviour_logprob(self) -> float | None:
        """log μ(trajectory): the sum over the policy's steps, or None unless all of them were logged."""
        logged = [step.logprob for step in self.steps if step.role == "policy"]
        return None if None in logged else sum(value for value in logged if value is not None)

    @property
    def text(self) -> str:
        """All steps, one after the other."""
        return "".join(step.text for step in self.steps)


class Trajectories(Record):
    """{"prompt": …, "trajectories": [{"steps": [{"text": …, "reward": 0.2}, …], "reward": 1.0}, …]}"""

    trajectories: Annotated[list[Trajectory], Field(min_length=1)]

    @property
    def best_first(self) -> list[Trajectory]:
        """By return; those of equal return in the order of the file."""
        return sorted(self.trajectories, key=lambda trajectory: -trajectory.total)

    @property
    def ranked(self) -> list[str]:
        return [trajectory.text for trajectory in self.best_first]


RecordKind = Literal["demonstration", "preference", "ranking", "unpaired", "trajectory"]
"""Kinds of record; nothing but this and `RECORDS` lists them for the whole pipeline."""

RECORDS: dict[str, type[Record]] = {
    "demonstration": Demonstration,
    "preference": PreferencePair,
    "ranking": Ranking,
    "unpaired": Unpaired,
    "trajectory": Trajectories,
}
