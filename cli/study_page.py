"""The page of a study: its question, what may be said of it, and every number that is behind it; loads nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.page_charts import NARROW, WIDE, LineChart, Style, line_chart
from cli.page_template import as_duration, page_template
from cli.page_values import Curve, CurvePoint
from cli.study_charts import (
    ArmDots,
    Difference,
    ForestChart,
    RunChart,
    ShareChart,
    forest_chart,
    run_chart,
    share_chart,
    styles_of_terms,
)
from cli.study_notes import Control, controls_of, notes_of, share_in_words
from cli.study_tables import tables_csv
from dla_cache.durable import make_folder, write_durably, writing_to
from trainer.leak_audit import LeakAudit, read_audit
from trainer.study_results import ArmResult, Comparison, StudyResults, analyse
from trainer.study_table import read_study
from trainer.verdict import p_in_words, signed

PAGE_NAME = "report.html"
TABLES_NAME = "tables.csv"
CURVE_HEIGHT = 380.0

ROLE_WORDS = {
    "labelled": "labelled",
    "transfer": "unlabelled",
    "validation": "validation",
    "test": "test",
}


@dataclass(frozen=True, slots=True)
class StudyPage:
    """All that the page shows."""

    results: StudyResults
    audit: LeakAudit | None
    styles: dict[str, Style]
    """Arm → its colour and mark."""
    runs: tuple[RunChart, ...]
    """The same chart for each screen, as are the others."""
    forest: tuple[ForestChart, ...]
    fractions: tuple[LineChart, ...]
    shares: tuple[ShareChart, ...]
    terms: dict[str, Style]
    """Loss term → its colour."""
    notes: tuple[tuple[str, str], ...]
    """What a reader must know first: a word and a sentence."""
    controls: tuple[tuple[Control, ...], ...]

    @property
    def arms(self) -> list[ArmResult]:
        """The rows of the main table."""
        return [arm for arm in self.results.arms if not arm.is_teacher]

    @property
    def teachers(self) -> list[ArmResult]:
        """The arms that others learn from."""
        return [arm for arm in self.results.arms if arm.is_teacher]

    @property
    def planned(self) -> list[Comparison]:
        return [pair for pair in self.results.comparisons if pair.is_planned]

    @property
    def exploratory(self) -> list[Comparison]:
        return [pair for pair in self.results.comparisons if not pair.is_planned]

    @property
    def settings(self) -> list[ArmResult]:
        """The arms whose loss has more than one term."""
        return [arm for arm in self.results.arms if len(arm.gradient_shares) > 1]

    def label_of(self, name: str) -> str:
        """What the page calls an arm."""
        return next((arm.label for arm in self.results.arms if arm.name == name), name)

    def as_json(self) -> dict[str, Any]:
        """Verdicts, arms and what is missing, in plain values: percent and points; null for what is not known."""
        return {
            "study": self.results.table.spec.name,
            "metric": self.results.table.metric,
            "verdicts": [pair.verdict for pair in self.planned],
            "exploratory": [pair.verdict for pair in self.exploratory],
            "arms": [
                {
                    "arm": arm.name,
                    "label_fraction": arm.fraction,
                    "runs": len(arm.runs),
                    "test": arm.score.mean,
                    "low": arm.low if arm.score.is_known else None,
                    "high": arm.high if arm.score.is_known else None,
                }
                for arm in self.results.arms
            ],
            "missing": list(self.results.missing),
        }


def write_study_page(folder: Path, out: Path, *, partial: bool = False) -> StudyPage:
    """Writes `report.html` and `tables.csv` of the study in a folder; the same files give the same bytes.

    Args:
        folder: with `spec.yaml`, `runs.csv` and `images.csv`; with `audit.json` the page has the audit, too.
        partial: see `analyse`.

    Raises:
        SpecError, StudyError: if the files are not there, damaged, or contradict each other.
        StoreError: if the page cannot be written.
    """
    results = analyse(read_study(folder), partial=partial)
    page = lay_out(results, read_audit(folder))
    with writing_to(out):
        make_folder(out.absolute())
        write_durably(out / PAGE_NAME, render(page).encode())
        write_durably(out / TABLES_NAME, tables_csv(results).encode())
    return page


def lay_out(results: StudyResults, audit: LeakAudit | None) -> StudyPage:
    """Everything of the page in its place."""
    spec = results.table.spec
    in_turn = sorted(spec.arms, key=lambda name: spec.arms[name].role == "teacher")  # rows of one chart, then others
    styles = {name: Style(number) for number, name in enumerate(in_turn)}
    rows = [arm for arm in results.arms if not arm.is_teacher]
    shared = [arm for arm in results.arms if len(arm.gradient_shares) > 1]
    terms = styles_of_terms([arm.gradient_shares for arm in shared])
    differences = [
        Difference(
            f"{pair.evidence.first} − {pair.evidence.second}{_of_fraction(pair.fraction)}",  # noqa: RUF001
            pair.evidence.difference,
            pair.evidence.low,
            pair.evidence.high,
            pair.bootstrap,
        )
        for pair in results.comparisons
        if pair.is_planned
    ]
    dots = [dots_of(arm, styles[arm.name]) for arm in rows]
    bars = [(f"{arm.label}{_of_fraction(arm.fraction)}", arm.gradient_shares) for arm in shared]
    layouts = (WIDE, NARROW)
    return StudyPage(
        results,
        audit,
        styles,
        tuple(run_chart(dots, layout) for layout in layouts if dots),
        tuple(forest_chart(differences, spec.equivalence_margin, layout) for layout in layouts if differences),
        fraction_charts(results, rows),
        tuple(share_chart(bars, terms, layout) for layout in layouts if bars),
        terms,
        notes_of(results, audit),
        controls_of(results),
    )


def dots_of(arm: ArmResult, style: Style) -> ArmDots:
    """An arm's runs as its chart wants them."""
    by_teacher = [
        [100 * (run.test or 0.0) for (of, _), run in arm.runs.items() if of == teacher]
        for teacher in dict.fromkeys(teacher for teacher, _ in arm.runs)
    ]
    return ArmDots(f"{arm.label}{_of_fraction(arm.fraction)}", style, arm.score.mean, arm.low, arm.high, by_teacher)


