"""Chat messages of many makers → `records.Message`: names of fields and roles, thoughts, calls of tools and their answers, JSON text.

No field is dropped in silence. Each is read, or is of `message_fields.METADATA`, which says nothing to a model, or the message is refused. What is null
or empty, however deep, says nothing either: Arrow gives every struct all fields of all others.

  * words: `content` (text, or a list of text parts), or ShareGPT's `value`;
  * thoughts: `reasoning_content`, `reasoning` or `thinking`;
  * calls: `tool_calls`, their arguments an object or JSON text, OpenAI's older `function_call`, turns from `function_call` or `tool_call`;
  * answers of tools: roles tool, function, observation, tool_response;
  * roles in small letters or capitals;
  * `weight`, `train`, `loss` and the like, 0 or 1: whether to train on an assistant's turn.

Left out: which messages are prompt and which response (`dialogues`), what a template makes of them (`chat`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from pipeline.message_fields import (
    ARGUMENTS,
    CALLERS,
    CALLING,
    METADATA,
    PART_METADATA,
    REPEATED,
    REWARDS,
    ROLES,
    SCHEMA,
    THOUGHTS,
    TRAINED,
    WORDS,
)
from pipeline.records import Message

DIALOGUES = ("messages", "conversations")
"""Columns that hold a dialogue."""
SURROGATE = "bad Unicode: half of a surrogate pair"


@dataclass(frozen=True, slots=True)
class Turn:
    """A message, and what the data say about it."""

    message: Message
    trained: bool = True
    rewards: Mapping[str, Any] | None = None  # `REWARDS`, as they stand


def turns_of(value: Any, name: str) -> list[Turn]:
    """Chat messages, or their JSON text; a single message counts as a dialogue of one turn. Raises ValueError."""
    field = field_of(name)
    value = _loaded(value, field)
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list):
        expected = "messages" if name in DIALOGUES else "text or messages"
        raise ValueError(f"wrong type: {field} is {kind_of(value)}, expected {expected}")
    if not turns:
        raise ValueError(f"no messages: {field}")
    return [_turn(_loaded(turn, field), field) for turn in turns]


def _loaded(value: Any, field: str) -> Any:
    """The value, or what it holds as JSON text."""
    return from_json(value, field) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value


def messages_in(text: str) -> Any:
    """The messages that a text holds as JSON (a list of objects with a role), or the text."""
    if text.lstrip()[:1] != "[" or not ('"role"' in text or '"from"' in text):
        return text
    try:
        found = from_json(text, "")
    except ValueError:
        return text
    whole = isinstance(found, list) and found and all(isinstance(turn, dict) for turn in found)
    return found if whole and all({"role", "from"} & turn.keys() for turn in found) else text


def declared_tools(given: Mapping[str, Any]) -> Any:
    """What a record says of tools: in `tools`, or in OpenAI's older `functions`, if that has such."""
    older = given.get("functions")
    if isinstance(older, str):
        older = _loaded(older, "functions")
    functions = isinstance(older, list) and older and all(isinstance(one, Mapping) and "name" in one for one in older)
    return given.get("tools") or (older if functions else None)


def tools_of(value: Any) -> tuple[dict[str, Any], ...] | None:
    """A record's tools, each as {"type": "function", "function": {…}}; also from JSON text, and from functions alone."""
    value = from_json(value, "tools") if isinstance(value, str) and value.strip() else value
    if not value:
        return None
    tools = [value] if isinstance(value, Mapping) else value
    if not isinstance(tools, list):
        raise ValueError(f"wrong type: tools is {kind_of(value)}, expected a list of functions")
    return tuple(_tool(_loaded(tool, "tools")) for tool in tools)


def _tool(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"wrong type: a tool is {kind_of(given)}, expected a function")
    tool = {name: value for name, value in given.items() if value is not None}
    if "function" not in tool and isinstance(tool.get("name"), str) and tool.get("type", "function") == "function":
        return {"type": "function", "function": {SCHEMA.get(name, name): tool[name] for name in tool if name != "type"}}
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
        raise ValueError("a tool is no function")
    if not isinstance(function.get("name"), str):
        raise ValueError("a tool has no name")
    function = {name: value for name, value in function.items() if value is not None}
    return (tool if "type" in tool else {"type": "function", **tool}) | {"function": function}


# ------------------------------------------------------------------------------------------------- one message


