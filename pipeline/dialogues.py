r"""Prompts, responses and dialogues out of a raw record, whatever its kind.

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

Left out: which fields a kind of record has (`layouts`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.records import Message

Dialogue = list[dict[str, str]]
Prompt = str | Dialogue

DIALOGUES = ("messages", "conversations")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""Speakers of ShareGPT dialogues under the names that chat templates know."""
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
UNSHARED = "no shared prompt: the dialogues differ before their last answer"
SURROGATE = "bad Unicode: half of a surrogate pair"


# ------------------------------------------------------------------------------------ prompts and responses


def prompted(given: dict[str, Any], responses: dict[str, Any]) -> tuple[Prompt, list[str]]:
    """The prompt and the responses' texts, from the record and its responses under the names they have there."""
    if all(isinstance(response, str) for response in responses.values()):
        refuse_empty(responses)
        texts = list(responses.values())
        prompt = explicit_prompt(given, ("prompt", *DIALOGUES))
        if prompt is None:
            prompt = _shared_text(texts)
            texts = [text[len(prompt) :] for text in texts]
            refuse_empty(dict(zip(responses, texts, strict=True)))
        return with_system(prompt, given), texts
    if any(isinstance(response, str) for response in responses.values()):
        raise ValueError("wrong type: responses are partly text and partly messages")
    parts = [answered(dialogue(response, name), name) for name, response in responses.items()]
    before = parts[0][0]
    if any(other != before for other, _ in parts):
        raise ValueError(UNSHARED)
    prompt = agreed(explicit_prompt(given, ("prompt",) if before else ("prompt", *DIALOGUES)), before)
    return with_system(prompt, given), [text for _, text in parts]


def explicit_prompt(given: dict[str, Any], fields: tuple[str, ...]) -> Prompt | None:
    for field in fields:
        if field in given:
            text = field == "prompt" and isinstance(given[field], str)
            return given[field] if text else dialogue(given[field], field)
    return None


def agreed(prompt: Prompt | None, before: Dialogue) -> Dialogue:
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


def with_system(prompt: Prompt, given: dict[str, Any]) -> Prompt:
    """`prompt` behind the text of the field `system`, unless it has a system turn of its own."""
    system = given.get("system", "")
    if not isinstance(system, str):
        raise ValueError(f"wrong type: system is {kind_of(system)}, expected text")
    if not system.strip():
        return prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return turns if turns[0]["role"] == "system" else [{"role": "system", "content": system}, *turns]


def _shared_text(texts: list[str]) -> str:
    """The prompt that whole texts have in common; the module's docstring has the rule."""
    if len(texts) == 1 and ASSISTANT not in texts[0]:
        raise ValueError("missing field: prompt")
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


def answered(turns: Dialogue, name: str) -> tuple[Dialogue, str]:
    """A dialogue's turns before its last assistant turn, and that turn's text."""
    for i in reversed(range(len(turns))):
        if turns[i]["role"] == "assistant":
            refuse_empty({name: turns[i]["content"]})
            return turns[:i], turns[i]["content"]
    raise ValueError(f"no assistant turn: {_field(name)}")


def dialogue(value: Any, name: str) -> Dialogue:
    """Chat messages under the names role / content; a single message counts as a dialogue of one turn."""
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list):
        expected = "messages" if name in DIALOGUES else "text or messages"
        raise ValueError(f"wrong type: {_field(name)} is {kind_of(value)}, expected {expected}")
    if not turns:
        raise ValueError(f"no messages: {_field(name)}")
    return [_turn(turn, _field(name)) for turn in turns]


def _turn(turn: Any, field: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"wrong type: a message of {field} is {kind_of(turn)}, expected role and content")
    if turn.get("role") is None and "from" in turn:
        role, content = turn["from"], turn.get("value")
    else:
        role, content = turn.get("role"), turn.get("content")
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    for part, text in (("role", role), ("content", content)):
        if not isinstance(text, str):
            raise ValueError(f"wrong type: a message's {part} in {field} is {kind_of(text)}, expected text")
    return {"role": SHAREGPT_ROLES.get(role, role), "content": content}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


# -------------------------------------------------------------------------------------------------- reasons


def refuse_empty(texts: dict[str, str]) -> None:
    for name, text in texts.items():
        if not text.strip():
            raise ValueError(f"empty response: {_field(name)}")


def refuse_surrogates(prompt: str | list[Message], responses: Sequence[str] = ()) -> None:
    """Half a surrogate pair is legal in a Python string, and breaks every tokenizer and file."""
    turns = [prompt] if isinstance(prompt, str) else [text for turn in prompt for text in (turn.role, turn.content)]
    try:
        for text in (*turns, *responses):
            text.encode()
    except UnicodeEncodeError:
        raise ValueError(SURROGATE) from None


def check_number(value: Any, field: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"wrong type: {field} is {kind_of(value)}, expected a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int beyond float's range
        finite = False
    if not finite:
        raise ValueError(f"non-finite {field}")


def _field(name: str) -> str:
    """ "responses" of "responses[3]": reasons don't count elements."""
    return name.partition("[")[0]


def kind_of(value: Any) -> str:
    """What a person calls the type of a JSON value."""
    names = {str: "text", bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
