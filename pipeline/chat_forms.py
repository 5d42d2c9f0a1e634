"""In which form a chat template takes messages, found out by asking it: what it would leave out is refused.

Templates differ in what they read: arguments of calls as objects or as JSON text, null words or empty ones, thoughts in a field of
their own or in tags among the words. For each shape of message (role, which fields it has, one call or several) one is written with
words that no template knows; the first form in which all of them come out is the template's. A shape that comes out in no form would
be dropped in silence, so records with it are refused. Where the template refuses the question itself, it decides on each record.

Left out: what is done with the text (`chat`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from pipeline.records import Message

TAGS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"), ("[THINK]", "[/THINK]"))
"""Around thoughts; a template's are those that it names."""
_WORDS, _THOUGHT, _NAME, _KEY, _VALUE, _TOOL = (
    f"qalign{word}" for word in ["words", "thought", "name", "key", "value", "tool"]
)
_REASONING = "reasoning"
_CALLED = ("qalignone", "qaligntwo")
_TOOLS = [
    {
        "type": "function",
        "function": {"name": _TOOL, "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
]

Write = Callable[[list[dict[str, Any]], Sequence[dict[str, Any]] | None], str]
"""Turns and tools → what the template writes; raises ValueError where it refuses them."""


@dataclass(frozen=True, slots=True)
class Form:
    """How to write messages of one shape."""

    folded: bool = False  # thoughts stand in tags before the words
    blank: bool = False  # no words are empty words
    arguments: frozenset[type] = frozenset({dict, str})  # what a call's arguments may be

    def __call__(self, message: Message, tags: tuple[str, str] | None) -> dict[str, Any]:
        """The message as the template reads it."""
        content, fields = message.content, message.beside
        if self.folded and "reasoning_content" in fields and tags is not None:
            content = fold(fields.pop("reasoning_content"), content or "", tags)
        if "reasoning_content" in fields:  # templates read it under several names
            fields |= dict.fromkeys(("reasoning", "thinking"), fields["reasoning_content"])
        if "tool_calls" in fields:
            fields["tool_calls"] = [self._call(call) for call in fields["tool_calls"]]
        if content is None and self.blank:
            content = ""
        return {"role": message.role} | ({} if content is None else {"content": content}) | fields

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        given = function["arguments"]
        if type(given) in self.arguments:
            return call
        if isinstance(given, str):
            try:
                given = json.loads(given or "{}")
            except ValueError:
                raise ValueError("a call's arguments are not JSON, and the chat template reads objects") from None
        else:
            given = json.dumps(given, ensure_ascii=False)
        return call | {"function": function | {"arguments": given}}


class Forms:
    """The forms of one template; `source`: its text."""

    def __init__(self, write: Write, source: str) -> None:
        self._write = write
        self._known: dict[tuple[Any, ...], Form | str] = {}
        self._heard: set[str] = set()  # roles whose words come out
        self.tags = next((tags for tags in TAGS if tags[0] in source or tags[1] in source), None)

    def turn(self, message: Message) -> dict[str, Any]:
        """A message as the template reads it. Raises ValueError if the template would leave some of it out."""
        if not message.plain:
            return self._form(message)(message, self.tags)
        if message.role not in self._heard:
            self._form(message)
            self._heard.add(message.role)
        return {"role": message.role, "content": message.content}

    def folds(self, message: Message) -> bool:
        """Whether the template reads thoughts in tags among the words alone."""
        return self._form(message).folded

    @cached_property
    def writes_tools(self) -> bool:
        """Whether a list of tools comes out at all."""
        for turns in ([_user()], [{"role": "system", "content": "s"}, _user()]):
            try:
                if _TOOL in self._write(turns, _TOOLS):
                    return True
            except ValueError:
                continue
        return False

    def _form(self, message: Message) -> Form:
        calls = message.tool_calls
        named = message.name is not None and message.role != "tool"
        words = bool(message.content) or message.role != "assistant"  # others say nothing but words, if none
        shape = (message.role, words, bool(message.reasoning_content), min(len(calls or ()), 2), named)
        if shape not in self._known:
            self._known[shape] = self._ask(*shape)
        found = self._known[shape]
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def _ask(self, role: str, words: bool, thought: bool, calls: int, named: bool) -> Form | str:
        """The first form in which everything comes out, or the reason why there is none."""
        fewest: set[str] | None = None
        folds = (False, True) if thought and self.tags is not None else (False,)
        for folded, blank in product(folds, (False,) if words else (False, True)):
            takes: set[type] = set()
            for kind in (dict, str) if calls else (dict,):
                probe = _probe(role, words, thought, calls, named, kind)
                left_out = self._left_out(Form(folded, blank)(probe, self.tags), probe, kind)
                if left_out == set():
                    takes.add(kind)
                if left_out is not None and (fewest is None or len(left_out) < len(fewest)):
                    fewest = left_out
            if takes:
                return Form(folded, blank, frozenset(takes))
        if (
            fewest == {_REASONING} and self.tags is not None
        ):  # it takes thoughts out of all turns: they are for the answer alone
            return self._ask(role, words, False, calls, named)
        if fewest is None:
            return self._ask(role, words, thought, 1, named) if calls > 1 else Form()
        return f"the chat template leaves out {' and '.join(sorted(fewest))}"

    def _left_out(self, turn: dict[str, Any], probe: Message, kind: type) -> set[str] | None:
        """What of a turn does not come out; None: the template refuses it wherever it stands."""
        fewest: set[str] | None = None
        for turns, tools in product(self._around(turn, probe), (None, _TOOLS) if probe.tool_calls else (None,)):
            try:
                text = self._write(turns, tools)
            except ValueError:
                continue
            found = _absent(text, probe, kind)
            if fewest is None or len(found) < len(fewest):
                fewest = found
            if not found:
                break
        return fewest

    def _around(self, turn: dict[str, Any], probe: Message) -> list[list[dict[str, Any]]]:
        """Dialogues in which such a turn may stand."""
        if probe.role == "user":
            return [[turn]]
        if probe.role == "assistant":
            return [[_user(), turn]]
        if probe.role == "tool":
            called = {"id": "qalign001", "type": "function", "function": {"name": _CALLED[0], "arguments": {}}}
            asking = {"role": "assistant", "content": "", "tool_calls": [called]}
            answer = turn | {"tool_call_id": "qalign001", "name": _CALLED[0]}
            return [[_user(), asking, answer], [_user(), {"role": "assistant", "content": "x"}, turn]]
        return [[turn, _user()], [_user(), turn]]


def fold(thought: str, words: str, tags: tuple[str, str]) -> str:
    """A turn's text as models write it whose template has no field for thoughts."""
    return f"{tags[0]}\n{thought.strip(chr(10))}\n{tags[1]}\n\n{words}"


def _user() -> dict[str, Any]:
    return {"role": "user", "content": "x"}


def _probe(role: str, words: bool, thought: bool, calls: int, named: bool, kind: type) -> Message:
    arguments: Any = {_KEY: _VALUE} if kind is dict else json.dumps({_KEY: _VALUE})
    called = [
        {"id": f"qalign00{i}", "type": "function", "function": {"name": _CALLED[i], "arguments": arguments}}
        for i in range(calls)
    ]
    return Message(
        role=role,
        content=_WORDS if words else None,
        reasoning_content=_THOUGHT if thought else None,
        tool_calls=tuple(called) or None,
        name=_NAME if named else None,
    )


def _absent(text: str, probe: Message, kind: type) -> set[str]:
    """What of a probe a text does not hold."""
    missing = set()
    if probe.content and _WORDS not in text:
        missing.add(f"the words of a turn ({probe.role}{', beside tool calls' if probe.tool_calls else ''})")
    if probe.reasoning_content and _THOUGHT not in text:
        missing.add(_REASONING)
    if probe.name and _NAME not in text:
        missing.add(f"names ({probe.role})")
    for i in range(len(probe.tool_calls or ())):
        if _CALLED[i] not in text:
            missing.add("tool calls")
    if probe.tool_calls:
        quoted = (
            json.dumps({_KEY: _VALUE}) in text if kind is str else f"'{_KEY}'" not in text and f'\\"{_KEY}' not in text
        )
        if not (quoted and _KEY in text and _VALUE in text):
            missing.add("tool calls")
    return missing
