"""How a build is shown while it runs: bars on a terminal, else a line now and then; and a file for machines."""

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from cli.render import LINE_INTERVAL_S, as_percent, counted
from dla_cache.durable import writing_to

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from dla_cache.progress import BuildProgress

JSON_INTERVAL_S = 1.0

WAITS_FOR = {"device": "the device", "reading": "reading and decoding", "writing": "writing"}


class BuildReporter:
    """Progress of each series, images per second, how busy the device is, what all waits for, and the time left.

    Talks to stderr. Use it as a context manager and call it with how far the build is.
    """

    def __init__(self, json_path: Path | None = None) -> None:
        """
        Args:
            json_path: a file that gets a JSON object a line, one a second at most, and the last one in any case.

        Raises:
            StoreError: if it cannot be written.
        """
        self._started = self._last_line = time.monotonic()
        self._last_json = -JSON_INTERVAL_S
        self._first: tuple[float, int] | None = None
        self._last: BuildProgress | None = None
        self._stack = ExitStack()
        self._json: IO[str] | None = None
        if json_path is not None:
            with writing_to(json_path):
                self._json = self._stack.enter_context(json_path.open("w", encoding="utf-8"))
        self._bars = _make_bars() if sys.stderr.isatty() else None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._stack.enter_context(self._bars)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._last is not None:
            self._write_json(self._last)
            if self._bars is None:
                self._write_line(self._last)
        self._stack.close()

    def __call__(self, progress: "BuildProgress") -> None:
        now = time.monotonic()
        # A further pass, which puts images aside, begins anew.
        if self._first is None or progress.images_done < self._first[1]:
            self._first = (now, progress.images_done)
        self._last = progress
        if self._bars is not None:
            self._move_bars(progress)
        elif now - self._last_line >= LINE_INTERVAL_S:
            self._write_line(progress)
        if now - self._last_json >= JSON_INTERVAL_S:
            self._write_json(progress)

    def _facts(self, progress: "BuildProgress") -> dict[str, Any]:
        assert self._first is not None
        now = time.monotonic()
        seconds, done = now - self._first[0], progress.images_done - self._first[1]
        if not done:  # nothing but the first batch yet, which came after the sources were opened
            seconds, done = now - self._started, progress.images_done
        rate = done / max(seconds, 1e-9)
        left = progress.images_total - progress.images_done
        return {
            "seconds": round(now - self._started, 3),
            "images_done": progress.images_done,
            "images_total": progress.images_total,
            "images_bad": progress.images_bad,
            "images_per_s": round(rate, 3),
            "seconds_left": round(left / rate, 1) if rate else None,
            "device_busy": progress.device_busy and round(progress.device_busy, 4),
            "bottleneck": progress.bottleneck,
            "series": {
                name: {"done": progress.done_of.get(name, 0), "total": total}
                for name, total in progress.total_of.items()
            },
            "modality": progress.modality,
            "shard": progress.shard,
            "n_shards": progress.n_shards,
            "is_waiting": progress.is_waiting,
        }

    def _write_json(self, progress: "BuildProgress") -> None:
        if self._json is not None:
            self._last_json = time.monotonic()
            self._json.write(json.dumps(self._facts(progress)) + "\n")
            self._json.flush()

    def _write_line(self, progress: "BuildProgress") -> None:
        self._last_line = time.monotonic()
        facts = self._facts(progress)
        is_through = progress.images_done == progress.images_total
        state = f"{facts['seconds']:.1f} s" if is_through else f"{facts['seconds_left'] or 0:.0f} s left"
        parts = [f"build: {progress.images_done}/{progress.images_total} images", *_rates(facts), state]
        if len(progress.total_of) > 1 and not is_through:
            parts += [f"{name} {progress.done_of.get(name, 0)}/{total}" for name, total in progress.total_of.items()]
        print(", ".join([*parts, *_notes(progress)]), file=sys.stderr, flush=True)

    def _move_bars(self, progress: "BuildProgress") -> None:
        assert self._bars is not None
        for name, total in progress.total_of.items():
            if total and name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=total, note="")
        notes = ", ".join([*_rates(self._facts(progress)), *_notes(progress)])
        for name, task in self._tasks.items():
            is_first = name == next(iter(self._tasks))  # what is said of all stands once
            done, total = progress.done_of.get(name, 0), progress.total_of[name]
            self._bars.update(task, completed=done, total=total, note=notes if is_first else "")


def _rates(facts: dict[str, Any]) -> list[str]:
    busy = facts["device_busy"]
    return [f"{facts['images_per_s']:.1f} images/s", *([f"device busy {as_percent(busy)}"] if busy else [])]


def _notes(progress: "BuildProgress") -> list[str]:
    notes = []
    if progress.bottleneck not in (None, "device"):
        notes.append(f"it waits for {WAITS_FOR[progress.bottleneck]}")
    if progress.images_bad:
        notes.append(f"{counted(progress.images_bad, 'image')} without a latent")
    if progress.is_waiting:
        notes.append(f"{progress.modality}, shard {progress.shard} of {progress.n_shards}, which another builder has")
    return notes


def _make_bars() -> "Progress":
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("images"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
