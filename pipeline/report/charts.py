"""A chart, ready to draw: everything in pixels, every mark with its words, and the same numbers as a table.

`templates/chart.html.j2` draws it as SVG. Colour never stands alone: each series has a marker and a dash of its own.
Left out: what is plotted (`frontier`, `reliability`, `curves`, `parameters`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.report.scales import Scale, Tick

COLOURS = 7
"""Classes `hue0` … `hue6` of the style sheet: Okabe and Ito's palette without yellow, which no white page shows."""
MARKERS = (
    "M-5 0A5 5 0 1 1 5 0A5 5 0 1 1 -5 0Z",  # circle
    "M-4.5 -4.5H4.5V4.5H-4.5Z",  # square
    "M0 -6L5.5 4.5H-5.5Z",  # triangle
    "M0 -6.5L5.5 0L0 6.5L-5.5 0Z",  # diamond
    "M0 6L5.5 -4.5H-5.5Z",  # triangle upside down
    "M-2 -6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",  # plus
    "M0 -6L1.6 -2H6L2.6 1L3.8 5.5L0 2.8L-3.8 5.5L-2.6 1L-6 -2H-1.6Z",  # star
    "M-6 -3H6V3H-6Z",  # bar
)
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4")


@dataclass(frozen=True, slots=True)
class Table:
    """The numbers behind a chart."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Mark:
    """A point that can be pointed at and tabbed to."""

    x: float  # pixels
    y: float
    label: str  # all that is known of it: the tooltip, and what a screen reader says
    bars: str = ""  # SVG path of its error bars
    text: str = ""  # written beside it
    text_at: tuple[float, float, str] = (0.0, 0.0, "start")  # x, y, text-anchor
    hollow: bool = False
    size: float = 1.0


@dataclass(frozen=True, slots=True)
class Series:
    """Marks that belong together. `index` gives colour and marker."""

    name: str
    index: int
    marks: Sequence[Mark]
    line: Sequence[tuple[float, float]] = ()  # pixels
    dash: str = ""  # SVG's stroke-dasharray
    hollow: bool = False  # of its key in the legend

    @property
    def colour(self) -> str:
        return f"hue{self.index % COLOURS}"

    @property
    def marker(self) -> str:
        return MARKERS[self.index % len(MARKERS)]

    @property
    def points(self) -> str:
        """The line as SVG's `points`."""
        return " ".join(f"{x:g},{y:g}" for x, y in self.line)


@dataclass(frozen=True, slots=True)
class Frame:
    """The plotting area of a chart, in pixels of its view box."""

    width: float
    height: float
    left: float = 68.0
    right: float = 16.0
    top: float = 14.0
    bottom: float = 46.0

    def x(self, values: Sequence[float], log: bool = False, include: Sequence[float] = ()) -> Scale:
        """Horizontal scale over `values`."""
        return Scale.over(values, self.left, self.width - self.right, log, include)

    def y(self, values: Sequence[float], include: Sequence[float] = ()) -> Scale:
        """Vertical scale over `values`, upwards."""
        return Scale.over(values, self.height - self.bottom, self.top, include=include)


@dataclass(frozen=True, slots=True)
class Box:
    """A bar behind the marks: how much data a place has."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure. `id` is unique on the page."""

    id: str
    title: str
    caption: str
    frame: Frame
    x_label: str
    y_label: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    series: Sequence[Series]
    table: Table
    guide: tuple[float, float, float, float] | None = None  # a dashed line of comparison: x1, y1, x2, y2
    boxes: Sequence[Box] = field(default=())

    @property
    def summary(self) -> str:
        """What a screen reader says of the whole."""
        drawn = ", ".join(s.name for s in self.series)
        return f"{self.title}. {self.y_label} by {self.x_label}. {drawn}. The numbers are in the table below it."


def error_bars(x: float, y: float, across: tuple[float, float] | None, along: tuple[float, float] | None) -> str:
    """SVG path of a mark's intervals, in pixels: `across` = (left, right), `along` = (bottom, top)."""
    path = ""
    if across is not None:
        path += f"M{across[0]:g} {y:g}H{across[1]:g}M{across[0]:g} {y - 3:g}v6M{across[1]:g} {y - 3:g}v6"
    if along is not None:
        path += f"M{x:g} {along[0]:g}V{along[1]:g}M{x - 3:g} {along[0]:g}h6M{x - 3:g} {along[1]:g}h6"
    return path


def place_texts(marks: Sequence[tuple[float, float, str]], frame: Frame) -> list[tuple[float, float, str]]:
    """Where each mark's text goes, (x, y, text-anchor): the first side of the mark on which it covers nothing.

    marks: (x, y, text) in pixels. Where every side is taken, the right one is used.
    """
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in marks]
    places = []
    for x, y, text in marks:
        width = 7.8 * len(text)
        sides = [
            ((x + 9, y + 4, "start"), (x + 9, y - 7, x + 9 + width, y + 6)),
            ((x - 9, y + 4, "end"), (x - 9 - width, y - 7, x - 9, y + 6)),
            ((x, y - 10, "middle"), (x - width / 2, y - 21, x + width / 2, y - 8)),
            ((x, y + 19, "middle"), (x - width / 2, y + 8, x + width / 2, y + 21)),
            ((x + 9, y - 9, "start"), (x + 9, y - 20, x + 9 + width, y - 7)),
            ((x + 9, y + 17, "start"), (x + 9, y + 7, x + 9 + width, y + 20)),
        ]
        free = [side for side in sides if _inside(side[1], frame) and not any(_overlap(side[1], t) for t in taken)]
        place, box = (free or sides)[0]
        places.append((round(place[0], 1), round(place[1], 1), place[2]))
        taken.append(box)
    return places


_Rectangle = tuple[float, float, float, float]


def _inside(box: _Rectangle, frame: Frame) -> bool:
    return box[0] >= frame.left and box[2] <= frame.width - 2 and box[1] >= 0 and box[3] <= frame.height - frame.bottom


def _overlap(a: _Rectangle, b: _Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