def fraction_charts(results: StudyResults, rows: Sequence[ArmResult]) -> tuple[LineChart, ...]:
    """Score over the share of the labels; nothing where one share was used."""
    if len(results.table.fractions) < 2:
        return ()
    series = []
    for name in dict.fromkeys(arm.name for arm in rows):
        points = sorted((arm for arm in rows if arm.name == name), key=lambda arm: arm.fraction or 0.0)
        curve = Curve(
            tuple(
                CurvePoint(
                    100 * (arm.fraction or 0.0),
                    arm.score.mean / 100,
                    arm.low / 100 if arm.score.is_known else None,
                    arm.high / 100 if arm.score.is_known else None,
                )
                for arm in points
            )
        )
        series.append((points[0].label, curve))
    charts = [line_chart(series, layout, height=CURVE_HEIGHT, in_percent=True) for layout in (WIDE, NARROW)]
    return tuple(chart for chart in charts if chart is not None)


def _of_fraction(fraction: float | None) -> str:
    return "" if fraction is None else f", {100 * fraction:g} %"


def render(page: StudyPage) -> str:
    """The page as HTML; every text of it is escaped."""
    filters = {
        "percent": lambda value: f"{value:.1f}",
        "share": lambda share: share_in_words(share).replace(" ", "\u00a0"),
        "setting": lambda value: f"{value:.4g}" if isinstance(value, float) else str(value),
        "whole_percent": lambda fraction: f"{100 * fraction:g}",
        "whole_p": lambda text: text.replace("p < ", "p\u00a0<\u00a0").replace("p = ", "p\u00a0=\u00a0"),
        "count": lambda number: f"{number:,.0f}",
        "duration": as_duration,
        "signed": lambda value: signed(value) if math.isfinite(value) else "unknown",
        "p": lambda value: p_in_words(value).removeprefix("p ").removeprefix("= "),
    }
    return page_template("study.html.j2", filters).render(page=page, roles=ROLE_WORDS)
