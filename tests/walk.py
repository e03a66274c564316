"""The console blocks of docs/: every command is run, and what it prints is compared with the page or written into it.

A page is Markdown. Three things in it are work, from top to bottom, all pages in one folder:

    <!-- file: NAME -->        the fenced block below it is written to the file NAME
    <!-- run: COMMAND -->      a command that readers do not see, such as one that does damage
    ```console                 `$ COMMAND`, a `\\` at its end goes on in the next line, and what it prints:
                               stdout and stderr in the order in which a terminal without colour or bars shows them

`dla` runs in this process, any other command as a process without a shell. A command may fail only where the page shows
its `error:`. `<!-- recorded: WHY -->` above a block says that it is too much work for a test: its outputs stand as they
were typed, and only the command line is checked.

In what is shown, a line of `…` stands for any number of lines, and `…` in a line for any text. The rest must be equal,
but for what differs between two runs or machines, see `normalise`.

`make docs` runs this module, which brings the pages up to date. A page of which everything is still true stays as it
is. Where a block with a line of `…` has changed too much to tell what it leaves out, as many lines stay above and
below as there were.
"""

import io
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from cli.main import main
from tests.hostile import write_hostile_files

ROOT = Path(__file__).parents[1]
START = ROOT / "docs" / "start.md"
PAGES = [START, *sorted((ROOT / "docs" / "guides").glob("*.md"))]
"""In this order; the guides go on in the folder of the start."""

HOME = "/home/you"
"""What the pages call the folder that everything runs in."""

ELLIPSIS = "…"

MEASURING = re.compile(
    r"dla (?:train|study|evaluate|predict|export|report|doctor|demo|sources fit|cache plan|cache inspect|cache du)\b"
)
"""Commands whose numbers are measured: by training, on latents as this processor rounds them, or on this machine."""

HASH = re.compile(r"\b[0-9a-f]{16,64}\b")
RATE = re.compile(r"\d+\.\d+ (?=\w+/s\b)|\d+\.\d+ (?=s\b)")
BUSY = re.compile(r"(?<=device busy )\d+\.\d+ %|(?<=device        busy )\d+\.\d+ %|[,;] it wait(s|ed) for [a-z ]+")
NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class File:
    """A file that a page shows."""

    name: str
    content: str


