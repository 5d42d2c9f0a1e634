"""Trajectories out of a raw record: steps, who wrote them, their rewards and log-probabilities.

A record holds one trajectory, or several of the same prompt in a list `trajectories`. Each is
  * `steps`: a list of texts or of objects with `text` and, where there is something to say, `reward`, `role` (policy or
    environment), `speaker` (of an environment step) and `logprob`, or `logprobs` of its tokens, which are summed;
    rewards and log-probabilities may stand beside the steps in `step_rewards` and `step_logprobs`, one for each;
  * or one step in `response` (or `completion`);
  * or a dialogue in `messages` or `conversations`: turns before the first assistant turn are the prompt, each later one
    is a step: the assistant's the policy's, others the environment's (tools' answers, and an assistant's that is marked not to be
    trained on); turns take `reward` and `logprob` as steps do;
and `reward`, the terminal one. A trajectory that has no reward anywhere is refused: a column is misnamed.

Equal trajectories of a record stay: they are samples, and how often one was drawn is what its policy thought of it. Only
such that say the same and return different rewards are refused.

Left out: columns of other layouts (`columns`), tokens (`steps`).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby, pairwise
from typing import Any

from pipeline.dialogues import UNSHARED, Prompt, agreed, check_number, completed, explicit_prompt, refuse_empty
from pipeline.messages import DIALOGUES, declared_tools, kind_of, turns_of
from pipeline.records import Dialogue, Message, said

RESPONSES = ("response", "completion")
"""Names of a single response."""
_FLOAT32_MAX = 3.4e38


def trajectories(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `records.Trajectories`. Raises ValueError with a short reason."""
    several = given.get("trajectories", [given])
    if not isinstance(several, list):
        raise ValueError(f"wrong type: trajectories is {kind_of(several)}, expected a list")
    if not several:
        raise ValueError("no trajectories")
    found = [_trajectory(entry) for entry in several]
    prompt = _prompt(_with_tools(given, several), [before for before, _ in found], nested="trajectories" in given)
    if isinstance(prompt, Dialogue) and any(steps["steps"][0]["role"] == "environment" for _, steps in found):
        raise ValueError("a trajectory of a dialogue begins with the environment; put that into the prompt")
    ways = [way for _, way in found]
    for way in ways:
        if abs(way["reward"]) + sum(abs(step.get("reward", 0.0)) for step in way["steps"]) > _FLOAT32_MAX:
            raise ValueError("rewards whose sum is beyond float32")
        if sum(abs(step.get("logprob", 0.0)) for step in way["steps"]) > _FLOAT32_MAX:
            raise ValueError("logprobs whose sum is beyond float32")
    _refuse_contradictions(ways)
    return {"prompt": prompt, "trajectories": ways}


def _with_tools(given: dict[str, Any], several: list[Any]) -> dict[str, Any]:
    """The record with the tools that its trajectories name; they share a prompt, so they have to be the same."""
    tools = [declared_tools(entry) or declared_tools(given) for entry in several]
    if any(other != tools[0] for other in tools):
        raise ValueError("the trajectories of a record have different tools")
    return given | ({"tools": tools[0]} if tools[0] else {})


def _prompt(given: dict[str, Any], befores: list[Dialogue | None], nested: bool) -> Prompt:
    """The prompt, from what the record says and what its dialogues begin with (None: there is no dialogue)."""
    if any(before != other for before, other in pairwise(befores)):
        raise ValueError(UNSHARED)
    before = befores[0]
    fields = ("prompt", *DIALOGUES) if before is None or (nested and not before) else ("prompt",)
    prompt = explicit_prompt(given, fields)
    if before is not None:
        prompt = agreed(prompt, before)
    elif prompt is None:
        raise ValueError("missing field: prompt")
    return completed(prompt, given)


