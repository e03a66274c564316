"""Where everything of a chart lies: plain numbers in SVG units, which a template draws.

A chart that carries text is laid out twice, for a wide and for a narrow screen, because text that shrinks with a
picture cannot be read on a telephone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cli.page_values import Curve, CurvePoint, Estimate

N_COLOURS = 8
"""As many as the page's style sheet has; then they come again with another dash."""
DASHES = ("", "6 4", "2 3")
CHARACTER_WIDTH = 7.7
"""Of the chart's text in the widest of the usual fonts, on average: nobody knows which one a reader has."""
LABEL_GAP = 16.0
"""Smallest distance of two labels' base lines."""

Text = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Layout:
    """A chart's size."""

    name: str
    """CSS class by which a page shows it or not."""
    width: float
    longest_label: int
    """In characters."""


WIDE = Layout("wide", 960, 30)
NARROW = Layout("narrow", 350, 16)


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Axis:
    """Values to places: `place(low)` is `start`, `place(high)` is `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Where `value` lies; one beyond the axis lies at its end."""
        low, high, here = self.low, self.high, min(max(value, self.low), self.high)
        if self.is_log:
            low, high, here = math.log(low), math.log(high), math.log(here)
        return round(self.start + (here - low) / (high - low) * (self.end - self.start), 2)

    def ticks(self, n_about: int, text: Text) -> tuple[Tick, ...]:
        """Round values within the axis."""
        values = decades(self.low, self.high) if self.is_log else round_values(self.low, self.high, n_about)
        return tuple(Tick(self.place(value), text(value)) for value in values)


