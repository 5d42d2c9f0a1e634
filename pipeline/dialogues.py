r"""Prompts, responses and dialogues out of a raw record, whatever its kind.

Prompts, in this order of preference:
  * `prompt`: text, or chat messages; text stays text (hh-rlhf transcripts too), no template is applied to it;
  * `messages` or `conversations` (also with the ShareGPT names from / value): a dialogue;
  * none: what the responses share. Of dialogues, all turns before the final answer. Of hh-rlhf transcripts, all up to
    the last "\n\nAssistant:" they share. Of other texts, the longest common beginning, cut back to the end of a word
    (white space goes to the responses). Words that two answers happen to share then count as prompt: an explicit
    prompt is better.
A dialogue that ends with a response that stands beside it, too, is prompt without its last turn.
A text in `system` becomes the first turn; `tools` (or `functions`) and `chat_template_kwargs` go to the template. Responses are texts, or
dialogues whose last assistant turn is the response; turns after it are dropped. If a dialogue holds more than the answer, what
comes before is the prompt, and a `prompt` beside it must agree. Text prompts with dialogue responses become a user turn, and so
do those with a system text or tools. Where an explicit prompt ends with an assistant's turn, the response continues that turn;
two assistant turns in a row of a dialogue are two turns.

Left out: single messages (`messages`), which fields a kind of record has (`layouts`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.messages import (
    DIALOGUES,
    SURROGATE,
    Turn,
    declared_tools,
    field_of,
    from_json,
    kind_of,
    messages_in,
    tools_of,
    turns_of,
)
from pipeline.records import Dialogue, Message, as_response, said

Prompt = str | Dialogue

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
UNSHARED = "no shared prompt: the dialogues differ before their last answer"


# ------------------------------------------------------------------------------------ prompts and responses


def prompted(given: dict[str, Any], responses: dict[str, Any]) -> tuple[Prompt, list[str | Message]]:
    """The prompt and the responses, from the record and its responses under the names they have there."""
    responses = _as_messages(responses)
    if all(isinstance(response, str) for response in responses.values()):
        refuse_empty(responses)
        texts = list(responses.values())
        prompt = explicit_prompt(given, ("prompt", *DIALOGUES))
        if prompt is None:
            prompt = _shared_text(texts)
            texts = [text[len(prompt) :] for text in texts]
            refuse_empty(dict(zip(responses, texts, strict=True)))
        return completed(_without(texts, prompt, given), given), texts
    if any(isinstance(response, str) for response in responses.values()):
        raise ValueError("wrong type: responses are partly text and partly messages")
    parts = [answered(turns_of(response, name), name) for name, response in responses.items()]
    before = parts[0][0]
    if any(other != before for other, _ in parts):
        raise ValueError(UNSHARED)
    answers = [response for _, response in parts]
    prompt = agreed(explicit_prompt(given, ("prompt",) if before else ("prompt", *DIALOGUES)), before)
    return completed(_without(answers, prompt, given), given), answers


def _without(answers: Sequence[str | Message], prompt: Prompt, given: dict[str, Any]) -> Prompt:
    """The prompt; a dialogue beside the answers may end with one of them, which then is no prompt."""
    if "prompt" in given or isinstance(prompt, str) or not prompt or prompt[-1].role != "assistant":
        return prompt
    if said(prompt[-1]).strip() not in [said(answer).strip() for answer in answers]:
        return prompt
    if len(prompt) == 1:
        raise ValueError("no prompt: the dialogue begins with the answer")
    return prompt[:-1]


def _as_messages(responses: dict[str, Any]) -> dict[str, Any]:
    """The same responses; where all of them are texts that hold messages as JSON, the messages."""
    found = {name: messages_in(value) if isinstance(value, str) else value for name, value in responses.items()}
    return responses if any(isinstance(value, str) for value in found.values()) else found


def explicit_prompt(given: dict[str, Any], fields: tuple[str, ...]) -> Prompt | None:
    """The prompt that a record names; an assistant's turn at the end of `prompt` is one to continue."""
    for field in fields:
        if field in given:
            value = messages_in(given[field]) if isinstance(given[field], str) and field == "prompt" else given[field]
            if field == "prompt" and isinstance(value, str):
                return value
            found = dialogue(value, field)
            return replace(found, continued=field == "prompt" and found[-1].role == "assistant")
    return None


def agreed(prompt: Prompt | None, before: Dialogue) -> Dialogue:
    """The prompt as a dialogue, from an explicit one and what the responses' dialogues begin with (empty: nothing)."""
    if isinstance(prompt, str):
        if before and prompt.strip() and prompt.strip() not in [(turn.content or "").strip() for turn in before]:
            raise ValueError("prompt is no turn of the dialogues beside it")
        return before or Dialogue((Message(role="user", content=prompt),))
    if prompt and before and prompt.messages != before.messages:
        raise ValueError("prompt is not what the dialogues beside it begin with")
    if not prompt and not before:
        raise ValueError("missing field: prompt")
    return prompt or before


def completed(prompt: Prompt, given: dict[str, Any]) -> Prompt:
    """`prompt` with what else the record says to its template: a system text, unless it has a system turn; tools; options."""
    system = given.get("system", "")
    if not isinstance(system, str):
        raise ValueError(f"wrong type: system is {kind_of(system)}, expected text")
    tools, options = tools_of(declared_tools(given)), _options(given.get("chat_template_kwargs"))
    if not system.strip() and tools is None and not options:
        return prompt
    if isinstance(prompt, str):
        if not system.strip() and tools is None:
            return prompt
        prompt = Dialogue((Message(role="user", content=prompt),))
    turns = prompt.messages
    if system.strip() and turns[0].role != "system":
        turns = (Message(role="system", content=system), *turns)
    return replace(prompt, messages=turns, tools=tools, options=options)


def _options(value: Any) -> dict[str, Any]:
    value = from_json(value, "chat_template_kwargs") if isinstance(value, str) and value.strip() else value
    if value and not isinstance(value, Mapping):
        raise ValueError(f"wrong type: chat_template_kwargs is {kind_of(value)}, expected an object")
    return {name: option for name, option in (value or {}).items() if option is not None}


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


def answered(turns: Sequence[Turn], name: str) -> tuple[Dialogue, str | Message]:
    """A dialogue's turns before its last assistant turn that is to be trained on, and that turn."""
    spoken = [i for i, turn in enumerate(turns) if turn.message.role == "assistant"]
    trained = [i for i in spoken if turns[i].trained]
    if not spoken:
        raise ValueError(f"no assistant turn: {field_of(name)}")
    if not trained:
        raise ValueError(f"no assistant turn is to be trained on: {field_of(name)}")
    message = turns[trained[-1]].message
    refuse_empty({name: said(message)})
    return Dialogue(tuple(turn.message for turn in turns[: trained[-1]])), as_response(message)


def dialogue(value: Any, name: str) -> Dialogue:
    """Chat messages of any layout that `messages` reads."""
    return Dialogue(tuple(turn.message for turn in turns_of(value, name)))


# -------------------------------------------------------------------------------------------------- reasons


def refuse_empty(texts: dict[str, str]) -> None:
    for name, text in texts.items():
        if not text.strip():
            raise ValueError(f"empty response: {field_of(name)}")


def refuse_surrogates(prompt: Prompt, responses: Sequence[str | Message] = ()) -> None:
    """Half a surrogate pair is legal in a Python string, and breaks every tokenizer and file."""
    turns = [prompt] if isinstance(prompt, str) else [text for turn in prompt for text in (turn.role, said(turn))]
    try:
        for text in (*turns, *map(said, responses)):
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
