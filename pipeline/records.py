"""What a user's files hold: one record per prompt, of one of five kinds.

    demonstration   preference   ranking   unpaired   trajectory

A prompt is plain text or a `Dialogue`. A response is text, or the assistant's `Message` where it holds more than text.

Left out: the many layouts that such records come in (`layouts`, `trajectories`), and tokens (`rendering`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, overload

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, StringConstraints, model_validator

Text = Annotated[str, StringConstraints(strict=True, min_length=1)]
Strict = Annotated[str, StringConstraints(strict=True)]


_NOTHING_MORE = (None,) * 4


class Message(BaseModel):
    """One turn of a dialogue, as chat templates read it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    role: Text
    content: Strict | None = None
    reasoning_content: Strict | None = None
    """Thoughts before the content; where they stand in the turn is the template's to say."""
    tool_calls: tuple[dict[str, Any], ...] | None = None
    """{"type": "function", "id"?, "function": {"name", "arguments": an object or its JSON text}} each."""
    tool_call_id: Strict | None = None
    """Of a tool's answer: which call it answers."""
    name: Strict | None = None

    @property
    def plain(self) -> bool:
        """Whether it holds nothing but a role and its words."""
        more = (self.reasoning_content, self.tool_calls, self.tool_call_id, self.name)
        return self.content is not None and more == _NOTHING_MORE

    @property
    def beside(self) -> dict[str, Any]:
        """What it holds beside a role and its words."""
        fields = {name: getattr(self, name) for name in ("reasoning_content", "tool_calls", "tool_call_id", "name")}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Dialogue(Sequence[Message]):
    """Messages, and what else their template reads. Slices keep the rest."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    """{"type": "function", "function": {"name", "description", "parameters"}} each."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further variables of the template, e.g. {"enable_thinking": false}."""
    continued: bool = False
    """Whether the response goes on in the last turn, an assistant's, instead of being a turn of its own."""

    @classmethod
    def of(cls, messages: Iterable[Message]) -> Dialogue:
        """The same dialogue, or one of messages alone."""
        return messages if isinstance(messages, cls) else cls(tuple(messages))

    @overload
    def __getitem__(self, place: int) -> Message: ...
    @overload
    def __getitem__(self, place: slice) -> Dialogue: ...
    def __getitem__(self, place: int | slice) -> Message | Dialogue:
        found = self.messages[place]
        return replace(self, messages=found, continued=False) if isinstance(found, tuple) else found

    def __len__(self) -> int:
        return len(self.messages)

    def followed_by(self, *messages: Message) -> Dialogue:
        """The dialogue with more turns."""
        return replace(self, messages=(*self.messages, *messages), continued=False)


def _read_dialogue(value: Any) -> Any:
    if isinstance(value, list | tuple) and value:
        return Dialogue(tuple(Message.model_validate(turn) for turn in value))
    return value


Prompt = Strict | Annotated[Dialogue, BeforeValidator(_read_dialogue)]
"""Plain text (may be empty: unconditional), or the dialogue up to the answer."""
Response = Text | Message


def as_response(message: Message) -> str | Message:
    """The words of an assistant's message, or the message where it holds more than words."""
    return message.content if message.plain and message.role == "assistant" and message.content else message


def said(response: str | Message) -> str:
    """Everything that a response says, as text to compare and to look at."""
    if isinstance(response, str):
        return response
    calls = [json.dumps(response.tool_calls, ensure_ascii=False)] if response.tool_calls else []
    return "\n".join([text for text in (response.reasoning_content, response.content) if text] + calls)


