r"""One raw record, in any of the common layouts, to a `contracts.Record`.

Prompts, in this order of preference:
  * `prompt`: text, or chat messages; text stays text (hh-rlhf transcripts too), no template is applied to it;
  * `messages` or `conversations` (also with the ShareGPT names from / value): a dialogue;
  * none: what the responses share. Of dialogues, all turns before the final answer. Of hh-rlhf transcripts, all up to
    the last "\n\nAssistant:" they share. Of other texts, the longest common beginning, cut back to the end of a word
    (white space goes to the responses). Words that two answers happen to share then count as prompt: an explicit
    prompt is better.
A text in `system` becomes the first turn. Responses are texts, or dialogues whose last assistant turn is the response;
turns after it are dropped. If a dialogue holds more than the answer, what comes before is the prompt, and a `prompt`
beside it must agree. Text prompts with dialogue responses become a user turn.

Nothing is coerced: a number in quotes is text. Each refusal is a ValueError whose short text starts alike for all
records with the same fault, so that faults can be counted.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from pipeline.contracts import RECORDS, Message, Record, RecordKind

Dialogue = list[dict[str, str]]
Prompt = str | Dialogue

DIALOGUES = ("messages", "conversations")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""Speakers of ShareGPT dialogues under the names that chat templates know."""
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
UNSHARED = "no shared prompt: the dialogues differ before their last answer"
SURROGATE = "bad Unicode: half of a surrogate pair"


def parse(value: Mapping[str, Any], kind: RecordKind, ties: str = "refuse") -> Record:
    """Read `value` as a record of `kind`; null counts as missing.

    ties: "refuse" tied ranks, or take the "first" in the file as the better one.
    Raises ValueError with a short reason.
    """
    given = {field: content for field, content in value.items() if content is not None}
    if "weight" in given:
        _number(given["weight"], "weight")
    try:
        record = RECORDS[kind].model_validate(_LAYOUTS[kind](given) | {"weight": given.get("weight", 1.0)})
    except ValidationError as error:
        raise ValueError(_reason(error)) from None
    _refuse_surrogates(record.prompt, record.ranked)
    if kind == "ranking" and ties == "refuse" and record.tied:
        raise ValueError("tied ranks")
    return record


def parse_prompt(value: Mapping[str, Any]) -> str | list[Message]:
    """The prompt of a record whose responses, if any, do not matter (sampling). Raises ValueError."""
    given = {field: content for field, content in value.items() if content is not None}
    prompt = _explicit_prompt(given, ("prompt", *DIALOGUES))
    if prompt is None:
        raise ValueError("missing field: prompt")
    if "prompt" not in given and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    if isinstance(prompt, list) and not prompt:
        raise ValueError("no prompt: the dialogue begins with the answer")
    prompt = _with_system(prompt, given)
    prompt = prompt if isinstance(prompt, str) else [Message(**turn) for turn in prompt]
    _refuse_surrogates(prompt)
    return prompt


# ------------------------------------------------------------------------------------------ kinds of record


def _demonstration(given: dict[str, Any]) -> dict[str, Any]:
    if "response" in given:
        prompt, (response,) = _prompted(given, {"response": given["response"]})
        return {"prompt": prompt, "response": response}
    for field in DIALOGUES:
        if field in given:
            prompt, response = _answered(_dialogue(given[field], field), field)
            if not prompt:
                raise ValueError(f"no prompt: {field} begins with the answer")
            return {"prompt": _with_system(prompt, given), "response": response}
    raise ValueError("missing field: response")


def _preference(given: dict[str, Any]) -> dict[str, Any]:
    for field in ("chosen", "rejected"):
        if field not in given:
            raise ValueError(f"missing field: {field}")
    prompt, (chosen, rejected) = _prompted(given, {field: given[field] for field in ("chosen", "rejected")})
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _ranking(given: dict[str, Any]) -> dict[str, Any]:
    if "responses" not in given:
        raise ValueError("missing field: responses")
    responses = given["responses"]
    if not isinstance(responses, list):
        raise ValueError(f"wrong type: responses is {_kind(responses)}, expected a list")
    if len(responses) < 2:
        raise ValueError("fewer than two responses")
    orders = {field: given[field] for field in ("ranks", "scores") if field in given}
    if len(orders) != 1:
        raise ValueError("missing field: ranks or scores" if not orders else "both ranks and scores are given")
    for field, numbers in orders.items():
        if not isinstance(numbers, list):
            raise ValueError(f"wrong type: {field} is {_kind(numbers)}, expected a list")
        for number in numbers:
            _number(number, field.removesuffix("s"))
        if len(numbers) != len(responses):
            raise ValueError(f"different numbers of responses and {field}")
    prompt, texts = _prompted(given, {f"responses[{k}]": response for k, response in enumerate(responses)})
    if len(set(texts)) < len(texts):
        raise ValueError("two responses are the same")
    return {"prompt": prompt, "responses": texts, **orders}


_LAYOUTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "demonstration": _demonstration,
    "preference": _preference,
    "ranking": _ranking,
}


# ------------------------------------------------------------------------------------ prompts and responses


def _prompted(given: dict[str, Any], responses: dict[str, Any]) -> tuple[Prompt, list[str]]:
    """The prompt and the responses' texts, from the record and its responses under the names they have there."""
    if all(isinstance(response, str) for response in responses.values()):
        _refuse_empty(responses)
        texts = list(responses.values())
        prompt = _explicit_prompt(given, ("prompt", *DIALOGUES))
        if prompt is None:
            prompt = _shared_text(texts)
            texts = [text[len(prompt) :] for text in texts]
            _refuse_empty(dict(zip(responses, texts, strict=True)))
        return _with_system(prompt, given), texts
    if any(isinstance(response, str) for response in responses.values()):
        raise ValueError("wrong type: responses are partly text and partly messages")
    parts = [_answered(_dialogue(response, name), name) for name, response in responses.items()]
    before = parts[0][0]
    if any(other != before for other, _ in parts):
        raise ValueError(UNSHARED)
    prompt = _agreed(_explicit_prompt(given, ("prompt",) if before else ("prompt", *DIALOGUES)), before)
    return _with_system(prompt, given), [text for _, text in parts]


