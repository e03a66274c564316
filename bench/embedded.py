"""The figures of the embedded study: every arm, several seeds, intervals, and the goals they were held to.

    python bench/embedded.py --out bench-out [--seeds 5]

Splits, rendering and settings were fixed on validation before; this script reads each run's test
result once. Run it again to go on where it stopped.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.arms import Arm, plan_arms, run_arms
from cli.demo import build_embedded_cache
from cli.render import ProgressReporter, print_table
from cli.signals import stop_on_signals
from dla_cache.build import build_cache
from dla_cache.data.export import MANIFEST_NAME, write_relief_digits
from dla_cache.manifest import read_manifest
from dla_cache.sources import open_source
from dla_cache.spec import CacheSpec, LatentSpec, Modality, load_yaml
from trainer.run_folder import RunResult, held_out

T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t, 97.5 % quantile, by number of seeds."""


@dataclass(frozen=True, slots=True)
class Goal:
    """Arm A is to beat arm B by at least so many points, on the mean over paired seeds."""

    better: str
    worse: str
    points: float


GOALS = (
    Goal("depth-teacher", "depth-probe", 0.0),
    Goal("depth-teacher", "depth-probe-linear", 0.0),
    Goal("depth-kd-teacher", "image-only", 12.0),
    Goal("depth-kd-probe", "image-only", 12.0),
    Goal("depth-messy", "image-only", 12.0),
    Goal("depth-kd-teacher", "image-kd-teacher", 5.0),
    Goal("depth-kd-probe", "image-kd-teacher", 5.0),
    Goal("depth-messy", "image-kd-teacher", 5.0),
)
"""The first two say what a multimodal teacher is for, the others what the latents are for."""

COMPARISONS = (
    ("depth-kd-teacher", "depth-kd-probe"),
    ("depth-messy", "depth-kd-teacher"),
    ("depth-teacher", "image-teacher"),
    ("both-teacher", "both-probe"),
    ("both-kd-teacher", "both-kd-probe"),
    ("both-messy", "both-kd-teacher"),
    ("both-kd-probe", "depth-kd-probe"),
    ("both-kd-teacher", "depth-kd-teacher"),
    ("both-kd-teacher", "pair-labels"),
    ("audio-kd-probe", "pair-labels"),
)
"""Differences worth knowing that no goal was set on."""

CONTROL = "pair-labels"
"""The arm that is given the labels that a generator saw: it has a data set of its own."""


def main() -> None:
    """Builds the caches, trains every arm of every seed, prints the tables and writes `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--seeds", type=int, default=5, choices=sorted(T_975))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="only these; a teacher stands before its students")
    options = parser.parse_args()

    described = load_yaml(Path(__file__).with_name("arms.yaml"))
    if options.arms:
        described = {name: described[name] for name in options.arms}
    planned = [plan_seed(described, options.out, seed) for seed in range(options.seeds)]
    arms = [arm for of_seed in planned for arm in of_seed]
    with stop_on_signals() as should_stop:
        build_embedded_cache(options.out, should_stop=should_stop)
        if CONTROL in described:
            build_control_cache(options.out / "control", should_stop)
        with ProgressReporter("bench", "steps") as reporter:
            finished = run_arms(
                arms,
                logs=options.out / "logs",
                n_processes=options.processes,
                on_progress=reporter.update,
                should_stop=should_stop,
            )
    results: dict[str, list[RunResult]] = {name: [] for name in described}
    for arm, result in zip(arms, finished, strict=True):
        results[arm.name].append(result)
    show_arms(results)
    show_differences(results)
    record = {name: [result.model_dump() for result in of_arm] for name, of_arm in results.items()}
    (options.out / "results.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def plan_seed(described: Mapping[str, Any], out: Path, seed: int) -> list[Arm]:
    """The arms of one seed; the control reads from its own cache."""
    folder = out / f"seed-{seed}"
    others = {name: fields for name, fields in described.items() if name != CONTROL}
    arms = plan_arms(others, folder, store=out / "cache.zarr", images=out / "data", seed=seed, steps=None)
    if CONTROL in described:
        data = out / "control"
        control = {CONTROL: described[CONTROL]}
        arms += plan_arms(control, folder, store=data / "cache.zarr", images=data / "data", seed=seed, steps=None)
    return sorted(arms, key=lambda arm: list(described).index(arm.name))


def build_control_cache(folder: Path, should_stop: Callable[[], bool]) -> None:
    """relief-digits with the generators' own images and their labels; its latents are the cheapest, none is read."""
    path = folder / "data" / MANIFEST_NAME
    if not path.exists():
        write_relief_digits(folder / "data", with_pairs=True)
    latents = (LatentSpec(modality=Modality.DEPTH, source="embedded-depth-ridge"),)
    with ProgressReporter("build the control", "images") as reporter:
        build_cache(
            read_manifest(path),
            CacheSpec(latents=latents),
            folder / "cache.zarr",
            open_source=open_source,
            on_progress=lambda at: reporter.update(at.images_done, at.images_total),
            should_stop=should_stop,
        )


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % t interval."""
    return statistics.mean(values), T_975[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def points(results: Mapping[str, Sequence[RunResult]], arm: str) -> list[float]:
    """Test top-1 of an arm in percent, seed by seed."""
    return [100 * held_out(result, arm).value for result in results[arm]]


def show_arms(results: Mapping[str, Sequence[RunResult]]) -> None:
    """One row an arm: mean over seeds with its interval, and what it cost."""
    rows = []
    for name, of_arm in results.items():
        mean, half = mean_and_half_width(points(results, name))
        validation = statistics.mean(100 * result.validation_score for result in of_arm)
        seconds = statistics.median(result.train_seconds for result in of_arm)
        speed = statistics.median(result.images_per_s for result in of_arm)
        rows.append((name, f"{mean:.1f} ± {half:.1f}", f"{validation:.1f}", f"{seconds:.0f}", f"{speed:.0f}"))
        for branch in list(of_arm[0].branches)[1:]:
            mean, half = mean_and_half_width([100 * result.branches[branch] for result in of_arm])
            rows.append((f"  {branch}", f"{mean:.1f} ± {half:.1f}", "", "", ""))
    n = len(next(iter(results.values())))
    print(f"{n} seeds; mean test top-1 in percent with 95 % t interval over seeds")
    print_table(("arm", "test top-1", "validation", "seconds", "images/s"), rows)


def show_differences(results: Mapping[str, Sequence[RunResult]]) -> None:
    """Paired differences by seed, the goals with their verdict."""

    def difference(better: str, worse: str) -> tuple[float, float]:
        pairs = zip(points(results, better), points(results, worse), strict=True)
        return mean_and_half_width([a - b for a, b in pairs])

    rows = []
    for goal in GOALS:
        if not {goal.better, goal.worse} <= results.keys():
            continue
        mean, half = difference(goal.better, goal.worse)
        verdict = "reached" if mean >= goal.points else "MISSED"
        rows.append((f"{goal.better} - {goal.worse}", f"{mean:+.1f} ± {half:.1f}", f">= {goal.points:.0f}", verdict))
    for better, worse in COMPARISONS:
        if not {better, worse} <= results.keys():
            continue
        mean, half = difference(better, worse)
        rows.append((f"{better} - {worse}", f"{mean:+.1f} ± {half:.1f}", "", ""))
    print("\npaired differences in points; p-values are not corrected for their number, so none is given")
    print_table(("difference", "points", "goal", ""), rows)


if __name__ == "__main__":
    main()
