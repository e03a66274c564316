"""What became of a case, and the table of all of them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.torture.known import known_gap

NOTICED = "noticed"
UNCHANGED = "unchanged"
"""Nothing was said, and what was read is what was written."""
UNNAMED = "unnamed"
"""An error of ours, that does not say where or what to do."""
SILENT = "silent"
"""Nothing was said, and something is wrong."""
OTHER = "other"
"""An exception that is no DlaError, a traceback, a hang."""

KNOWN_GAP = "known gap"
"""One of these three, for a reason that stands in `known.py`."""

COLUMNS = (NOTICED, UNCHANGED, UNNAMED, SILENT, OTHER, KNOWN_GAP)
FAILURES = (UNNAMED, SILENT, OTHER)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one case."""

    verdict: str
    said: str

    @property
    def is_failure(self) -> bool:
        return self.verdict in FAILURES


@dataclass
class Tally:
    """The outcomes of cases by their kind."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    gaps: Counter[str] = field(default_factory=Counter)
    """Known gaps by their reason."""

    def add(self, kind: str, outcomes: Iterable[Outcome]) -> None:
        counter = self.counts.setdefault(kind, Counter())
        for outcome in outcomes:
            told = f"{kind}: {outcome.verdict}: {outcome.said}"
            gap = known_gap(told) if outcome.is_failure else None
            counter[KNOWN_GAP if gap else outcome.verdict] += 1
            if gap:
                self.gaps[gap] += 1
            elif outcome.is_failure:
                self.failures.append(told)

    def table(self) -> str:
        """One line a kind."""
        width = max((len(kind) for kind in self.counts), default=4)
        lines = [f"{'kind':<{width}}  {'cases':>6}" + "".join(f"{name:>11}" for name in COLUMNS)]
        for kind, counter in self.counts.items():
            cells = "".join(f"{counter[name]:>11}" for name in COLUMNS)
            lines.append(f"{kind:<{width}}  {counter.total():>6}{cells}")
        lines += [f"known gap, {count} cases: {why}" for why, count in self.gaps.items()]
        return "\n".join(lines)
