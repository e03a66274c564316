"""What studies find where there is nothing to be found, and where there is something: many studies, each on data of
its own.

    python -m bench.calibrate_study --out calibration [--repeats 40 --effect-repeats 10]

Each repeat draws a data set, trains teachers on latents and teachers on control latents, distils students from both,
and asks one question: do students of the first beat those of the second? The source of the control knows patterns that
no image shows. In one regime the other source knows those that are there; in the other it is one more that does not,
so that nothing at all tells the two arms apart. Two more studies have an error planted in them. Run it again to go on
where it stopped; a study that `calibration.json` has is not conducted again, so half of them can be another machine's.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.trimodal import write_trimodal
from cli.render import ProgressReporter, print_table
from cli.signals import stop_on_signals
from cli.study_notes import notes_of
from dla_cache.errors import SpecError, WorkInterrupted
from dla_cache.spec import Modality, StrictModel
from dla_cache.store import open_store
from trainer.checkpoint import write_atomically
from trainer.pool import WorkerPool
from trainer.records import read_record
from trainer.study import StudyFolder, do_job, run_study
from trainer.study_plan import StudyPlan, store_facts
from trainer.study_records import build_seconds, write_study
from trainer.study_results import analyse
from trainer.study_spec import StudySpec
from trainer.study_table import read_study

EFFECT, NULL = "add something", "add nothing"

REGIMES = {EFFECT: "patterns-0", NULL: "patterns-2"}
"""What the latents do for students, and the source that does so."""

CONTROL = "patterns-1"

VIT = {"patch_size": 4, "width": 32, "depth": 2, "n_heads": 4}
TEACHER: dict[str, Any] = {
    "kind": "teacher",
    "model": {**VIT, "tokens_per_modality": 4, "late_fusion": False},
    "loop": {"steps": 60, "evaluate_steps": 30},
}
BASE: dict[str, Any] = {
    "preset": "embedded",
    "image_size": 16,
    "pixel_mean": [0.5, 0.5, 0.5],
    "pixel_std": [0.22, 0.22, 0.22],
    "view": {"scale_min": 1.0, "ratio_min": 1.0, "ratio_max": 1.0},
    "loop": {"steps": 120, "evaluate_steps": 60, "ema_decay": 0.9, "trackers": []},
}
KD: dict[str, Any] = {"ce": {}, "kd": {}}


@dataclass(frozen=True, slots=True)
class Size:
    """How much each study trains."""

    seeds: int
    teacher_seeds: int


class Finding(StrictModel):
    """What one study said."""

    regime: str
    repeat: int
    word: str
    """Its verdict: what a reader is told."""
    is_found: bool
    points: float
    """Students of latents minus those of the control, percent of the test images."""
    low: float
    high: float
    notes: tuple[str, ...]
    """What the page calls attention to."""


class Calibration(StrictModel):
    """`calibration.json`: all that was found so far."""

    seeds: int
    teacher_seeds: int
    findings: tuple[Finding, ...] = ()
    planted: tuple[Finding, ...] = ()


def spec_of(repeat: int, size: Size, objective: dict[str, Any]) -> StudySpec:
    """The study of a repeat: its seeds are no other repeat's."""
    student = {"kind": "student", "model": VIT, "objective": objective}
    return StudySpec.model_validate(
        {
            "name": "calibration",
            "question": "Does a student gain from what its teacher's latents say?",
            "store": "cache.zarr",
            "images": "data",
            "base": BASE,
            "arms": {
                "teacher": {"role": "teacher", "run": {**TEACHER, "modalities": ["depth"]}},
                "control-teacher": {"role": "teacher", "run": {**TEACHER, "modalities": ["audio"]}},
                "kd": {"learns_from": "teacher", "run": student},
                "control": {"learns_from": "control-teacher", "run": student},
            },
            "seeds": [100 * repeat + seed for seed in range(size.seeds)],
            "teacher_seeds": [100 * repeat + seed for seed in range(size.teacher_seeds)],
            "comparisons": [["kd", "control"]],
        }
    )


def conduct(folder: Path, spec: StudySpec, pool: WorkerPool, should_stop: Callable[[], bool]) -> Path:
    """Runs a study on the data in `folder`, and gives the folder of what it found."""
    place = str((folder / "cache.zarr").absolute())
    store = open_store(place)
    facts = {None: store_facts(store, place, str((folder / "data").absolute()))}
    study = StudyFolder(StudyPlan(spec, facts, folder.absolute(), base=folder.absolute()))
    run_study(study, pool=pool, should_stop=should_stop)
    return write_study(
        study, json.dumps(spec.model_dump(mode="json", exclude_unset=True)), {None: build_seconds(store)}, None
    )


def find(regime: str, repeat: int, place: Path) -> Finding:
    """What the study in a folder says."""
    results = analyse(read_study(place))
    (planned,) = [pair for pair in results.comparisons if pair.is_planned]
    low, high = planned.estimate.interval(results.table.spec.confidence)
    notes = tuple(f"{head} {text}" for head, text in notes_of(results, None))
    mean = planned.estimate.mean
    return Finding(
        regime=regime,
        repeat=repeat,
        word=planned.verdict,
        is_found=planned.evidence.is_different,
        points=mean,
        low=low,
        high=high,
        notes=notes,
    )


