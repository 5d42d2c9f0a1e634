"""The token heatmap: which tokens carry the credit, coloured by value, each value on hover and focus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.report.charts import Table
from pipeline.report.scales import number

if TYPE_CHECKING:
    from pipeline.evaluation.results import CreditResponse, CreditRow

MOST_ROWS, MOST_TOKENS = 20, 3000
"""What a page shows at most, so that it stays below a megabyte."""
LEVELS = 5
"""Shades of either sign."""
CODES = "abcdefgh"
"""The class of a token under the i-th value is CODES[i] + level, as in `a3` or `b-2`."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token, ready to show."""

    text: str
    classes: str
    label: str  # tooltip and screen reader
    newline: bool  # the text goes on in a new line


@dataclass(frozen=True, slots=True)
class Response:
    """One response with the same numbers as a table."""

    label: str
    tokens: Sequence[Token]
    table: Table
    cut: int  # tokens that are not shown


@dataclass(frozen=True, slots=True)
class HeatRow:
    """A prompt and its responses."""

    row_id: int
    prompt: str
    responses: Sequence[Response]


@dataclass(frozen=True, slots=True)
class Heatmap:
    """All rows, on one colour scale per value."""

    names: Sequence[str]
    limits: Sequence[float]  # the value at which the colour is full, by name
    rows: Sequence[HeatRow]
    left_out: int  # rows that did not fit
    planted: bool  # some tokens hold a planted error


def heatmap(rows: Sequence[CreditRow]) -> Heatmap | None:
    """Rows in their order until the page is full; None where there is none."""
    shown, left = [], MOST_TOKENS
    for row in rows[:MOST_ROWS]:
        longest = left // max(1, len(row.responses))
        if longest < 1:
            break
        shown.append((row, longest))
        left -= sum(min(longest, len(r.tokens)) for r in row.responses)
    responses = [r for row, _ in shown for r in row.responses]
    names = list(dict.fromkeys(name for r in responses for name in r.values))[: len(CODES)]
    if not names:
        return None
    limits = {name: _limit([v for r in responses for v in r.values.get(name, [])]) for name in names}
    drawn = [
        HeatRow(row.row_id, row.prompt, [_response(r, limits, longest) for r in row.responses])
        for row, longest in shown
    ]
    planted = any(flag for r in responses for flag in r.planted or [])
    return Heatmap(names, list(limits.values()), drawn, len(rows) - len(shown), planted)


def _limit(values: Sequence[float | None]) -> float:
    """The 98th percentile of the sizes: one huge token must not bleach all the others."""
    sizes = sorted(abs(v) for v in values if v is not None)
    return (sizes[int(0.98 * (len(sizes) - 1))] or sizes[-1] or 1.0) if sizes else 1.0


def level(value: float | None, limit: float) -> int:
    """Shade of a value, −LEVELS … LEVELS; 0 near zero and where there is none."""
    return 0 if value is None else max(-LEVELS, min(LEVELS, round(LEVELS * value / limit)))


def _response(response: CreditResponse, limits: dict[str, float], most: int) -> Response:
    tokens = [_token(response, i, limits) for i in range(min(most, len(response.tokens)))]
    rows = [
        [str(i + 1), token, *(number(response.values[n][i], 3) if n in response.values else "–" for n in limits)]
        for i, token in enumerate(response.tokens[:most])
    ]
    if response.planted is not None:
        rows = [[*row, "yes" if flag else ""] for row, flag in zip(rows, response.planted, strict=False)]
    columns = ["", "token", *limits, *(["planted error"] if response.planted is not None else [])]
    return Response(response.label, tokens, Table(columns, rows), max(0, len(response.tokens) - most))


def _token(response: CreditResponse, place: int, limits: dict[str, float]) -> Token:
    text = response.tokens[place]
    classes, words = [], [f"token {place + 1}: {text.strip() or repr(text)}"]
    for code, (name, limit) in zip(CODES, limits.items(), strict=False):
        value = response.values[name][place] if name in response.values else None
        words.append(f"{name}  {number(value, 3)}")
        if shade := level(value, limit):
            classes.append(f"{code}{shade}")
    if response.planted is not None and response.planted[place]:
        classes.append("planted")
        words.append("planted error")
    return Token(text.replace("\n", "↵") or "∅", " ".join(classes), "\n".join(words), "\n" in text)
