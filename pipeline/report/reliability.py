"""The reliability diagram: how often the model was right where it was so and so sure."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING

from pipeline.report.charts import Box, Chart, Frame, Mark, Series, Table, error_bars
from pipeline.report.scales import Z95, Scale, number, range_text

if TYPE_CHECKING:
    from pipeline.evaluation.results import Bin

FRAME = Frame(460, 345)


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a binomial share (Wilson 1927), inside [0, 1]."""
    assert n > 0
    middle, spread = share + Z95**2 / (2 * n), Z95 * sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + Z95**2 / n)), min(1.0, (middle + spread) / (1 + Z95**2 / n))


def reliability(bins: Sequence[Bin], id: str, title: str, x_label: str, caption: str) -> Chart | None:
    """Accuracy against confidence; None where no bin holds anything."""
    bins = [b for b in bins if b.n > 0]
    if not bins:
        return None
    left, bottom = FRAME.left, FRAME.height - FRAME.bottom
    first = 0.5 if min(b.low for b in bins) >= 0.5 else 0.0  # of the likelier of two, confidence is never below
    x = Scale(first, 1.0, left, FRAME.width - FRAME.right)
    y = Scale(0.0, 1.0, bottom, FRAME.top)
    fullest = max(b.n for b in bins)
    heights = [round((bottom - FRAME.top) * 0.3 * b.n / fullest, 1) for b in bins]
    return Chart(
        id=id,
        title=title,
        caption=f"{caption} On the dashed diagonal it is right as often as it is sure; below it, it is too sure. Error bars: 95 %. "
        f"Grey: how many pairs each bin holds (the fullest {fullest}).",
        frame=FRAME,
        x_label=x_label,
        y_label="share ordered rightly",
        x_ticks=x.ticks(),
        y_ticks=y.ticks(),
        series=[
            Series(
                "pairs in a bin", 0, [_mark(b, x, y) for b in bins], [(x(b.confidence), y(b.accuracy)) for b in bins]
            )
        ],
        table=Table(["bin", "pairs", "mean confidence", "ordered rightly", "95 % interval"], [_row(b) for b in bins]),
        guide=(x(first), y(first), x(1.0), y(1.0)),
        boxes=[
            Box(x(b.low) + 1, round(bottom - h, 1), round(x(b.high) - x(b.low) - 2, 1), h)
            for b, h in zip(bins, heights, strict=True)
        ],
    )


def _mark(found: Bin, x: Scale, y: Scale) -> Mark:
    at = x(found.confidence), y(found.accuracy)
    low, high = wilson(found.accuracy, found.n)
    words = f"{found.n} pairs at confidence {number(found.confidence, 3)}"
    words += f"\n{number(found.accuracy, 3)} ordered rightly\n95 %: {range_text(low, high)}"
    return Mark(*at, words, error_bars(*at, None, (y(low), y(high))))


def _row(found: Bin) -> list[str]:
    interval = range_text(*wilson(found.accuracy, found.n))
    numbers = [number(found.confidence, 3), number(found.accuracy, 3)]
    return [f"{number(found.low, 3)} – {number(found.high, 3)}", str(found.n), *numbers, interval]
