"""What a chat template writes: prompts, answers and the ends of turns, as text.

Left out: tokens (`tokens`, `rendering`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pipeline.records import Message

_PROBE = "qalignprobe"
"""A word that no template changes: shows what a template writes around an answer."""


class Chat:
    """The template of one tokenizer, or one that replaces it."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self.tokenizer = tokenizer
        self.template = template

    @property
    def exists(self) -> bool:
        """Whether there is a template at all."""
        return bool(self.template or self.tokenizer.chat_template)

    def prompt(self, messages: Sequence[Message]) -> str:
        """A dialogue with the call for an answer. Raises ValueError, as all methods do, if the template refuses it."""
        return self._write(_turns(messages), generate=True) + self._opening

    def dialogue(self, messages: Sequence[Message]) -> str:
        """A dialogue as it stands."""
        return self._write(_turns(messages), generate=False)

    def answer(self, messages: Sequence[Message], prompt: str, words: str) -> str:
        """The text that follows `prompt`, the dialogue's with the call for an answer, up to the end of the turn.

        Where the template does not keep the prompt, the words and the end of a turn.
        """
        whole = self.dialogue([*messages, Message(role="assistant", content=words)])
        written, end = self.turn_end
        if whole.startswith(prompt) and whole.endswith(written):
            body = whole[len(prompt) : len(whole) - len(written)]
            if words.strip() in body:
                return body + end
        return words + end

    @cached_property
    def turn_end(self) -> tuple[str, str]:
        """What the template writes after an answer, and how much of it belongs to the response."""
        text = self._write([_turn("user", "x"), _turn("assistant", _PROBE)], generate=False)
        if _PROBE not in text:
            raise ValueError("the chat template leaves out the assistant's words")
        written = text[text.rindex(_PROBE) + len(_PROBE) :]
        return written, written.rstrip()

    @cached_property
    def _opening(self) -> str:
        """What a template without generation prompt writes before an answer: it belongs to the prompt."""
        asked = self._write([_turn("user", "x")], generate=True)
        if asked != self._write([_turn("user", "x")], generate=False):
            return ""
        whole = self._write([_turn("user", "x"), _turn("assistant", _PROBE)], generate=False)
        opening = whole[len(asked) : whole.rindex(_PROBE)] if whole.startswith(asked) and _PROBE in whole else ""
        return opening if opening.strip() else ""

    def _write(self, turns: list[dict[str, str]], generate: bool) -> str:
        from jinja2 import TemplateError

        if not self.exists:
            raise ValueError("no chat template: the tokenizer has none; set data.chat_template")
        try:
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self.template, tokenize=False, add_generation_prompt=generate
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from None


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [_turn(message.role, message.content) for message in messages]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
