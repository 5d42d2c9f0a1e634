"""Trajectories to segments: stretches of text that the policy or the environment wrote, and where their steps end.

In plain text, steps of one author in a row are one segment: they are tokenised together, as a model would write them.
In a dialogue each of the policy's messages, and each run of its steps without messages, is an assistant turn: what the template
writes of it behind the call for it. All else that the template writes on the way (headers, other speakers' turns, answers of tools,
the call for the next answer) is the environment's.

Some templates write the last assistant turn otherwise than the same turn in the middle: Qwen3's gives the last one thoughts, be they
empty, and takes thoughts away that stand before the last question. Then the trajectory is what the template writes of the whole
dialogue, and a turn of the policy is what stands there between the call for it and its end. A trajectory is refused where the whole
lacks what the policy wrote, or does not begin with a call: the tokens would be others than those of generation. That is so for thoughts
before the last question, and, where the call opens thoughts (DeepSeek-R1's, Qwen3.5's), for every earlier turn that the template writes
without them.

A step's reward lands on the token with which its text ends: the last one whose last character is the step's. A step that
shares its only token with the next one gives its reward to that token.

Left out: tokens of a segment (`tokens`), prompts and truncation (`rendering`).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from os.path import commonprefix

from pipeline.chat import Chat, joined
from pipeline.records import Dialogue, Message, Step, Trajectory

REWRITTEN = (
    "the chat template rewrites earlier turns, so that a trajectory would lose its places: make each answer a record"
)
OPENED = (
    "the chat template opens thoughts in its call for an answer and writes earlier turns without them: give each turn "
    "reasoning that it keeps, or make each answer a record"
)


class _Rewritten(ValueError):
    """A longer dialogue does not begin with a shorter one."""

    def __init__(self) -> None:
        super().__init__(REWRITTEN)


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


def dialogue(chat: Chat, prompt: Iterable[Message], prompt_text: str, trajectory: Trajectory) -> list[Segment]:
    """Segments of a trajectory behind a dialogue; `prompt_text` and they are what the template writes.

    Raises ValueError where the whole dialogue does not hold what the policy wrote behind the call for it.
    """
    turns, runs = Dialogue.of(prompt), list(_runs(trajectory))
    try:
        return _one_by_one(chat, turns, prompt_text, runs)
    except _Rewritten:
        return _inside_whole(chat, turns, prompt_text, runs)


def _one_by_one(chat: Chat, turns: Dialogue, text: str, runs: list[_Run]) -> list[Segment]:
    """Segments where each turn is written as a continuation of those before it."""
    segments: list[Segment] = []
    for i, (policy, steps) in enumerate(runs):
        if policy:
            if segments and segments[-1].policy:  # two turns in a row: the call for the second is between them
                call = _rest(chat.prompt(turns), text)
                segments += [Segment(call, [], [], False)] if call else []
                text += call
            part = chat.answer(turns, text, _answer(steps))
            segments.append(Segment(part, _ends_of_words(part, chat.turn_end[1], steps), _rewards(steps), True))
        else:
            part, ends = _others(chat, turns, text, steps, answered=i + 1 < len(runs))
            segments.append(Segment(part, ends, _rewards(steps), False))
        turns = _with(turns, policy, steps)
        text += part
    return segments


def _inside_whole(chat: Chat, turns: Dialogue, text: str, runs: list[_Run]) -> list[Segment]:
    """Segments of what the template writes of all turns together."""
    befores = list(accumulate(runs, lambda before, run: _with(before, *run), initial=turns))
    whole = chat.dialogue(befores[-1]).rstrip()
    segments: list[Segment] = []
    for i, (policy, steps) in enumerate(runs):
        last = i + 1 == len(runs)
        if policy:
            call = chat.prompt(befores[i])
            if i and runs[i - 1][0]:  # two turns in a row: in the call, the first one is written as the last
                gap = _rest(call, chat.dialogue(befores[i]).rstrip())
                segments += [Segment(gap, [], [], False)] if gap else []
                call = text + gap
            if not whole.startswith(call):
                opened = chat.thoughts.opens(call) and not chat.thoughts.has(_answer(steps))
                raise ValueError(OPENED) if opened else _Rewritten
            part: str | None = chat.answer(befores[i], call, _answer(steps))
            if not last:
                part = chat.inside(whole, len(call), part, _answer(steps))
            if part is None:
                raise _Rewritten
            segments.append(Segment(part, _ends_of_words(part, chat.closing, steps), _rewards(steps), True))
            text = call + part
        else:
            upto = whole if last else chat.prompt(befores[i + 1])
            _rest(whole, upto)
            part = _rest(upto, text)
            segments.append(Segment(part, _ends_of_others(chat, befores[i], text, part, steps), _rewards(steps), False))
            text = upto
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


_Run = tuple[bool, list[Step]]


def _runs(trajectory: Trajectory) -> Iterator[_Run]:
    """Steps of one author in a row, and whether that is the policy; each of its messages is a run of its own."""
    for policy, run in groupby(trajectory.steps, lambda step: step.role == "policy"):
        steps = list(run)
        if policy and steps[0].message is not None:
            yield from ((True, [step]) for step in steps)
        else:
            yield policy, steps


def _rewards(steps: list[Step]) -> list[float]:
    return [step.reward for step in steps]


def _answer(steps: list[Step]) -> str | Message:
    return steps[0].message or "".join(step.text for step in steps)


def _with(turns: Dialogue, policy: bool, steps: list[Step]) -> Dialogue:
    """The dialogue with what a run says."""
    return joined(turns, _answer(steps)) if policy else turns.followed_by(*map(_message, steps))


def _message(step: Step) -> Message:
    return step.message or Message(role=step.speaker, content=step.text)


def _ends_of_words(part: str, end: str, steps: list[Step]) -> list[int]:
    """Where steps end in an assistant turn that closes with `end`; what the template writes around the words is not theirs."""
    words, spoken = "".join(step.text for step in steps), part.removesuffix(end)
    if steps[0].message is not None and not steps[0].message.plain:
        return [len(spoken)]
    ends = list(accumulate(len(step.text) for step in steps))
    stripped = words.strip()
    if stripped in part:
        start, lead = part.rindex(stripped), len(words) - len(words.lstrip())
        return [start + min(max(end - lead, 0), len(stripped)) for end in ends]
    # Thoughts may begin in the prompt and get other white space: counted from the end, the letters are the same.
    letters = [place for place, letter in enumerate(spoken) if not letter.isspace()]
    behind = [len("".join(words[end:].split())) for end in ends]
    return [letters[-1 - count] + 1 if count < len(letters) else 0 for count in behind]


def _others(chat: Chat, turns: Dialogue, text: str, steps: list[Step], answered: bool) -> tuple[str, list[int]]:
    """What the template writes for turns of others, up to the next call for an answer if there is one."""
    written = []
    for step in steps:
        turns = turns.followed_by(_message(step))
        written.append(chat.dialogue(turns).rstrip())
        _check_written(step.text.strip(), _rest(written[-1], text))
    whole = chat.prompt(turns) if answered else written[-1]
    part = _rest(whole, text)
    _rest(whole, written[-1])
    # A template that joins turns writes an end behind the first one alone that it does not write behind both.
    return part, [_alike(shorter, whole) - len(text) for shorter in written]


def _ends_of_others(chat: Chat, turns: Dialogue, text: str, part: str, steps: list[Step]) -> list[int]:
    """Where turns of others end in `part`, which follows `text` in the whole dialogue."""
    ends: list[int] = []
    for step in steps:
        turns = turns.followed_by(_message(step))
        behind = _check_written(step.text.strip(), part, ends[-1] if ends else 0)
        ends.append(max(behind, _alike(chat.dialogue(turns).rstrip(), text + part) - len(text)))
    return ends


def _alike(one: str, other: str) -> int:
    """How many letters two texts begin with alike."""
    return len(commonprefix([one, other]))  # noqa: RUF071 (letter by letter is what is meant)


def _check_written(words: str, part: str, start: int = 0) -> int:
    """Where words end in a text; templates may write what a tool said as JSON."""
    for written in (words, *(json.dumps(words, ensure_ascii=x)[1:-1] for x in (True, False))):
        if (place := part.find(written, start)) >= 0:
            return place + len(written)
    raise ValueError("the chat template leaves out a turn")


def _rest(whole: str, text: str) -> str:
    """What a longer dialogue adds to a shorter one."""
    if not whole.startswith(text):
        raise _Rewritten
    return whole[len(text) :]