@dataclass(frozen=True, slots=True)
class Style:
    """How the marks of one series look: by colour and by shape, so that neither is needed."""

    number: int

    @property
    def colour(self) -> int:
        return self.number % N_COLOURS

    @property
    def dash(self) -> str:
        return DASHES[self.number // N_COLOURS % len(DASHES)]

    @property
    def mark(self) -> str:
        """SVG path around (0, 0)."""
        marks = (
            "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
            "M-4 -4h8v8h-8z",
            "M0 -5.5L5.5 4.5H-5.5z",
            "M0 -5.8L5.8 0L0 5.8L-5.8 0z",
            "M-5.5 -4.5H5.5L0 5.5z",
            "M-1.8 -5h3.6v3.2h3.2v3.6h-3.2v3.2h-3.6v-3.2h-3.2v-3.6h3.2z",
        )
        return marks[self.number % len(marks)]


@dataclass(frozen=True, slots=True)
class Dot:
    """A row of the dot chart."""

    name: str
    label: str
    text: str
    style: Style
    y: float
    x: float
    x_low: float
    x_high: float


@dataclass(frozen=True, slots=True)
class DotChart:
    layout: Layout
    height: float
    axis: Axis
    ticks: tuple[Tick, ...]
    dots: tuple[Dot, ...]

    @property
    def mark_scale(self) -> float:
        """Smaller where there is little room, or a dot hides its own interval."""
        return 1.0 if self.layout is WIDE else 0.6


def dot_chart(rows: Sequence[tuple[str, Estimate]], layout: Layout) -> DotChart:
    """One row a name: the estimate as a dot, its interval as a line; in percent."""
    labels = [shorten(name, layout.longest_label) for name, _ in rows]
    left = max(len(label) for label in labels) * CHARACTER_WIDTH + 26
    low, high = padded(
        [100 * bound for _, estimate in rows for bound in (estimate.low, estimate.high)], bounds=(0, 100)
    )
    axis = Axis(low, high, left, layout.width - 56)
    row_height, top = 30.0, 10.0
    dots = tuple(
        Dot(
            name,
            label,
            f"{100 * estimate.value:.1f}",
            Style(number),
            top + row_height * (number + 0.5),
            *(axis.place(100 * value) for value in (estimate.value, estimate.low, estimate.high)),
        )
        for number, (label, (name, estimate)) in enumerate(zip(labels, rows, strict=True))
    )
    height = top + row_height * len(rows) + 26
    return DotChart(layout, height, axis, axis.ticks(int((axis.end - axis.start) // 36), plain), dots)


@dataclass(frozen=True, slots=True)
class Interval:
    """The band around a stretch of a line: an area, or a stroke where the stretch is a single point."""

    path: str
    is_area: bool


@dataclass(frozen=True, slots=True)
class Line:
    """One series of a line chart."""

    name: str
    label: str
    text: str
    """Its last value, if that is worth reading."""
    style: Style
    paths: tuple[str, ...]
    """One an unbroken stretch."""
    bands: tuple[Interval, ...]
    points: tuple[tuple[float, float], ...]
    end: tuple[float, float]
    label_y: float


@dataclass(frozen=True, slots=True)
class LineChart:
    layout: Layout
    height: float
    x: Axis
    y: Axis
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]


MOST_POINTS_MARKED = 16
FAR_APART = 20.0
"""Largest over smallest value, from which on an axis is logarithmic."""


def line_chart(
    series: Sequence[tuple[str, Curve]], layout: Layout, *, height: float, in_percent: bool
) -> LineChart | None:
    """Curves over steps with their bands and, at the right, their names; None where no curve has a point.

    Args:
        in_percent: values are fractions, and the last ones stand beside the names where there is room. Others have a
            logarithmic axis if they lie far apart.
    """
    scale = 100.0 if in_percent else 1.0
    drawn = [(name, Style(number), curve) for number, (name, curve) in enumerate(series) if curve.stretches]
    if not drawn:
        return None
    known = [point for _, _, curve in drawn for stretch in curve.stretches for point in stretch]
    values = [scale * value for point in known for value in (point.value, point.low, point.high) if value is not None]
    is_log = not in_percent and min(values) > 0 and max(values) / min(values) > FAR_APART
    bounds = (0.0, 100.0) if in_percent else (-math.inf, math.inf)
    low, high = (min(values), max(values)) if is_log else padded(values, bounds=bounds)
    ends = [curve.stretches[-1][-1] for _, _, curve in drawn]
    labels = [shorten(name, layout.longest_label) for name, _, _ in drawn]
    texts = [f"{100 * end.value:.1f}" if in_percent and layout is WIDE else "" for end in ends]
    right = max(len(f"{label} {text}") for label, text in zip(labels, texts, strict=True)) * CHARACTER_WIDTH + 36
    x = Axis(0, max(1, *(point.step for point in known)), 30 if in_percent else 44, layout.width - right)
    y = Axis(low, high, height - 34, 26, is_log)
    label_ys = spread([y.place(scale * end.value) for end in ends], LABEL_GAP, y.end, y.start)
    lines = tuple(
        draw_line(name, label, text, style, curve.stretches, label_y, x, y, scale)
        for (name, style, curve), label, text, label_y in zip(drawn, labels, texts, label_ys, strict=True)
    )
    x_ticks = x.ticks(int((x.end - x.start) // 60), lambda step: f"{step:,.0f}")
    return LineChart(layout, height, x, y, x_ticks, y.ticks(8, plain), lines)


def draw_line(
    name: str,
    label: str,
    text: str,
    style: Style,
    stretches: Sequence[Sequence[CurvePoint]],
    label_y: float,
    x: Axis,
    y: Axis,
    scale: float,
) -> Line:
    """One curve between the axes."""
    placed = [[(x.place(point.step), y.place(scale * point.value)) for point in stretch] for stretch in stretches]
    points = [place for stretch in placed for place in stretch]
    bands = [band(stretch, x, y, scale) for stretch in stretches]
    # A point by itself has no line: without its mark it could not be seen.
    is_marked = len(points) <= MOST_POINTS_MARKED or len(stretches) > 1
    return Line(
        name,
        label,
        text,
        style,
        paths=tuple(path(stretch) for stretch in placed),
        bands=tuple(interval for interval in bands if interval is not None),
        points=tuple(points) if is_marked else (),
        end=points[-1],
        label_y=label_y,
    )


def path(points: Sequence[tuple[float, float]]) -> str:
    """SVG path through points."""
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def band(points: Sequence[CurvePoint], x: Axis, y: Axis, scale: float) -> Interval | None:
    """The intervals of an unbroken stretch; None where nothing is known of them."""
    bounded = [(x.place(p.step), p.low, p.high) for p in points if p.low is not None and p.high is not None]
    if not bounded:
        return None
    upper = [(at, y.place(scale * high)) for at, _, high in bounded]
    lower = [(at, y.place(scale * low)) for at, low, _ in reversed(bounded)]
    return Interval(path([*upper, *lower]) + "z", is_area=len(bounded) > 1)


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places moved apart until neighbours are `gap` from each other, in their order, and within bounds if they fit.

    Clusters are kept together around their middle, so that no label goes farther from its line than it must.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    clusters: list[tuple[float, list[int]]] = []
    for index in order:
        middle, members = places[index], [index]
        while clusters:
            before, others = clusters[-1]
            if before + gap * (len(others) - 1) / 2 + gap <= middle - gap * (len(members) - 1) / 2:
                break
            clusters.pop()
            members = others + members
            middle = sum(places[member] for member in members) / len(members)
            half = gap * (len(members) - 1) / 2
            middle = max(min(middle, high - half), low + half)
        clusters.append((middle, members))
    moved = [0.0] * len(places)
    for middle, members in clusters:
        for position, member in enumerate(members):
            moved[member] = round(middle + gap * (position - (len(members) - 1) / 2), 2)
    return moved


def padded(values: Sequence[float], *, bounds: tuple[float, float]) -> tuple[float, float]:
    """The range of values with a little room, within bounds, never empty."""
    low, high = min(values), max(values)
    room = max((high - low) * 0.06, 0.5 if bounds[1] == 100 else abs(high) * 0.06, 1e-9)
    return max(bounds[0], low - room), min(bounds[1], high + room)


def round_values(low: float, high: float, n_about: int) -> list[float]:
    """About so many multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    rough = (high - low) / max(n_about, 1)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(size * magnitude for size in (1, 2, 5, 10) if size * magnitude >= rough * 0.999)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high]; with twos and fives where there are few of them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    sizes = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    return [value for power in powers for size in sizes if low <= (value := size * 10.0**power) <= high]


def shorten(text: str, longest: int) -> str:
    """The text, or its start and end with an ellipsis between."""
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 1]}…{text[-end:]}"


def plain(value: float) -> str:
    """A tick's number, as short as it is exact."""
    return f"{value:.6g}"
