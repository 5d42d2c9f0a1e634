"""Prompts that do not fit: what of them stays.

Of a dialogue the oldest turns go first, in units that make sense alone: a user's turn with all that answers it; then, of the last unit,
the oldest calls of tools with what the tools said. The system text, the declared tools and the beginning of an answer that is to be
continued stay. What is left is written by the template again, so that every header is whole. Where the last unit alone is too long, the
user's last words lose their beginning, and so do the words of a plain prompt inside `data.prompt_template`. Plain text without a template
loses tokens on the left, behind BOS.

A prompt gives way to responses, but not below `data.min_prompt_length`: responses that do not fit beside so much are cut in any case, so
that for their sake a prompt is cut to half of `data.max_length` at most. Of a user's last words a quarter of that minimum stays, however
long the system text is. What cannot be kept is a ValueError with a short reason.

Left out: how a prompt is written (`chat`, `rendering`), and cutting responses (`rendering`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.config import DataConfig
from pipeline.records import Dialogue
from pipeline.tokens import Encoder

Prompt = str | Dialogue

_SYSTEM = ("system", "developer")
_ANSWERING = ("assistant", "tool", "function", "ipython")
"""Roles of turns that belong to the user's turn before them."""
_SLACK = 4
"""Tokens by which a text may shrink or grow where it is cut, since tokens merge."""
_FULL = "system text and template fill it"
_ANSWERED = "what tools said, system text and template fill it"


@dataclass(frozen=True, slots=True)
class Cutter:
    """Cuts prompts for one `DataConfig`.

    write: tokens of a prompt as it begins a sequence. bos: the token that begins one, if the tokenizer has it.
    """

    data: DataConfig
    encoder: Encoder
    write: Callable[[Prompt], list[int]]
    bos: int | None

    def cut(
        self, prompt: Prompt, ids: list[int], responses: Sequence[int], whole: bool = False
    ) -> tuple[Prompt, list[int]]:
        """The prompt, or what stays of it, and its tokens [P], so that responses of these lengths fit if that makes sense.

        ids: tokens of the prompt. whole: responses cannot be cut; raises ValueError where they do not fit.
        """
        limit = self.data.max_prompt_length or self.data.max_length - 1
        least = min(len(ids), limit, self._least)
        wanted = min(limit, self._room(least, responses, whole))
        if len(ids) <= wanted:
            return prompt, ids
        if isinstance(prompt, str) and self.data.prompt_template is None:
            kept = max(wanted, least)
            _check_whole(whole, kept <= wanted)
            head = int(ids[0] == self.bos)
            return prompt, ids[:head] + ids[len(ids) - max(kept - head, 1) :]
        for shorter in self._by_turns(prompt, wanted):
            prompt, ids = shorter, self.write(shorter)
        if len(ids) <= wanted:
            return prompt, ids
        frame = len(self.write(_with_words(prompt, "x"))) - 1
        words = max(1, self._least // 4, self._least - frame)  # tokens of the words that stay
        kept = max(wanted, min(limit, len(ids), frame + words))
        _check_whole(whole, kept <= wanted)
        if len(ids) <= kept:
            return prompt, ids
        return self._by_words(prompt, ids, kept)

    @property
    def _least(self) -> int:
        default = max(1, self.data.max_length // 4)
        return default if self.data.min_prompt_length is None else self.data.min_prompt_length

    def _room(self, least: int, responses: Sequence[int], whole: bool) -> int:
        """Tokens that responses leave to the prompt."""
        most = self.data.max_length
        if whole:
            return most - max(responses)
        fitting = [length for length in responses if length <= most - least]
        rooms = [most - max(fitting)] if fitting else []
        if len(fitting) < len(responses):
            rooms.append(max(least, most // 2))
        return min(rooms)

    def _by_turns(self, prompt: Prompt, wanted: int) -> Iterator[Prompt]:
        """At most one: the dialogue without as few of its oldest turns as possible, or as many as there are to spare."""
        shorter = [] if isinstance(prompt, str) else _shortened(prompt)
        if shorter:
            place = bisect_left(shorter, True, key=lambda dialogue: len(self.write(dialogue)) <= wanted)
            yield shorter[min(place, len(shorter) - 1)]

    def _by_words(self, prompt: Prompt, ids: list[int], kept: int) -> tuple[Prompt, list[int]]:
        """The prompt with as much as fits of the end of its last words."""
        words = _words(prompt)
        places = self.encoder.places(words)  # behind each token
        start = max(0, len(ids) - kept - 1 - _SLACK)
        while start < len(places):
            rest = words[places[start] :]
            if not rest.strip():
                break
            prompt = _with_words(prompt, rest)
            found = self.write(prompt)
            if len(found) <= kept:
                return prompt, found
            start += max(1, len(found) - kept - _SLACK)
        answered = not isinstance(prompt, str) and prompt[-1].role in _ANSWERING and not prompt.continued
        why = _ANSWERED if answered else _FULL
        if self.data.max_prompt_length is None:
            raise ValueError(f"nothing left of the response within max_length: {why}")
        raise ValueError(f"nothing left of the prompt within max_prompt_length: {why}")


def _check_whole(whole: bool, fits: bool) -> None:
    if whole and not fits:  # cut on the right, a reward would lose its place
        raise ValueError("a trajectory does not fit max_length")


def _shortened(dialogue: Dialogue) -> list[Dialogue]:
    """The dialogue without its oldest turns, ever more of them: units of a user, then the last unit's calls of tools."""
    turns = dialogue.messages
    first = next((i for i, turn in enumerate(turns) if turn.role not in _SYSTEM), len(turns))
    asked = [i for i in range(first, len(turns)) if _asks(turns[i].role)]
    if not asked:
        return []
    last = asked[-1]
    calls = [i for i in range(last + 1, len(turns)) if turns[i].role == "assistant"]
    starts = [i for i in asked if i > first]
    shorter = [(*turns[:first], *turns[start:]) for start in starts]
    shorter += [(*turns[:first], turns[last], *turns[call:]) for call in calls[1:]]
    return [replace(dialogue, messages=messages) for messages in shorter]


def _asks(role: str) -> bool:
    return role not in _SYSTEM and role not in _ANSWERING


def _asking(dialogue: Dialogue) -> int:
    """The place of the last turn whose words may be cut."""
    place = next((i for i in reversed(range(len(dialogue))) if _asks(dialogue[i].role)), None)
    if place is None:
        raise ValueError("a prompt without a user's turn does not fit")
    return place


def _words(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[_asking(prompt)].content or ""


def _with_words(prompt: Prompt, words: str) -> Prompt:
    """The prompt with other last words."""
    if isinstance(prompt, str):
        return words
    place, turns = _asking(prompt), prompt.messages
    changed = turns[place].model_copy(update={"content": words})
    return replace(prompt, messages=(*turns[:place], changed, *turns[place + 1 :]))