def _turn(turn: Any, field: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise ValueError(f"wrong type: a message of {field} is {kind_of(turn)}, expected role and content")
    given = {name: value for name, value in turn.items() if value is not None}
    sharegpt = "role" not in given and "from" in given
    role, content = (given.pop(name, None) for name in (("from", "value") if sharegpt else ("role", "content")))
    if not isinstance(role, str):
        raise ValueError(f"wrong type: a message's role in {field} is {kind_of(role)}, expected text")
    message: dict[str, Any] = {"role": ROLES.get(role) or ROLES.get(role.lower(), role)}
    if given:
        message |= _beside(given)
    if role in CALLERS:
        message |= {"role": "assistant", "tool_calls": _calls(content)}
    elif content is not None or not {"tool_calls", "reasoning_content"} & message.keys():
        words, thoughts = _words(content, field) if isinstance(content, list) else (content, "")
        if words is None and message["role"] == "tool":
            words = ""
        if not isinstance(words, str):
            raise ValueError(f"wrong type: a message's content in {field} is {kind_of(words)}, expected text")
        message["content"] = words
        if thoughts:
            message.setdefault("reasoning_content", thoughts)
    trained = _trained(given) if given else None
    if "tool_calls" in message and message["role"] != "assistant":
        raise ValueError("tool calls in a message that is not the assistant's")
    if trained and message["role"] != "assistant":
        raise ValueError("a message that is marked to be trained on is not the assistant's")
    try:
        made = Message(**message)
    except ValidationError as error:
        name = error.errors(include_input=False, include_url=False)[0]["loc"][0]
        if error.errors(include_url=False)[0]["type"] == "string_unicode":
            raise ValueError(SURROGATE) from None
        raise ValueError(f"wrong type: a message's {name} in {field}, expected text") from None
    return Turn(made, trained is not False, {name: given[name] for name in REWARDS if name in given} if given else None)


def _beside(given: dict[str, Any]) -> dict[str, Any]:
    """What a message holds beside its role and words, under our names."""
    found: dict[str, Any] = {}
    for name in THOUGHTS:
        if given.get(name) and found.setdefault("reasoning_content", given[name]) != given[name]:
            raise ValueError("a message has two different reasonings")
    for name in ("tool_calls", CALLING):
        calls = None if is_empty(given.get(name)) else _calls(given[name])
        if calls and found.setdefault("tool_calls", calls) != calls:
            raise ValueError("a message has two different calls")
    for name, ours in (("tool_call_id", "tool_call_id"), ("name", "name"), ("tool_name", "name")):
        if given.get(name) not in (None, "") and found.setdefault(ours, given[name]) != given[name]:
            raise ValueError("a message has two different names")
    known = {*THOUGHTS, *TRAINED, *REWARDS, *METADATA, "tool_calls", CALLING, "tool_call_id", "name", "tool_name"}
    if given.get("type") == "message":
        known.add("type")
    if "reasoning_content" in found:
        known.update(REPEATED)
    for name, value in given.items():
        if name not in known and not is_empty(value):
            raise ValueError(f"a message has a field that is not understood: {str(name)[:40]!r}")
    return found


def _words(parts: list[Any], field: str) -> tuple[Any, str]:
    """The words and the thoughts of content in parts."""
    words, thoughts = [], []
    for part in parts:
        if not isinstance(part, Mapping):
            raise ValueError(f"wrong type: a message's content in {field} is a list, expected text")
        given = {name: value for name, value in part.items() if value is not None}
        kind = given.pop("type", None)
        text = given.pop("text" if kind in WORDS else kind, None) if kind in (*WORDS, "thinking", "reasoning") else None
        if not isinstance(text, str):
            raise ValueError(f"a message has content that is no text: {str(kind)[:40]!r}")
        if unknown := [name for name in given if name not in PART_METADATA and not is_empty(given[name])]:
            raise ValueError(f"a part of a message has a field that is not understood: {str(unknown[0])[:40]!r}")
        (words if kind in WORDS else thoughts).append(text)
    return ("".join(words) if parts else parts), "".join(thoughts)


def _calls(value: Any) -> tuple[dict[str, Any], ...]:
    """Calls of tools, from one or several, or their JSON text."""
    value = from_json(value, "tool_calls") if isinstance(value, str) else value
    calls = [value] if isinstance(value, Mapping) else value
    if not isinstance(calls, list) or not calls:
        raise ValueError(f"wrong type: tool_calls is {kind_of(value)}, expected a list of calls")
    return tuple(_call(_loaded(call, "tool_calls")) for call in calls)


def _call(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"wrong type: a tool call is {kind_of(given)}, expected a function's name and arguments")
    call = {name: value for name, value in given.items() if value is not None}
    if "function" not in call:  # the function alone, perhaps with an id
        call["function"] = {name: call.pop(name) for name in ("name", "arguments", "parameters") if name in call}
    inside = call["function"]
    if not isinstance(inside, Mapping) or not isinstance(inside.get("name"), str) or not inside["name"]:
        raise ValueError("a tool call has no name")
    if call.get("type", "function") != "function":
        raise ValueError("a tool call is no function's")
    function = {ARGUMENTS.get(name, name): value for name, value in inside.items() if value is not None}
    arguments = function.setdefault("arguments", {}) or {}
    if not isinstance(arguments, str | Mapping):
        raise ValueError(
            f"wrong type: a call's arguments are {kind_of(arguments)}, expected an object or its JSON text"
        )
    unknown = sorted({*call} - {"id", "type", "function", "index"}) + sorted({*function} - {"name", "arguments"})
    if unknown:
        raise ValueError(f"a tool call has a field that is not understood: {unknown[0][:40]!r}")
    whole = call if "type" in call else {"type": "function", **call}
    return whole | {"function": function | {"arguments": arguments}}


def _trained(given: dict[str, Any]) -> bool | None:
    """Whether the data say to train on a turn; None: they say nothing."""
    flags = {name: given[name] for name in TRAINED if name in given}
    for name, value in flags.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(f"a message's {name} is neither true or false nor 0 or 1")
    if len({bool(value) for value in flags.values()}) > 1:
        raise ValueError("a message is marked both to be trained on and not to be")
    return bool(next(iter(flags.values()))) if flags else None


# ----------------------------------------------------------------------------------------------------- reasons


def from_json(text: str, field: str) -> Any:
    """The value that a text holds. Raises ValueError with a reason that names the field."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"broken JSON: the text of {field}") from None
    if "\\ud" in text.lower():
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(SURROGATE) from None
    return found


def field_of(name: str) -> str:
    """ "responses" of "responses[3]": reasons don't count elements."""
    return name.partition("[")[0]


def is_empty(value: Any) -> bool:
    """Whether a value is null, or holds nothing but what is."""
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_empty, value))
    return value is None or value == ""


def kind_of(value: Any) -> str:
    """What a person calls the type of a JSON value."""
    names = {str: "text", bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
