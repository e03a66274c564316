"""Where everything of a study's charts lies: plain numbers in SVG units, which a template draws.

Each is laid out twice, for a wide and for a narrow screen, as in `cli.page_charts`.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cli.page_charts import CHARACTER_WIDTH, N_COLOURS, WIDE, Axis, Layout, Style, Tick, padded, plain, shorten
from trainer.verdict import signed

ROW = 30.0
LABELLED_ROW = 46.0
"""Of a narrow chart, whose labels stand above their rows: they name two arms."""
LONGEST_LABEL, LONGEST_NARROW = 44, 40
"""Characters of a label beside its row, and above it."""
SPACING = 3.2
"""Between the lanes of teachers."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A comparison as its chart wants it; in points, intervals perhaps infinite."""

    label: str
    value: float
    low: float
    high: float
    bootstrap: tuple[float, float]


@dataclass(frozen=True, slots=True)
class ForestRow:
    label: str
    text: str
    style: Style
    label_y: float
    y: float
    x: float
    x_low: float
    x_high: float
    x_drawn: tuple[float, float]
    """The bootstrap's interval."""


@dataclass(frozen=True, slots=True)
class ForestChart:
    layout: Layout
    height: float
    axis: Axis
    ticks: tuple[Tick, ...]
    rows: tuple[ForestRow, ...]
    zero: float
    margin: tuple[float, float]
    """Where the margin of equivalence begins and ends."""

    @property
    def mark_scale(self) -> float:
        """Smaller where there is little room, or a mark hides its own interval."""
        return 1.0 if self.layout is WIDE else 0.6


def forest_chart(differences: Sequence[Difference], margin: float, layout: Layout) -> ForestChart:
    """A row a comparison: the difference, its t interval and the bootstrap's, over the band of equivalence."""
    values = [
        value for one in differences for value in (one.value, one.low, one.high, *one.bootstrap) if math.isfinite(value)
    ]
    low, high = padded([*values, -margin, margin], bounds=(-math.inf, math.inf))
    is_wide = layout is WIDE
    labels = [shorten(one.label, LONGEST_LABEL if is_wide else LONGEST_NARROW) for one in differences]
    left = max(len(label) for label in labels) * CHARACTER_WIDTH + 26 if is_wide else 8
    axis = Axis(low, high, left, layout.width - 62)
    height, top = (ROW + 4 if is_wide else LABELLED_ROW), 12.0
    rows = []
    for number, (label, one) in enumerate(zip(labels, differences, strict=True)):
        bottom = top + height * (number + 1)
        y = bottom - height / 2 if is_wide else bottom - 16
        low_x, high_x = (axis.place(value if math.isfinite(value) else one.value) for value in (one.low, one.high))
        drawn = (axis.place(one.bootstrap[0]), axis.place(one.bootstrap[1]))
        label_y = y + 4.5 if is_wide else y - 14
        rows.append(
            ForestRow(label, signed(one.value), Style(number), label_y, y, axis.place(one.value), low_x, high_x, drawn)
        )
    total = top + height * len(rows) + 30
    ticks = axis.ticks(int((axis.end - axis.start) // 44), plain)
    return ForestChart(
        layout, total, axis, ticks, tuple(rows), axis.place(0), (axis.place(-margin), axis.place(margin))
    )


@dataclass(frozen=True, slots=True)
class ArmDots:
    """An arm as its chart wants it: scores in percent, a list of seeds for each teacher."""

    label: str
    style: Style
    mean: float
    low: float
    high: float
    by_teacher: Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class RunRow:
    label: str
    text: str
    style: Style
    label_y: float
    y: float
    x: float
    x_low: float
    x_high: float
    runs: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class RunChart:
    layout: Layout
    height: float
    axis: Axis
    ticks: tuple[Tick, ...]
    rows: tuple[RunRow, ...]


def run_chart(arms: Sequence[ArmDots], layout: Layout) -> RunChart:
    """A row an arm: every run as a small dot, teachers one below the other, over the mean with its t interval."""
    everything = [score for arm in arms for scores in arm.by_teacher for score in scores]
    everything += [bound for arm in arms for bound in (arm.low, arm.high) if math.isfinite(bound)]
    low, high = padded(everything, bounds=(0, 100))
    is_wide = layout is WIDE
    labels = [shorten(arm.label, LONGEST_LABEL if is_wide else LONGEST_NARROW) for arm in arms]
    left = max(len(label) for label in labels) * CHARACTER_WIDTH + 26 if is_wide else 8
    axis = Axis(low, high, left, layout.width - 56)
    height, top = (ROW if is_wide else LABELLED_ROW), 10.0
    rows = []
    for number, (label, arm) in enumerate(zip(labels, arms, strict=True)):
        bottom = top + height * (number + 1)
        y = bottom - height / 2 if is_wide else bottom - 15
        lanes = len(arm.by_teacher)
        runs = tuple(
            (axis.place(score), round(y + SPACING * (lane - (lanes - 1) / 2), 2))
            for lane, scores in enumerate(arm.by_teacher)
            for score in scores
        )
        low_x, high_x = (axis.place(value if math.isfinite(value) else arm.mean) for value in (arm.low, arm.high))
        label_y = y + 4.5 if is_wide else y - 14
        rows.append(RunRow(label, f"{arm.mean:.1f}", arm.style, label_y, y, axis.place(arm.mean), low_x, high_x, runs))
    total = top + height * len(rows) + 26
    return RunChart(layout, total, axis, axis.ticks(int((axis.end - axis.start) // 36), plain), tuple(rows))


@dataclass(frozen=True, slots=True)
class Segment:
    term: str
    style: Style
    x: float
    width: float


@dataclass(frozen=True, slots=True)
class ShareRow:
    label: str
    label_y: float
    y: float
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class ShareChart:
    layout: Layout
    height: float
    start: float
    rows: tuple[ShareRow, ...]


def styles_of_terms(arms: Sequence[Mapping[str, float]]) -> dict[str, Style]:
    """Term → its colour. With more terms than colours some share one, but never two terms of one arm."""
    styles: dict[str, Style] = {}
    for term in dict.fromkeys(term for shares in arms for term in shares):
        beside = {styles[other].colour for shares in arms if term in shares for other in shares if other in styles}
        used = Counter(style.colour for style in styles.values())
        free = min(range(N_COLOURS), key=lambda colour: (colour in beside, used[colour]))
        styles[term] = Style(free)
    return styles


def share_chart(
    arms: Sequence[tuple[str, Mapping[str, float]]], terms: Mapping[str, Style], layout: Layout
) -> ShareChart:
    """A bar an arm, cut into the shares of its terms, in one order."""
    is_wide = layout is WIDE
    labels = [shorten(label, LONGEST_LABEL if is_wide else LONGEST_NARROW) for label, _ in arms]
    left = max(len(label) for label in labels) * CHARACTER_WIDTH + 20 if is_wide else 0.0
    height, top, width = (ROW if is_wide else LABELLED_ROW), 4.0, layout.width - left
    rows = []
    for number, (label, (_, shares)) in enumerate(zip(labels, arms, strict=True)):
        y = top + height * (number + 1) - 22
        total, start = math.fsum(shares.values()) or 1.0, left
        segments = []
        for term, style in terms.items():
            part = width * shares.get(term, 0.0) / total
            if part > 0:
                segments.append(Segment(term, style, round(start, 2), round(part, 2)))
            start += part
        rows.append(ShareRow(label, y + 13 if is_wide else y - 5, y, tuple(segments)))
    return ShareChart(layout, top + height * len(rows) + 4, left, tuple(rows))