def _explicit_prompt(given: dict[str, Any], fields: tuple[str, ...]) -> Prompt | None:
    for field in fields:
        if field in given:
            text = field == "prompt" and isinstance(given[field], str)
            return given[field] if text else _dialogue(given[field], field)
    return None


def _agreed(prompt: Prompt | None, before: Dialogue) -> Dialogue:
    """The prompt as a dialogue, from an explicit one and what the responses' dialogues begin with (empty: nothing)."""
    if isinstance(prompt, str):
        if before and prompt.strip() and prompt.strip() not in [turn["content"].strip() for turn in before]:
            raise ValueError("prompt is no turn of the dialogues beside it")
        return before or [{"role": "user", "content": prompt}]
    if prompt and before and prompt != before:
        raise ValueError("prompt is not what the dialogues beside it begin with")
    if not prompt and not before:
        raise ValueError("missing field: prompt")
    return prompt or before


def _with_system(prompt: Prompt, given: dict[str, Any]) -> Prompt:
    """`prompt` behind the text of the field `system`, unless it has a system turn of its own."""
    system = given.get("system", "")
    if not isinstance(system, str):
        raise ValueError(f"wrong type: system is {_kind(system)}, expected text")
    if not system.strip():
        return prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return turns if turns[0]["role"] == "system" else [{"role": "system", "content": system}, *turns]


def _shared_text(texts: list[str]) -> str:
    """The prompt that whole texts have in common; the module's docstring has the rule."""
    shared = os.path.commonprefix(texts)  # noqa: RUF071 (letter by letter is what is meant)
    if ASSISTANT in shared:
        end = shared.rindex(ASSISTANT) + len(ASSISTANT)
        if any(HUMAN in text[end:] for text in texts):
            raise ValueError(UNSHARED)
        return shared[:end]
    if texts[0].startswith(HUMAN):
        raise ValueError(UNSHARED)
    rests = [text[len(shared) :] for text in texts]
    if any(not rest.strip() for rest in rests):  # one text ends here: its last word has to be its response
        shared = re.sub(r"\S+$", "", shared.rstrip())
    elif not all(rest[0].isspace() for rest in rests):
        shared = re.sub(r"\S+$", "", shared)
    if not shared.strip():
        raise ValueError("missing field: prompt (and the responses share no beginning)")
    return shared.rstrip()


# ------------------------------------------------------------------------------------------------ dialogues


def _answered(turns: Dialogue, name: str) -> tuple[Dialogue, str]:
    """A dialogue's turns before its last assistant turn, and that turn's text."""
    for i in reversed(range(len(turns))):
        if turns[i]["role"] == "assistant":
            _refuse_empty({name: turns[i]["content"]})
            return turns[:i], turns[i]["content"]
    raise ValueError(f"no assistant turn: {_field(name)}")


def _dialogue(value: Any, name: str) -> Dialogue:
    """Chat messages under the names role / content; a single message counts as a dialogue of one turn."""
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list):
        expected = "messages" if name in DIALOGUES else "text or messages"
        raise ValueError(f"wrong type: {_field(name)} is {_kind(value)}, expected {expected}")
    if not turns:
        raise ValueError(f"no messages: {_field(name)}")
    return [_turn(turn, _field(name)) for turn in turns]


def _turn(turn: Any, field: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"wrong type: a message of {field} is {_kind(turn)}, expected role and content")
    if turn.get("role") is None and "from" in turn:
        role, content = turn["from"], turn.get("value")
    else:
        role, content = turn.get("role"), turn.get("content")
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    for part, text in (("role", role), ("content", content)):
        if not isinstance(text, str):
            raise ValueError(f"wrong type: a message's {part} in {field} is {_kind(text)}, expected text")
    return {"role": SHAREGPT_ROLES.get(role, role), "content": content}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


# -------------------------------------------------------------------------------------------------- reasons


def _refuse_empty(texts: dict[str, str]) -> None:
    for name, text in texts.items():
        if not text.strip():
            raise ValueError(f"empty response: {_field(name)}")


def _refuse_surrogates(prompt: str | list[Message], responses: Sequence[str] = ()) -> None:
    """Half a surrogate pair is legal in a Python string, and breaks every tokenizer and file."""
    turns = [prompt] if isinstance(prompt, str) else [text for turn in prompt for text in (turn.role, turn.content)]
    try:
        for text in (*turns, *responses):
            text.encode()
    except UnicodeEncodeError:
        raise ValueError(SURROGATE) from None


def _number(value: Any, field: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"wrong type: {field} is {_kind(value)}, expected a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int beyond float's range
        finite = False
    if not finite:
        raise ValueError(f"non-finite {field}")


def _field(name: str) -> str:
    """ "responses" of "responses[3]": reasons don't count elements."""
    return name.partition("[")[0]


def _kind(value: Any) -> str:
    """What a person calls the type of a JSON value."""
    names = {str: "text", bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _reason(error: ValidationError) -> str:
    """The first problem that pydantic found, short and without the record's text."""
    problem = error.errors(include_input=False, include_url=False)[0]
    if problem["type"] == "string_unicode":
        return SURROGATE
    field = str(problem["loc"][0]) if problem["loc"] else "record"
    return f"unusable {field}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