@dataclass(frozen=True, slots=True)
class Step:
    """One command of a page."""

    command: str
    """On one line, without `$`."""
    shown: tuple[str, ...] = ()
    """The lines of output on the page."""
    first: int = 0
    """Number of the first of them, from 0; `shown` takes the place of `first : first + len(shown)`."""
    is_hidden: bool = False
    is_recorded: bool = False

    @property
    def is_measuring(self) -> bool:
        """Whether its numbers may be others on the next machine."""
        return MEASURING.match(self.command) is not None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command did."""

    step: Step
    printed: tuple[str, ...]
    exit_code: int
    seconds: float

    @property
    def fault(self) -> str | None:
        """What is wrong on the page."""
        expected = 1 if any(line.startswith("error: ") for line in self.step.shown) else 0
        if self.exit_code != expected:
            return f"ended with {self.exit_code}, the page shows {expected}"
        if self.step.is_hidden or find_lines(self.step, self.printed) is not None:
            return None
        return "prints something else than the page shows"


def read_page(text: str) -> Iterator[File | Step]:
    """What a page wants done, in its order."""
    lines = text.splitlines()
    mark, number = "", 0
    while number < len(lines):
        line = lines[number]
        if found := re.fullmatch(r"<!-- (file|run|recorded): (.+) -->", line):
            if found[1] == "run":
                yield Step(found[2], is_hidden=True)
            else:
                mark = found[0]
        elif line.startswith("```"):
            end = lines.index("```", number + 1)
            if mark.startswith("<!-- file: "):
                yield File(mark[11:-4], "\n".join([*lines[number + 1 : end], ""]))
            elif line == "```console":
                yield from _read_console(lines, number + 1, end, is_recorded=bool(mark))
            mark, number = "", end
        number += 1


def _read_console(lines: list[str], begin: int, end: int, *, is_recorded: bool) -> Iterator[Step]:
    number = begin
    while number < end:
        assert lines[number].startswith("$ "), f"output before the first command: {lines[number]}"
        command = lines[number].removeprefix("$ ")
        while command.endswith("\\"):
            number += 1
            command = f"{command[:-1].rstrip()} {lines[number].strip()}"
        first = number = number + 1
        while number < end and not lines[number].startswith("$ "):
            number += 1
        yield Step(command, tuple(lines[first:number]), first, is_recorded=is_recorded)


def normalise(line: str, *, is_measuring: bool) -> str:
    """The line without hashes of latents, rates and durations, and whether the device was busy; of a measuring command
    without numbers and widths."""
    line = BUSY.sub("", RATE.sub("# ", HASH.sub("<hash>", line.rstrip())))
    return re.sub(" +", " ", NUMBER.sub("#", line)) if is_measuring else line


def find_lines(step: Step, printed: Sequence[str]) -> list[int | None] | None:
    """Which printed line each shown one stands for, None for `…`; None for all if they differ."""
    pattern = ""
    for number, line in enumerate(step.shown):
        if line == ELLIPSIS:
            pattern += r"(?:.*\n)*?"
            continue
        parts = normalise(line, is_measuring=step.is_measuring).split(ELLIPSIS)
        pattern += rf"(?P<line{number}>{'.*'.join(map(re.escape, parts))}\n)"
    text = "".join(f"{normalise(line, is_measuring=step.is_measuring)}\n" for line in printed)
    found = re.fullmatch(pattern, text)
    if found is None:
        return None
    starts = {name: found.start(name) for name in found.groupdict()}
    return [
        text.count("\n", 0, starts[f"line{number}"]) if f"line{number}" in starts else None
        for number in range(len(step.shown))
    ]


def shorten(step: Step, printed: Sequence[str]) -> list[str]:
    """What the page should show of what was printed: as much of it as it shows today."""
    places = find_lines(step, printed)
    if places is not None:
        return [
            line if place is None or ELLIPSIS in line else printed[place].rstrip()
            for line, place in zip(step.shown, places, strict=True)
        ]
    lines = [line.rstrip() for line in printed]
    if ELLIPSIS not in step.shown:
        return lines
    above, below = step.shown.index(ELLIPSIS), len(step.shown) - 1 - step.shown.index(ELLIPSIS)
    return lines if len(lines) <= above + below else [*lines[:above], ELLIPSIS, *lines[len(lines) - below :]]


def refresh(text: str, outcomes: Sequence[Outcome]) -> str:
    """The page with what its commands print now; as it is, if nothing that it shows has become untrue."""
    if not any(outcome.fault for outcome in outcomes):
        return text
    lines = text.splitlines()
    for outcome in reversed([one for one in outcomes if not one.step.is_hidden]):
        step = outcome.step
        lines[step.first : step.first + len(step.shown)] = shorten(step, outcome.printed)
    return "\n".join([*lines, ""])


def walk(folder: Path, pages: Sequence[Path] = PAGES) -> dict[Path, list[Outcome]]:
    """Does what the pages want done, in a folder with `photos`; what each command did but for the recorded ones."""
    folder = folder.resolve()
    here, path, argv, known = Path.cwd(), [*sys.path], sys.argv, set(sys.modules)
    said = io.BytesIO()
    screen = io.TextIOWrapper(said, encoding="utf-8", write_through=True)  # one for all: a logger may keep the first
    outcomes: dict[Path, list[Outcome]] = {page: [] for page in pages}
    try:
        os.chdir(folder)
        for page in pages:
            for item in read_page(page.read_text(encoding="utf-8")):
                if isinstance(item, File):
                    (folder / item.name).write_text(item.content, encoding="utf-8")
                elif not item.is_recorded:
                    outcomes[page].append(_run(item, folder, said, screen))
    finally:
        os.chdir(here)
        sys.path[:], sys.argv = path, argv
        for name in set(sys.modules) - known:  # a page's own modules, which the next walk finds elsewhere
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
                del sys.modules[name]
    return outcomes


def _run(step: Step, folder: Path, said: io.BytesIO, screen: io.TextIOWrapper) -> Outcome:
    words = shlex.split(step.command)
    started = time.monotonic()
    if words[0] == "dla":
        begin = len(said.getvalue())
        sys.argv = words
        with redirect_stdout(screen), redirect_stderr(screen):
            try:
                main()
            except SystemExit as end:
                exit_code = end.code if isinstance(end.code, int) else 0
        content = said.getvalue()[begin:]
    else:
        words[0] = sys.executable if words[0] == "python" else words[0]
        done = subprocess.run(
            words,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=120,
            check=False,
        )
        content, exit_code = done.stdout, done.returncode
    printed = content.decode(errors="replace").replace(str(folder), HOME).splitlines()
    return Outcome(step, tuple(printed), exit_code, time.monotonic() - started)


def write_photos(folder: Path) -> None:
    """Three classes of forty photos of different sizes, and a fourth of hostile files, some of which lead out."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(("cat", "dog", "owl")):
        (folder / name).mkdir(parents=True)
        for photo in range(40):
            size = (int(rng.integers(24, 60)), int(rng.integers(24, 60)), 3)
            pixels = rng.integers(0, 80, size, np.uint8)
            pixels[..., number] += 120
            Image.fromarray(pixels).save(folder / name / f"{photo:04d}.jpg", quality=90)
    elsewhere = folder.with_name("elsewhere")
    write_hostile_files(elsewhere / "odd")
    (elsewhere / "odd").rename(folder / "odd")


def main_of_docs() -> None:
    """Brings the pages up to date, and says which commands print something else than they did."""
    with TemporaryDirectory() as name:
        write_photos(Path(name) / "photos")
        for page, outcomes in walk(Path(name)).items():
            for outcome in outcomes:
                print(f"{outcome.seconds:5.1f} s  {outcome.step.command[:100]}", file=sys.stderr)
                if outcome.fault:
                    print(f"{page.relative_to(ROOT)}: `{outcome.step.command}` {outcome.fault}")
            page.write_text(refresh(page.read_text(encoding="utf-8"), outcomes), encoding="utf-8")


if __name__ == "__main__":
    main_of_docs()
