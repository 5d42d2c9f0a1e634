"""Trajectories to segments: stretches of text that the policy or the environment wrote, and where their steps end.

In plain text, steps of one author in a row are one segment: they are tokenised together, as a model would write them.
In a dialogue each run of policy steps is an assistant turn, its words and the end of the turn; all else that the template
writes on the way (headers, other speakers' turns, the call for the next answer) is the environment's.

A step's reward lands on the token with which its text ends: the last one whose last character is the step's. A step that
shares its only token with the next one gives its reward to that token.

Left out: tokens of a segment (`tokens`), prompts and truncation (`rendering`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from pipeline.chat import Chat
from pipeline.records import Message, Step, Trajectory

REWRITTEN = "the chat template rewrites earlier turns: no token of a trajectory would keep its place"


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive steps of one author."""

    text: str
    ends: list[int]  # characters up to the end of each step; what follows the last one closes the turn
    rewards: list[float]  # of the steps
    policy: bool


def plain(trajectory: Trajectory) -> list[Segment]:
    """Segments of a trajectory behind a plain text."""
    segments = []
    for policy, steps in _runs(trajectory):
        ends = list(accumulate(len(step.text) for step in steps))
        segments.append(Segment("".join(step.text for step in steps), ends, _rewards(steps), policy))
    return segments


def dialogue(chat: Chat, prompt: Sequence[Message], prompt_text: str, trajectory: Trajectory) -> list[Segment]:
    """Segments of a trajectory behind a dialogue; `prompt_text` and they are what the template writes.

    Raises ValueError where the template does not write a longer dialogue as a continuation of a shorter one.
    """
    turns, text = list(prompt), prompt_text
    segments: list[Segment] = []
    runs = list(_runs(trajectory))
    for i, (policy, steps) in enumerate(runs):
        if policy:
            words = "".join(step.text for step in steps)
            part = chat.answer(turns, text, words)
            turns.append(Message(role="assistant", content=words))
            segments.append(Segment(part, _ends_of_words(part, words, steps), _rewards(steps), True))
        else:
            part, ends = _others(chat, turns, text, steps, answered=i + 1 < len(runs))
            turns += [Message(role=step.speaker, content=step.text) for step in steps]
            segments.append(Segment(part, ends, _rewards(steps), False))
        text += part
    return segments


def last_tokens(segment: Segment, ends: Sequence[int]) -> list[int]:
    """The token of the segment with which each step ends, from how many characters each covers with those before it."""
    found = []
    before = -1  # where the step before ends
    for stop in segment.ends:
        last = bisect_right(ends, stop) - 1
        found.append(last if last > before else min(before + 1, len(ends) - 1))
        before = last
    return found


def _runs(trajectory: Trajectory) -> Iterator[tuple[bool, list[Step]]]:
    """Steps of one author in a row, and whether that is the policy."""
    return ((policy, list(steps)) for policy, steps in groupby(trajectory.steps, lambda step: step.role == "policy"))


def _rewards(steps: list[Step]) -> list[float]:
    return [step.reward for step in steps]


def _ends_of_words(part: str, words: str, steps: list[Step]) -> list[int]:
    """Where steps end in an assistant turn; templates may strip the words and write something before them."""
    stripped = words.strip()
    start, lead = part.rindex(stripped), len(words) - len(words.lstrip())
    return [start + min(max(end - lead, 0), len(stripped)) for end in accumulate(len(step.text) for step in steps)]


def _others(chat: Chat, turns: list[Message], text: str, steps: list[Step], answered: bool) -> tuple[str, list[int]]:
    """What the template writes for turns of others, up to the next call for an answer if there is one."""
    ends = []
    turns = list(turns)
    for step in steps:
        turns.append(Message(role=step.speaker, content=step.text))
        written = chat.dialogue(turns).rstrip()
        if not written.startswith(text):
            raise ValueError(REWRITTEN)
        if step.text.strip() not in written[len(text) :]:
            raise ValueError("the chat template leaves out a turn")
        ends.append(len(written) - len(text))
    whole = chat.prompt(turns) if answered else written
    if not whole.startswith(written):
        raise ValueError(REWRITTEN)
    return whole[len(text) :], ends
