"""What the charts of a page draw: estimates and curves, wherever they come from."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and what it would be again, as fractions of 1; `low` and `high` may lie outside [0, 1]."""

    value: float
    low: float
    high: float
    n: int
    over: Literal["images", "seeds"]
    """What was drawn `n` times: an interval over images says nothing of training again."""

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One step of a curve; without an interval where nothing is known of one."""

    step: float
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Curve:
    """Points in order of steps; None where a step has no value, so that no line is drawn across it."""

    points: tuple[CurvePoint | None, ...] = ()
    missing: tuple[str, ...] = ()
    """What is not there, in words."""

    @property
    def stretches(self) -> list[list[CurvePoint]]:
        """The points that follow each other without a gap."""
        stretches: list[list[CurvePoint]] = [[]]
        for point in self.points:
            if point is None:
                stretches.append([])
            else:
                stretches[-1].append(point)
        return [stretch for stretch in stretches if stretch]