def _trajectory(entry: Any) -> tuple[Dialogue | None, dict[str, Any]]:
    """Turns before the first step, if the entry is a dialogue, and the fields of a `records.Trajectory`."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"wrong type: a trajectory is {kind_of(entry)}, expected steps and reward")
    given = {field: value for field, value in entry.items() if value is not None}
    field = next((field for field in ("steps", *RESPONSES, *DIALOGUES) if field in given), None)
    if field is None:
        raise ValueError("missing field: steps")
    before: Dialogue | None = None
    if field == "steps":
        steps = [_step(step) for step in _list(given["steps"], "steps")]
    elif field in RESPONSES and isinstance(given[field], str):
        refuse_empty({field: given[field]})
        steps = [_step(given[field])]
    else:
        before, steps = _turns(given[field], field)
    _beside(given, steps)
    if not any(step["role"] == "policy" for step in steps):
        raise ValueError("no policy step" if steps else "no steps")
    if "reward" not in given and not any("reward" in step for step in steps):
        raise ValueError("missing field: reward (inside each trajectory, or of a step)")
    refuse_empty({"the policy's steps": "".join(_said(step) for step in steps if step["role"] == "policy")})
    return before, {"steps": steps, "reward": _reward(given.get("reward", 0.0), "reward")}


def _turns(value: Any, name: str) -> tuple[Dialogue, list[dict[str, Any]]]:
    """A dialogue's turns before the first assistant turn, and the others as steps."""
    turns = turns_of(value, name)
    first = next((i for i, turn in enumerate(turns) if turn.message.role == "assistant" and turn.trained), None)
    if first is None:
        raise ValueError(f"no assistant turn: {name}")
    steps = []
    for turn in turns[first:]:
        role = turn.message.role
        policy = role == "assistant" and turn.trained
        author = {"role": "policy"} if policy else {"role": "environment", "speaker": role}
        steps.append(_step({"text": turn.message.content or "", **author, **(turn.rewards or {})}, turn.message))
    return Dialogue(tuple(turn.message for turn in turns[:first])), steps


def _step(value: Any, message: Message | None = None) -> dict[str, Any]:
    """The fields of a `records.Step`; message: the turn that it is, of a dialogue."""
    given = {"text": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping):
        raise ValueError(f"wrong type: a step is {kind_of(given)}, expected text or an object with text")
    text, role, speaker = given.get("text"), given.get("role") or "policy", given.get("speaker") or "user"
    if text is None or (text == "" and role == "policy" and (message is None or not said(message))):
        raise ValueError("step without text")
    for name, content in (("text", text), ("role", role), ("speaker", speaker)):
        if not isinstance(content, str):
            raise ValueError(f"wrong type: a step's {name} is {kind_of(content)}, expected text")
    if role not in ("policy", "environment"):
        raise ValueError("wrong role: a step's is neither policy nor environment")
    step: dict[str, Any] = {"text": text, "role": role, "speaker": speaker}
    if message is not None:
        step["message"] = message
    if given.get("reward") is not None:
        step["reward"] = _reward(given["reward"], "step's reward")
    if given.get("logprob") is not None and given.get("logprobs") is not None:
        raise ValueError("both logprob and logprobs of a step")
    if given.get("logprobs") is not None:
        step["logprob"] = sum(_logprob(number) for number in _list(given["logprobs"], "logprobs"))
    if given.get("logprob") is not None:
        step["logprob"] = _logprob(given["logprob"])
    return step


def _beside(given: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    """Put what stands in lists beside the steps into them."""
    for field, name, checked in (("step_rewards", "reward", _step_reward), ("step_logprobs", "logprob", _logprob)):
        if field not in given:
            continue
        numbers = _list(given[field], field)
        if len(numbers) != len(steps):
            raise ValueError(f"different numbers of steps and {field}")
        if any(name in step for step in steps):
            raise ValueError(f"both {field} and a step's own {name}")
        for step, number in zip(steps, numbers, strict=True):
            if number is not None:
                step[name] = checked(number)


def _refuse_contradictions(ways: list[dict[str, Any]]) -> None:
    """Ways with the same words have to return the same."""
    returns: dict[tuple[tuple[str, str], ...], float] = {}
    for way in ways:
        words = _words(way["steps"])
        total = way["reward"] + sum(step.get("reward", 0.0) for step in way["steps"])
        if returns.setdefault(words, total) != total:
            raise ValueError("equal trajectories with different rewards")


def _words(steps: list[dict[str, Any]]) -> tuple[tuple[str, str], ...]:
    """Who says what, one after the other: whole turns of a dialogue, and of a text what one author wrote in a row."""
    runs = groupby(enumerate(steps), lambda placed: (placed[1]["role"], placed[0] if "message" in placed[1] else None))
    return tuple((role, "".join(_said(step) for _, step in run)) for (role, _), run in runs)


def _said(step: dict[str, Any]) -> str:
    return said(step["message"]) if "message" in step else step["text"]


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"wrong type: {field} is {kind_of(value)}, expected a list")
    if not value:
        raise ValueError(f"no {field}")
    return value


def _reward(value: Any, name: str) -> float:
    """A number; true and false count as 1 and 0, as outcome and process labels have them."""
    if isinstance(value, bool):
        return float(value)
    check_number(value, name)
    if abs(value) > _FLOAT32_MAX:
        raise ValueError(f"{name} beyond float32")
    return float(value)


def _step_reward(value: Any) -> float:
    return _reward(value, "step's reward")


def _logprob(value: Any) -> float:
    check_number(value, "logprob")
    if value > 0:
        raise ValueError("positive logprob")
    if value < -_FLOAT32_MAX:
        raise ValueError("logprob beyond float32")
    return float(value)
