"""Records of another layout under our names, as `config.Source` maps them: columns, steps, rewards, answers.

A column is found by its whole name, else its dots lead into objects: `model_a.solution`. Steps are cut out of a text at
a separator, which stays with the step that it ends; blank pieces go to their neighbour. An answer is what a pattern
finds last in a text; the right one may also stand alone in its column.

Left out: what the fields mean (`layouts`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from pipeline.config import Source, TrajectoryColumns
from pipeline.messages import kind_of

_GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?")
"""A number with a comma after each third digit."""
_FIRST_NUMBER = re.compile(r"-?[$€£]?\s?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_PERCENT = re.compile(r"\s*(?:\\?%|per\s?cent)$", re.IGNORECASE)
_MARKS = " *_`$(){}[]\\"
"""What people put around an answer."""


def mapped(value: dict[str, Any], source: Source) -> dict[str, Any]:
    """The record under our names; their columns stay, as unknown ones are ignored.

    Raises ValueError with a short reason where a column is missing or of a type that cannot be mapped.
    """
    ours = {name: column(value, theirs, name) for name, theirs in source.columns.items()}
    if source.trajectories:
        ways = [_trajectory(value, way, f"trajectories.{i}") for i, way in enumerate(source.trajectories)]
        ours["trajectories"] = ways
    return value | ours


def column(value: dict[str, Any], theirs: str, ours: str) -> Any:
    """What the record holds at a column. Raises ValueError where there is no such column."""
    if theirs in value:
        return value[theirs]
    found: Any = value
    for name in theirs.split("."):
        if not isinstance(found, Mapping) or name not in found:
            raise ValueError(f"column {theirs!r} (mapped to {ours}) is missing")
        found = found[name]
    return found


def _trajectory(value: dict[str, Any], way: TrajectoryColumns, ours: str) -> dict[str, Any]:
    """One trajectory in the layout that `trajectories` reads."""
    given = column(value, way.steps, f"{ours}.steps")
    if not isinstance(given, str | list):
        raise ValueError(f"wrong type: column {way.steps!r} is {kind_of(given)}, expected text or a list of steps")
    found: dict[str, Any] = {"steps": _cut(given, way.separator) if isinstance(given, str) else given}
    for field in ("step_rewards", "step_logprobs"):
        theirs = getattr(way, field)
        if theirs is not None:
            found[field] = column(value, theirs, f"{ours}.{field}")
    if way.answer is not None:
        right = column(value, way.answer, f"{ours}.answer")
        found["reward"] = float(_answered(found["steps"], right, way))
    elif isinstance(way.reward, str):
        reward = column(value, way.reward, f"{ours}.reward")
        found["reward"] = float(reward) if isinstance(reward, bool) else reward
    elif way.reward is not None:
        found["reward"] = way.reward
    return found


def _cut(text: str, separator: str | None) -> list[str]:
    """Steps of a text, each with the separator that ends it; together they are the text."""
    if not separator:
        return [text]
    pieces = [piece + separator for piece in text.split(separator)]
    pieces[-1] = pieces[-1].removesuffix(separator)
    steps: list[str] = []
    blank = ""
    for piece in pieces:
        if piece.removesuffix(separator).strip():
            steps.append(blank + piece)
            blank = ""
        elif steps:
            steps[-1] += piece
        else:
            blank += piece
    return steps or [text]


def _answered(steps: list[Any], right: Any, way: TrajectoryColumns) -> bool:
    """Whether the answer of the trajectory's text is the right one."""
    if isinstance(right, bool) or not isinstance(right, str | int | float):
        raise ValueError(f"wrong type: column {way.answer!r} is {kind_of(right)}, expected text or a number")
    texts = [step.get("text") if isinstance(step, Mapping) else step for step in steps]
    text = "".join(text for text in texts if isinstance(text, str))
    said, known = answer_of(text, way.answer_pattern), answer_of(str(right), way.answer_pattern)
    # A text without a marked answer may be nothing but the answer; a number somewhere in it is not one.
    return matches(text if said is None else said, str(right) if known is None else known, within=said is not None)


def answer_of(text: str, pattern: str) -> str | None:
    """What the pattern's group holds at its last match, or None where it has none."""
    found = list(re.finditer(pattern, text))
    return found[-1].group(1) if found else None


def matches(said: str, right: str, within: bool = True) -> bool:
    """Whether two answers are the same number, else the same text but for white space and marks around it ("(B)", "**B**.").

    within: where the right one is a number, what was said may go on behind its first one ("18 dollars", "18. I checked").
    """
    said, right = (" ".join(text.split()).lstrip(_MARKS).rstrip(_MARKS + ".") for text in (said, right))
    number, whole = _number(right), _number(said)
    if number is None or whole is not None:
        return whole == number if number is not None else said == right
    first = _FIRST_NUMBER.search(said) if within else None
    return first is not None and _number(first.group()) == number


def _number(text: str) -> Decimal | None:
    """A number as people write it: with a currency sign in front, commas between thousands, a percent sign behind it."""
    text = _PERCENT.sub("", text)
    sign, bare = ("-", text[1:]) if text.startswith("-") else ("", text)
    bare = sign + bare.lstrip("$€£ ")
    try:
        found = Decimal(bare.replace(",", "") if _GROUPED.fullmatch(bare) else bare)
    except InvalidOperation:
        return None
    return found if found.is_finite() else None
