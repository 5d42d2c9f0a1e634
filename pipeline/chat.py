"""What a chat template writes: prompts, answers and the ends of turns, as text.

An answer is what the template writes of the whole dialogue behind the prompt. Templates that reason may open the thoughts in the call
for an answer, add empty ones, or take those of earlier turns away, so that not all they write continues the prompt: then the answer is
its words as the model writes them, without the tag that the prompt has opened.

Left out: in which form a template takes messages (`chat_forms`), tags of thoughts (`chat_thoughts`), tokens (`tokens`, `rendering`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any

from pipeline.chat_forms import Forms, fold
from pipeline.chat_thoughts import Thoughts, as_message
from pipeline.records import Dialogue, Message

_PROBE = "qalignprobe"
"""A word that no template changes: shows what a template writes around an answer."""
_LONGEST_REASON = 120
"""Characters of what a template says when it refuses messages."""
_RESERVED = frozenset(
    [
        "self",
        "conversation",
        "messages",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "sanitize_control_tokens",
    ]
)
"""What a record cannot say to a template: arguments of ours to `apply_chat_template`."""


class Chat:
    """The template of one tokenizer, or one that replaces it."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self.tokenizer = tokenizer
        self.template = template
        own = tokenizer.chat_template
        source = (
            own.get(template, template) if isinstance(own, dict) else template
        )  # a name among the model's, or a template
        self.forms = Forms(lambda turns, tools: self._render(turns, tools), str(source or own))
        self.thoughts = Thoughts(self.forms.tags)

    @property
    def exists(self) -> bool:
        """Whether there is a template at all."""
        return bool(self.template or self.tokenizer.chat_template)

    def prompt(self, messages: Iterable[Message]) -> str:
        """A dialogue with the call for an answer, or up to the end of the turn that the answer continues.

        Raises ValueError, as all methods do, if the template refuses it or would leave some of it out.
        """
        dialogue = Dialogue.of(messages)
        self._refuse_marks(dialogue.messages)
        if dialogue.continued:
            return self._unfinished(dialogue)
        return self._write(dialogue, add_generation_prompt=True) + self._opening

    def dialogue(self, messages: Iterable[Message]) -> str:
        """A dialogue as it stands."""
        dialogue = Dialogue.of(messages)
        self._refuse_marks(message for message in dialogue.messages if message.role != "assistant")  # see `rendering`
        return self._write(dialogue)

    def answer(self, messages: Iterable[Message], prompt: str, answer: str | Message) -> str:
        """The text that follows `prompt`, the dialogue's with the call for an answer, up to the end of the turn."""
        dialogue = self._spelt_out(Dialogue.of(messages))
        given = as_message(answer)
        words, opened = given.content or "", self._opens(prompt, dialogue)
        if not given.beside and ((opened and self.thoughts.only_closes(words)) or self.thoughts.never_end(words)):
            return (self.thoughts.without_opening(words, prompt) if opened else words) + self.turn_end[1]
        body = self._behind(dialogue, prompt, given)
        split = self.thoughts.split(given) if body is None else None
        if split is not None and not self.forms.folds(split):  # the template takes thoughts in a field of their own
            body = self._behind(dialogue, prompt, split)
        if body is None and opened:
            body = self._behind_opening(dialogue, prompt, given)
        if body is None and self.forms.tags is None and any(turn.reasoning_content for turn in dialogue):
            bare = _without_thoughts(dialogue)  # it takes them away once there is an answer
            body = self._behind(bare, self._write(bare, add_generation_prompt=True) + self._opening, given)
        if body is not None:
            return body
        if given.tool_calls:
            return self._calling(dialogue, prompt, split or given, opened)
        if given.reasoning_content:
            if self.forms.tags is None:
                raise ValueError("the chat template leaves out the reasoning of an answer")
            words = fold(given.reasoning_content, words, self.forms.tags)
        return (self.thoughts.without_opening(words, prompt) if opened else words) + self.turn_end[1]

    def inside(self, whole: str, start: int, alone: str, answer: str | Message) -> str | None:
        """An answer's text, from `start` on, in a whole dialogue that goes on behind it; None where it is not there as it was.

        alone: its text where nothing follows it. Inside, empty thoughts may be missing, and white space and the turn's end be others.
        """
        end, given = self.turn_end[1], as_message(answer)
        spoken = alone.removesuffix(end)
        bodies = [spoken]
        if self.forms.tags is not None:
            bodies.append(re.sub(r"^\s*{}\s*{}".format(*map(re.escape, self.forms.tags)), "", spoken))
        closings = "|".join(map(re.escape, (end, self.closing))) if end and alone.endswith(end) else ""
        for body in bodies:
            pieces = [*map(re.escape, body.split()), f"(?:{closings})"]
            found = re.compile(r"\s*" + r"\s*".join(pieces)).match(whole, start)
            if found and self.thoughts.kept_in(found[0], given):
                return found[0]
        return None

    @cached_property
    def closing(self) -> str:
        """The end of an answer's turn where another turn follows; it may be another mark than that of the last turn."""
        text = self._render([_turn("user", "x"), _turn("assistant", _PROBE), _turn("user", "x")])
        behind = text[text.rindex(_PROBE) + len(_PROBE) :].lstrip() if _PROBE in text else ""
        end = self.turn_end[1]
        return end if behind.startswith(end) else next(filter(behind.startswith, self._marks), end)

    @cached_property
    def turn_end(self) -> tuple[str, str]:
        """What the template writes after an answer, and how much of it belongs to the response."""
        text = self._render([_turn("user", "x"), _turn("assistant", _PROBE)])
        if _PROBE not in text:
            raise ValueError("the chat template leaves out the assistant's words")
        written = text[text.rindex(_PROBE) + len(_PROBE) :]
        return written, written.rstrip()

    # --------------------------------------------------------------------------------------------- answers

    def _behind(self, dialogue: Dialogue, prompt: str, given: Message) -> str | None:
        """What the template writes of an answer behind its prompt; None where that is not the answer, or not behind it."""
        whole = self.dialogue(joined(dialogue, given))
        written, end = self.turn_end
        if not whole.startswith(prompt):
            return None
        if whole.endswith(written):
            body = whole[len(prompt) : len(whole) - len(written)]
        elif given.tool_calls:  # some templates end a turn of calls otherwise
            body, end = whole[len(prompt) :].rstrip(), ""
        else:
            return None
        return body + end if self.thoughts.kept_in(body, given) else None

    def _behind_opening(self, dialogue: Dialogue, prompt: str, given: Message) -> str | None:
        """The same, where the template closes the thoughts at once that the prompt has opened, with other white space."""
        tags = self.forms.tags
        if tags is None:
            return None
        body = self._behind(dialogue, prompt[: prompt.rindex(tags[0])], given)
        return self.thoughts.without_opening(body, prompt) if body is not None and body.startswith(tags[0]) else None

    def _calling(self, dialogue: Dialogue, prompt: str, given: Message, opened: bool) -> str:
        """A turn of calls, whose thoughts, which the prompt may have opened, the template takes away."""
        tags, before, thought = self.forms.tags, prompt, ""
        if tags is not None:
            before = prompt[: prompt.rindex(tags[0])] if opened else prompt
            if given.reasoning_content:
                thought = fold(given.reasoning_content, "", tags)
        body = self._behind(dialogue, before, given.model_copy(update={"reasoning_content": None}))
        if body is None:
            raise ValueError("the chat template writes a turn with tool calls otherwise than behind its prompt")
        return (self.thoughts.without_opening(thought, prompt) if opened else thought) + body

    def _opens(self, prompt: str, dialogue: Dialogue) -> bool:
        """Whether a prompt ends inside of thoughts."""
        tags = self.forms.tags
        if tags is None:
            return False
        inside = dialogue.continued and self.thoughts.unclosed(dialogue[-1].content or "")
        return inside or self.thoughts.opens(prompt)

    # --------------------------------------------------------------------------------------------- prompts

    def _unfinished(self, dialogue: Dialogue) -> str:
        """A dialogue up to the end of its last turn's words, as transformers' `continue_final_message` writes it."""
        dialogue = self._spelt_out(dialogue)
        last = dialogue[-1]
        words = last.content or ""
        if last.tool_calls:
            raise ValueError("the prompt ends with tool calls: there is nothing to continue")
        if not words.strip():
            raise ValueError("the prompt ends with an empty message: there is nothing to continue")
        if not self.thoughts.unclosed(words):
            return self._write(dialogue, continue_final_message=True)
        before = self.prompt(dialogue[:-1])  # a template would take the tag for words, or close it
        return before + (self.thoughts.without_opening(words, before) if self._opens(before, dialogue[:-1]) else words)

    def _spelt_out(self, dialogue: Dialogue) -> Dialogue:
        """The same dialogue; where it ends with thoughts to continue, they stand among the words, behind their tag."""
        last = dialogue[-1]
        if not dialogue.continued or last.content or not last.reasoning_content:
            return dialogue
        if self.forms.tags is None:
            raise ValueError("the prompt ends with reasoning, for which the chat template has no tags")
        words = Message(role=last.role, content=f"{self.forms.tags[0]}\n{last.reasoning_content}", name=last.name)
        return replace(dialogue, messages=(*dialogue.messages[:-1], words))

    @cached_property
    def _marks(self) -> tuple[str, ...]:
        """The special tokens among what the template writes around turns."""
        frame = self._render([_turn("user", "x"), _turn("assistant", _PROBE)])
        frame += self._render([_turn("user", "x")], add_generation_prompt=True)
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        specials = {*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        return tuple(sorted(token for token in specials if token in frame))

    def _refuse_marks(self, messages: Iterable[Message]) -> None:
        """Somebody's words that hold such a token would end their turn and begin another, in the system's name if they like."""
        for message in messages:
            words = f"{message.content or ''}{message.reasoning_content or ''}"
            if any(mark in words for mark in self._marks):
                raise ValueError("a message contains a special token with which the chat template marks turns")

    @cached_property
    def _opening(self) -> str:
        """What a template without generation prompt writes before an answer: it belongs to the prompt."""
        asked = self._render([_turn("user", "x")], add_generation_prompt=True)
        if asked != self._render([_turn("user", "x")]):
            return ""
        whole = self._render([_turn("user", "x"), _turn("assistant", _PROBE)])
        opening = whole[len(asked) : whole.rindex(_PROBE)] if whole.startswith(asked) and _PROBE in whole else ""
        return opening if opening.strip() else ""

    def _write(self, dialogue: Dialogue, **options: bool) -> str:
        if dialogue.tools and not self.forms.writes_tools:
            raise ValueError("the chat template leaves out tools")
        if reserved := _RESERVED & dialogue.options.keys():
            raise ValueError(f"chat_template_kwargs cannot set {min(reserved)}")
        turns = [self.forms.turn(message) for message in dialogue.messages]
        return self._render(turns, dialogue.tools, **dialogue.options, **options)

    def _render(self, turns: list[dict[str, Any]], tools: Any = None, **options: Any) -> str:
        from jinja2 import TemplateError

        if not self.exists:
            raise ValueError("no chat template: the tokenizer has none; set data.chat_template")
        options = {"add_generation_prompt": False, **options}
        if tools is not None:
            options["tools"] = list(tools)
        try:
            return self.tokenizer.apply_chat_template(turns, chat_template=self.template, tokenize=False, **options)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split())[:_LONGEST_REASON]
            raise ValueError(f"the chat template refuses the messages: {reason}") from None


def joined(dialogue: Dialogue, answer: str | Message) -> Dialogue:
    """The dialogue with its answer, which may continue the last turn."""
    given = as_message(answer)
    if not dialogue.continued:
        return dialogue.followed_by(given)
    last = dialogue[-1]
    whole = given.model_copy(
        update={
            "content": (last.content or "") + (given.content or "") or None,
            "reasoning_content": (last.reasoning_content or "") + (given.reasoning_content or "") or None,
            "name": last.name,
        }
    )
    return replace(dialogue, messages=(*dialogue.messages[:-1], whole), continued=False)


def _without_thoughts(dialogue: Dialogue) -> Dialogue:
    bare = tuple(turn.model_copy(update={"reasoning_content": None}) for turn in dialogue)
    return replace(dialogue, messages=bare)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