def calibrate(
    out: Path,
    pool: WorkerPool,
    repeats: Mapping[str, int],
    size: Size,
    known: Sequence[Finding] = (),
    on_found: Callable[[list[Finding]], None] = lambda _findings: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Finding]:
    """Studies of each regime, each of a data set and seeds of its own.

    Args:
        repeats: how many, by regime.
        known: what was found before; these are not conducted again.
        on_found: is told all findings so far.
    """
    findings = list(known)
    for repeat in range(max(repeats.values())):
        for regime, n_repeats in repeats.items():
            if repeat >= n_repeats or (regime, repeat) in {(one.regime, one.repeat) for one in findings}:
                continue
            source = REGIMES[regime]
            folder = out / f"{source}-{repeat}"
            write_trimodal(folder, repeat, {Modality.DEPTH: source, Modality.AUDIO: CONTROL})
            findings.append(find(regime, repeat, conduct(folder, spec_of(repeat, size, KD), pool, should_stop)))
            on_found(findings)
    return findings


def plant(out: Path, pool: WorkerPool, size: Size, should_stop: Callable[[], bool] = lambda: False) -> list[Finding]:
    """A study with a loss term that is all but dropped, and one whose test labels are counted from one."""
    sources = {Modality.DEPTH: REGIMES[EFFECT], Modality.AUDIO: CONTROL}
    write_trimodal(out / "dropped", 0, sources)
    write_trimodal(out / "shifted", 0, sources, labels_shifted=True)
    dropped = spec_of(0, size, {**KD, "rkd": {"weight": 1e-6}})
    return [
        find("a loss term is dropped", 0, conduct(out / "dropped", dropped, pool, should_stop)),
        find("labels are shifted", 0, conduct(out / "shifted", spec_of(0, size, KD), pool, should_stop)),
    ]


def rows_of(findings: Sequence[Finding]) -> list[tuple[str, str, str, str, str]]:
    """A line a regime: studies, how many found a difference, the mean over them, and how many intervals hold it."""
    rows = []
    for regime in REGIMES:
        mine = [one for one in findings if one.regime == regime]
        if not mine:
            continue
        mean = sum(one.points for one in mine) / len(mine)
        found = sum(one.is_found for one in mine)
        covered = sum(one.low <= mean <= one.high for one in mine)
        rows.append(
            (regime, str(len(mine)), f"{found} ({100 * found / len(mine):.0f} %)", f"{mean:+.2f}", str(covered))
        )
    return rows


def show(findings: Sequence[Finding], planted: Sequence[Finding]) -> None:
    """The table of the regimes, and what was said of the planted errors."""
    columns = ("latents that", "studies", "found a difference", "mean, points", "intervals that hold this mean")
    print_table(columns, rows_of(findings))
    for one in planted:
        print(f"{one.regime}: {'; '.join(one.notes) or 'nothing was noticed'}")


def main() -> None:
    """Conducts every study that is not there yet, prints the table and writes `calibration.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench-out/calibration"))
    parser.add_argument("--repeats", type=int, default=40, help="of the regime where latents add nothing")
    parser.add_argument("--effect-repeats", type=int, default=10, help="of the one where they add something")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher-seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    size = Size(options.seeds, options.teacher_seeds)
    repeats = {EFFECT: options.effect_repeats, NULL: options.repeats}
    path = options.out / "calibration.json"
    known = Calibration(seeds=size.seeds, teacher_seeds=size.teacher_seeds)
    if path.exists():
        known = read_record(path, Calibration)
        if (known.seeds, known.teacher_seeds) != (size.seeds, size.teacher_seeds):
            raise SpecError(
                f"`{path}` has studies of {known.seeds} seeds and {known.teacher_seeds} teachers",
                hint=f"add `--seeds {known.seeds} --teacher-seeds {known.teacher_seeds}`, or choose another `--out`",
            )

    def keep(findings: Sequence[Finding], planted: Sequence[Finding] = ()) -> None:
        record = known.model_copy(update={"findings": tuple(findings), "planted": tuple(planted)})
        write_atomically(path, record.model_dump_json(indent=1).encode() + b"\n")

    with (
        stop_on_signals() as should_stop,
        WorkerPool(do_job, options.processes, options.out / "logs") as pool,
        ProgressReporter("calibrate", "studies") as reporter,
    ):

        def found(findings: list[Finding]) -> None:
            keep(findings, known.planted)
            total = sum(repeats.values())
            reporter.update(len(findings), total, findings[-1].word, found=len(known.findings))

        findings = calibrate(options.out, pool, repeats, size, known.findings, found, should_stop)
        planted = known.planted or plant(options.out, pool, size, should_stop)
    keep(findings, planted)
    show(findings, planted)


if __name__ == "__main__":
    try:
        main()
    except WorkInterrupted as interrupted:
        sys.exit(str(interrupted))
