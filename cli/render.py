"""What several commands show: progress to stderr, tables to stdout."""

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_INTERVAL_S = 30.0
"""Without a terminal, one line of progress in so many seconds."""


class ProgressReporter:
    """Rate, time left and what is being worked on: a bar on a terminal, else a line now and then.

    Talks to stderr. Use it as a context manager and tell it by `update` how far the work is.
    """

    def __init__(self, title: str, unit: str, *, is_silent: bool = False) -> None:
        """
        Args:
            unit: what is counted, in the plural: `images`, `steps`.
            is_silent: shows nothing, as of a process beside one that does.
        """
        self.title = title
        self.unit = unit
        self._started = self._last_line = time.monotonic()
        self._done = self._total = self._found = 0
        self._note = ""
        self._is_silent = is_silent
        self._bar = _make_bar(unit) if sys.stderr.isatty() and not is_silent else None
        self._task = self._bar.add_task(title, total=None, rate="", note="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None and self._task is not None:
            if not self._done:  # nothing was to be done: leave no empty bar behind
                self._bar.remove_task(self._task)
            self._bar.stop()
        elif self._done and not self._is_silent:
            self._write_line()

    def update(self, done: int, total: int, note: str = "", *, found: int = 0) -> None:
        """`done` of `total` units are finished, `found` of them before this began; `note` says what is under way."""
        self._done, self._total, self._note, self._found = done, total, note, found
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, rate=self._rate_in_words, note=note)
        elif not self._is_silent and time.monotonic() - self._last_line >= LINE_INTERVAL_S:
            self._write_line()

    @property
    def _rate(self) -> float:
        """Units a second since this began."""
        return (self._done - self._found) / max(time.monotonic() - self._started, 1e-9)

    @property
    def _rate_in_words(self) -> str:
        """The rate by the second, or by the minute where that would be next to nothing."""
        is_slow = 0 < self._rate < 0.1
        return f"{60 * self._rate:.1f} {self.unit}/min" if is_slow else f"{self._rate:.1f} {self.unit}/s"

    def _write_line(self) -> None:
        self._last_line = time.monotonic()
        left = self._total - self._done
        if left:
            state = f"{left / self._rate:.0f} s left" if self._rate > 0 else "time left unknown"
        else:
            state = f"{time.monotonic() - self._started:.1f} s"
        note = f", {self._note}" if self._note else ""
        print(
            f"{self.title}: {self._done}/{self._total} {self.unit}, {self._rate_in_words}, {state}{note}",
            file=sys.stderr,
            flush=True,
        )


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 image`, `2 images`, `1,200 images`; `plural` where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def as_size(size_bytes: float) -> str:
    """Bytes in the unit that keeps the number short: `512 bytes`, `1.5 kB`, `20.3 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "bytes" else f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.3g} TB"


def as_percent(share: float) -> str:
    """A share of time: `98.4 %`."""
    return f"{100 * share:.1f} %"


def left_out(number: int) -> str:
    """What is said of images of the manifest that were removed from a store before."""
    return f"left out      {counted(number, 'image')} of the manifest: removed from this store before"


def _make_bar(unit: str) -> "Progress":
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn(unit),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout: ruled on a terminal; else aligned columns, never cut to a width, so that it can be piped."""
    texts = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD)
        for place, header in enumerate(headers):
            table.add_column(header, no_wrap=place == 0, overflow="fold")  # a name is whole, and nothing is cut
        for text in texts:
            table.add_row(*(Text(cell) for cell in text))  # a cell may hold [brackets]
        Console().print(table)
        return
    texts.insert(0, list(headers))
    widths = [max(len(text) for text in column) for column in zip(*texts, strict=True)]
    for text in texts:
        print("  ".join(cell.ljust(width) for cell, width in zip(text, widths, strict=True)).rstrip())