class Record(BaseModel):
    """What a user's file holds, one per line. Unknown columns are ignored, wrong ones are refused."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    prompt: Prompt
    weight: Annotated[FiniteFloat, Field(ge=0)] = 1.0

    @property
    def ranked(self) -> list[str | Message]:
        """The responses, best first."""
        raise AssertionError("a record kind says how its responses are ranked")


class Demonstration(Record):
    """{"prompt": …, "response": "…"}"""

    response: Response

    @property
    def ranked(self) -> list[str | Message]:
        return [self.response]


class PreferencePair(Record):
    """{"prompt": …, "chosen": "…", "rejected": "…", "weight": 1.0}"""

    chosen: Response
    rejected: Response

    @model_validator(mode="after")
    def _differ(self) -> PreferencePair:
        if self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same text")
        return self

    @property
    def ranked(self) -> list[str | Message]:
        return [self.chosen, self.rejected]


class Ranking(Record):
    """{"prompt": …, "responses": ["…", …], "ranks": [1, 2, …]} (1 = best) or "scores" (higher = better)."""

    responses: Annotated[list[Response], Field(min_length=2)]
    ranks: list[Annotated[FiniteFloat, Field()]] | None = None
    scores: list[FiniteFloat] | None = None

    @model_validator(mode="after")
    def _orderable(self) -> Ranking:
        if (self.ranks is None) == (self.scores is None):
            raise ValueError("give either ranks (1 = best) or scores (higher = better)")
        if len(self.keys) != len(self.responses):
            raise ValueError(f"{len(self.responses)} responses but {len(self.keys)} ranks or scores")
        if any(self.responses[i] in self.responses[:i] for i in range(len(self.responses))):
            raise ValueError("two responses are the same text")
        return self

    @property
    def keys(self) -> list[float]:
        """Ascending sort keys: the best response has the lowest."""
        return list(self.ranks) if self.ranks is not None else [-score for score in self.scores or []]

    @property
    def ranked(self) -> list[str | Message]:
        order = sorted(range(len(self.responses)), key=self.keys.__getitem__)
        return [self.responses[k] for k in order]

    @property
    def tied(self) -> bool:
        return len(set(self.keys)) < len(self.keys)


class Unpaired(Record):
    """{"prompt": …, "response": "…", "label": true}: good or bad, with nothing to compare it with."""

    response: Response
    label: bool

    @property
    def ranked(self) -> list[str | Message]:
        return [self.response]


class Step(BaseModel):
    """A stretch of a trajectory: written by the policy, or by the environment (a tool's output, another speaker)."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    text: Strict
    """Empty only for an environment's turn without words, or the policy's that consists of calls."""
    reward: FiniteFloat = 0.0
    """Process reward: lands on the step's last token."""
    role: Literal["policy", "environment"] = "policy"
    """Environment tokens are context: never trained on, without importance ratio."""
    speaker: Text = "user"
    """Of an environment step in a dialogue: the role under which the chat template writes it."""
    logprob: FiniteFloat | None = None
    """Log-probability of the whole step under the policy that wrote it, nats; the last one includes the end token."""
    message: Message | None = None
    """Of a dialogue's turn: the turn, whose words `text` is. Steps without are parts of a turn."""


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
        """All that the steps say, one after the other."""
        return "".join(step.text if step.message is None else said(step.message) for step in self.steps)


class Trajectories(Record):
    """{"prompt": …, "trajectories": [{"steps": [{"text": …, "reward": 0.2}, …], "reward": 1.0}, …]}"""

    trajectories: Annotated[list[Trajectory], Field(min_length=1)]

    @property
    def best_first(self) -> list[Trajectory]:
        """By return; those of equal return in the order of the file."""
        return sorted(self.trajectories, key=lambda trajectory: -trajectory.total)

    @property
    def ranked(self) -> list[str | Message]:
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

_BESIDE = frozenset(
    {
        "prompt",
        "messages",
        "conversations",
        "conversation",
        "system",
        "tools",
        "functions",
        "chat_template_kwargs",
        "weight",
    }
)
FIELDS: dict[str, frozenset[str]] = {
    "demonstration": _BESIDE | {"response"},
    "preference": _BESIDE | {"chosen", "rejected"},
    "ranking": _BESIDE | {"responses", "ranks", "scores"},
    "unpaired": _BESIDE | {"response", "completion", "label"},
    "trajectory": _BESIDE
    | {"trajectories", "steps", "response", "completion", "reward", "step_rewards", "step_logprobs"},
}
"""What is read of a raw record of each kind, in whatever layout; other columns are ignored."""
