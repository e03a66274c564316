"""Every number of a study's page as lines of one long table: `tables.csv`."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from trainer.study_results import Comparison, StudyResults

COLUMNS = ("table", "name", "label_fraction", "quantity", "value")


def tables_csv(results: StudyResults) -> str:
    """The numbers of arms, comparisons, runs, tuning and gradients, each in full precision; percent and points."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for lines in (_arms(results), _comparisons(results), _tuning(results), _gradients(results), _missing(results)):
        for table, name, fraction, quantity, value in lines:
            is_number = isinstance(value, float)
            writer.writerow((table, name, "" if fraction is None else fraction, quantity,
                             f"{value:.10g}" if is_number else "" if value is None else value))  # fmt: skip
    return text.getvalue()


Line = tuple[str, str, float | None, str, Any]


def _arms(results: StudyResults) -> Iterator[Line]:
    for arm in results.arms:
        table = "teachers" if arm.is_teacher else "arms"
        values = {
            "teachers": 0 if arm.teachers == (None,) else len(arm.teachers),
            "seeds": len(arm.seeds),
            "runs": len(arm.runs),
            "test mean": arm.score.mean,
            "standard error": arm.score.standard_error,
            "degrees of freedom": arm.score.freedom,
            "t low": arm.low,
            "t high": arm.high,
            "bootstrap low": arm.bootstrap[0],
            "bootstrap high": arm.bootstrap[1],
            "t low on these images": arm.on_these_images[0],
            "t high on these images": arm.on_these_images[1],
            "validation mean": 100 * (arm.mean_of("validation") or 0.0),
            "train seconds": arm.mean_of("train_seconds"),
            "upstream seconds": arm.mean_of("upstream_seconds"),
            "images per second": arm.mean_of("images_per_s"),
            "parameters": arm.mean_of("parameters"),
            "steps": arm.mean_of("steps"),
        }
        yield from ((table, arm.name, arm.fraction, quantity, value) for quantity, value in values.items())
        for (teacher, seed), run in arm.runs.items():
            place = f"teacher {teacher}, seed {seed}" if teacher is not None else f"seed {seed}"
            yield "runs", arm.name, arm.fraction, f"test, {place}", 100 * (run.test or 0.0)


def _comparisons(results: StudyResults) -> Iterator[Line]:
    for pair in results.comparisons:
        table = "planned comparisons" if pair.is_planned else "exploratory comparisons"
        name = f"{pair.first} - {pair.second}"
        for quantity, value in comparison_values(pair).items():
            yield table, name, pair.fraction, quantity, value
        for teacher, differences in zip(pair.teachers, pair.by_run.tolist(), strict=True):
            for seed, difference in zip(pair.seeds, differences, strict=True):
                place = f"teacher {teacher}, seed {seed}" if teacher is not None else f"seed {seed}"
                yield "paired differences", name, pair.fraction, place, difference


def comparison_values(pair: Comparison) -> dict[str, float | int | str | None]:
    """The statistics of a comparison by name; differences in points."""
    evidence = pair.evidence
    return {
        "teachers": 0 if pair.teachers == (None,) else len(pair.teachers),
        "seeds": len(pair.seeds),
        "difference": evidence.difference,
        "standard error": pair.estimate.standard_error,
        "degrees of freedom": pair.estimate.freedom,
        "t low": evidence.low,
        "t high": evidence.high,
        "bootstrap low": pair.bootstrap[0],
        "bootstrap high": pair.bootstrap[1],
        "t low on these images": pair.on_these_images[0],
        "t high on these images": pair.on_these_images[1],
        "p": pair.p,
        "p adjusted": evidence.p if pair.is_planned else None,
        "p equivalence": evidence.equivalence_p,
        "p sign flips": pair.sign_flip,
        "detectable": evidence.detectable,
        "verdict": pair.verdict,
    }


def _tuning(results: StudyResults) -> Iterator[Line]:
    for arm in results.tuning:
        yield "tuning", arm.name, None, "trials", arm.n_trials
        yield "tuning", arm.name, None, "runs", arm.n_runs
        yield "tuning", arm.name, None, "validation of the best trial", arm.validation
        for setting, value in arm.chosen.items():
            yield "tuning", arm.name, None, f"chosen {setting}", str(value)
            yield "tuning", arm.name, None, f"tried {setting}", " ".join(str(one) for one in arm.tried[setting])
            yield "tuning", arm.name, None, f"at the edge {setting}", "yes" if setting in arm.at_edge else "no"


def _gradients(results: StudyResults) -> Iterator[Line]:
    for arm in results.arms:
        for term, share in arm.gradient_shares.items():
            yield "gradient shares", arm.name, arm.fraction, term, share
        for term, count in arm.inert.items():
            yield "nearly inert terms", arm.name, arm.fraction, f"{term}, runs", count


def _missing(results: StudyResults) -> Iterator[Line]:
    for what in results.missing:
        yield "missing runs", what, None, "missing", 1
