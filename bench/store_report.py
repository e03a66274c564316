"""What the store bench prints: rates side by side, and each goal with what was reached."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LATENTS, FILES, DOCUMENTED, SIMPLEJPEG = TASKS = ("latents", "files", "documented", "simplejpeg")
"""See `store_peers/serving.py`."""

TITLES = {
    LATENTS: "latents float16 [256, 64] and codes int16 [4, 250], shuffled, 0 workers",
    FILES: "the same with the bytes of the images, 0 workers",
    DOCUMENTED: "the same with decoded pixels, 2 workers (dla: threads), decoded as each documentation has it",
    SIMPLEJPEG: "the same, all decoding with simplejpeg",
}

OURS, OUR_TARS, OUR_PROCESSES = "dla, zarr", "dla, webdataset", "dla, zarr, worker processes"
CEILING = "memcpy of mapped files"
MOSAIC = "MosaicML Streaming"
LITDATAS = ("litdata, tuned", "litdata, defaults")
WEBDATASETS = ("webdataset, its own tars", "webdataset, dla's tars")
DATASETS = ("HF datasets, torch format", "HF datasets, Arrow buffers")
SAFETENSORS = ("safetensors, mapped", "safetensors, slices")
BEST_OF = (MOSAIC, *LITDATAS, *WEBDATASETS, *DATASETS, *SAFETENSORS)

Rates = Mapping[str, Sequence[float]]
"""Samples a second by reader, round after round."""


@dataclass(frozen=True, slots=True)
class Goal:
    """So many times as fast as another reader, or as the fastest of several."""

    task: str
    ours: str
    theirs: tuple[str, ...]
    factor: float


GOALS = (
    *(Goal(LATENTS, OURS, (name,), 10) for name in (MOSAIC, *LITDATAS, *WEBDATASETS)),
    *(Goal(LATENTS, OURS, (name,), 1.5) for name in (*DATASETS, *SAFETENSORS)),
    Goal(LATENTS, OURS, (CEILING,), 0.3),
    Goal(LATENTS, OUR_TARS, WEBDATASETS, 3),
    Goal(FILES, OURS, BEST_OF, 3),
    Goal(DOCUMENTED, OURS, BEST_OF, 1.5),
    Goal(SIMPLEJPEG, OURS, BEST_OF, 1),
)


def ratio(rates: Rates, ours: str, theirs: str) -> float:
    """Median over the rounds, each of which measures both within seconds: whatever else the machine does hits both."""
    return statistics.median(a / b for a, b in zip(rates[ours], rates[theirs], strict=True))


def show_rates(task: str, rates: Rates, first_batch_s: Mapping[str, float]) -> None:
    """A row a reader, the fastest first."""
    rows = []
    for name, values in sorted(rates.items(), key=lambda item: -statistics.median(item[1])):
        ours = f"{ratio(rates, OURS, name):.2f}" if OURS in rates else ""
        spread = [f"{value:.0f}" for value in (statistics.median(values), min(values), max(values))]
        rows.append((name, *spread, ours, f"{1000 * first_batch_s[name]:.0f}"))
    print(f"\n{TITLES[task]}")
    show_table(("reader", "samples/s", "slowest", "fastest", "dla, zarr is ... times as fast", "first batch, ms"), rows)


def goal_rows(task: str, rates: Rates) -> list[tuple[str, str, str, str]]:
    """What, the ratio, the goal and the verdict, of every goal of a task whose readers took part."""
    rows = []
    for goal in GOALS:
        measured = [name for name in goal.theirs if name in rates]
        if goal.task != task or goal.ours not in rates or not measured:
            continue
        fastest = max(measured, key=lambda name: statistics.median(rates[name]))
        found = ratio(rates, goal.ours, fastest)
        of_several = ", the fastest" if len(goal.theirs) > 1 else ""
        what = f"{task}: {goal.ours} / {fastest}{of_several}"
        rows.append((what, f"{found:.2f} x", f">= {goal.factor:g} x", verdict(found >= goal.factor)))
    return rows


def verdict(is_reached: bool) -> str:
    return "reached" if is_reached else "MISSED"


def show_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as they need to be; all but the first to the right."""
    table = [tuple(head), *map(tuple, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    for row in table:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join((row[0].ljust(widths[0]), *cells)).rstrip())
