"""Thoughts of an answer, in the tags that a chat template has for them: where they begin, end, and stand.

Left out: what the template writes around them (`chat`).
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.records import Message


@dataclass(frozen=True, slots=True)
class Thoughts:
    """tags: around thoughts; None: the template has none."""

    tags: tuple[str, str] | None

    def opens(self, prompt: str) -> bool:
        """Whether the call at a prompt's end begins the answer's thoughts."""
        return self.tags is not None and prompt.rstrip().endswith(self.tags[0])

    def has(self, answer: str | Message) -> bool:
        """Whether an answer has thoughts, in their field or among its words."""
        given = as_message(answer)
        return bool(given.reasoning_content or (self.tags and self.tags[1] in (given.content or "")))

    def only_closes(self, words: str) -> bool:
        """Whether words end thoughts that they did not begin."""
        tags = self.tags
        return tags is not None and tags[1] in words and tags[0] not in words[: words.index(tags[1])]

    def unclosed(self, words: str) -> bool:
        """Whether words end inside of thoughts that they began."""
        tags = self.tags
        return tags is not None and words.rfind(tags[0]) > words.rfind(tags[1])

    def never_end(self, words: str) -> bool:
        """Whether words are nothing but thoughts, begun and not ended."""
        tags = self.tags
        return tags is not None and words.lstrip().startswith(tags[0]) and tags[1] not in words

    def split(self, given: Message) -> Message | None:
        """The same answer with the thoughts among its words in a field of their own."""
        tags = self.tags
        words = given.content or ""
        if tags is None or given.reasoning_content or tags[1] not in words:
            return None
        thought, _, rest = words.partition(tags[1])
        return given.model_copy(
            update={"reasoning_content": thought.replace(tags[0], "", 1).strip("\n"), "content": rest.lstrip("\n")}
        )

    def without_opening(self, words: str, prompt: str) -> str:
        """Words behind a prompt that has opened their thoughts."""
        tags = self.tags
        if tags is None or not words.lstrip().startswith(tags[0]):
            return words
        rest = words.lstrip()[len(tags[0]) :]
        return rest.removeprefix(prompt[prompt.rfind(tags[0]) + len(tags[0]) :])

    def kept_in(self, text: str, given: Message) -> bool:
        """Whether a turn's text has the answer's words and thoughts, one after the other, and no thoughts twice."""
        pieces = [given.reasoning_content or "", given.content or ""]
        if self.tags is not None:
            closing = self.tags[1]
            if text.count(closing) > max(1, sum(piece.count(closing) for piece in pieces)):
                return False
            for tag in self.tags:
                pieces = [part for piece in pieces for part in piece.split(tag)]
        start = 0
        for piece in (piece.strip() for piece in pieces):
            place = text.find(piece, start)
            if place < 0:
                return False
            start = place + len(piece)
        return True


def as_message(answer: str | Message) -> Message:
    return answer if isinstance(answer, Message) else Message(role="assistant", content=answer)
