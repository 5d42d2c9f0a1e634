"""From numbers to pixels and to words: axis scales, round ticks, and how a number is written in a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054
"""Half width of a 95 % interval, in standard errors."""


def number(value: float | None, digits: int = 4) -> str:
    """`value` for people, with `digits` significant digits and a real minus sign; "–" for none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value)).replace("-", "−")
    text = f"{value:.{digits}g}"
    mantissa, exponential, exponent = text.partition("e")
    return (f"{mantissa}e{int(exponent)}" if exponential else text).replace("-", "−")


def range_text(low: float, high: float) -> str:
    """An interval, as in "0.51 … 0.62"."""
    return f"{number(low, 3)} … {number(high, 3)}"


@dataclass(frozen=True, slots=True)
class Tick:
    """A grid line and what is written at its end."""

    at: float  # pixels
    text: str


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps data in [low, high] to pixels in [start, end], on a linear or a logarithmic axis."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(
        cls, values: Iterable[float], start: float, end: float, log: bool = False, include: Sequence[float] = ()
    ) -> Scale:
        """A scale that shows all of `values` and `include`, with some air around them."""
        shown = [*values, *include]
        assert shown and all(map(math.isfinite, shown)) and not (log and min(shown) <= 0)
        low, high = min(shown), max(shown)
        if log:
            low, high = math.log10(low), math.log10(high)
        air = 0.06 * (high - low) or (0.3 if log else abs(high) / 2 or 1.0)
        low, high = low - air, high + air
        return cls(10**low, 10**high, start, end, True) if log else cls(low, high, start, end)

    def __call__(self, value: float) -> float:
        """Pixels of a value, to a tenth."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, about: int = 5) -> list[Tick]:
        """Round numbers inside the scale, some `about` of them."""
        values = _log_ticks(self.low, self.high) if self.log else []
        if len(values) < 2:  # less than a decade
            values = _linear_ticks(self.low, self.high, about)
        return [Tick(self(v), number(v, 6)) for v in values]


def _linear_ticks(low: float, high: float, about: int) -> list[float]:
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Round again: 3 · 0.1 is 0.30000000000000004.
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    found = [float(f"{m}e{e}") for e in range(first, last + 1) for m in factors]
    every = max(1, (last - first) // 6) if len(factors) == 1 else 1
    return [v for v in found if low <= v <= high][::every]
