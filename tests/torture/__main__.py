"""`make torture`: every cruelty of this folder in its full number, one table, and exit code 1 if anything was silent.

    python -m tests.torture [PART ...] [--flips 1000] [--kills 50] [--seed 0] [--case 17] [--folder FOLDER]

Parts are `damage`, `bad-input`, `crowds` and `kills`; all if none is named. Cases are numbered and follow from seed and
number alone: `damage --case 17` repeats that one in each store and says what happened.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.torture.bad_input import try_bad_input
from tests.torture.crowds import NoMount, full_disk, two_builders
from tests.torture.flips import Victim, choose_damage, inflict
from tests.torture.kills import kill_often, make_works
from tests.torture.outcome import Outcome, Tally
from tests.torture.stores import make_stores

LAYOUTS = ("zarr", "webdataset")
Found = Iterator[tuple[str, Outcome]]


def damage(folder: Path, arguments: argparse.Namespace) -> Found:
    """`--flips` bytes flipped and a fifth as many files cut short, in each of the four stores."""
    counts = {"flip": arguments.flips, "truncation": arguments.flips // 5}
    for name, path in make_stores(folder).items():
        victim = Victim(path)
        for kind, count in counts.items():
            for number in range(count) if arguments.case is None else [arguments.case]:
                found = choose_damage(victim, kind, number, arguments.seed)
                for asked, outcome in zip(("verify", "stream"), inflict(victim, found), strict=True):
                    if arguments.case is not None:
                        print(f"{name}: {outcome.verdict}: {outcome.said}")
                    yield f"{kind}, {name}: {asked}", outcome


def bad_input(folder: Path, _arguments: argparse.Namespace) -> Found:
    """Foreign, newer, half-written and forged stores, at every door."""
    folder.mkdir()
    yield from try_bad_input(folder)


def crowds(folder: Path, _arguments: argparse.Namespace) -> Found:
    """Two builders of one store, and full disks."""
    folder.mkdir()
    for layout in LAYOUTS:
        yield from two_builders(folder / f"two-{layout}", layout, 5)
        try:
            yield from full_disk(folder / f"full-{layout}", layout)
        except NoMount as error:
            print(f"NOT RUN: full disks, {layout}: {error}", file=sys.stderr)


def kills(folder: Path, arguments: argparse.Namespace) -> Found:
    """`--kills` of builds in each layout, and a tenth as many of conversions, imports and removals."""
    folder.mkdir()
    for name, work in make_works(folder).items():
        n_kills = arguments.kills if name.startswith("build") else max(1, arguments.kills // 10)
        for outcome in kill_often(work, folder, n_kills, arguments.seed):
            yield f"SIGKILL, {name}", outcome


PARTS: dict[str, Callable[[Path, argparse.Namespace], Found]] = {
    "damage": damage,
    "bad-input": bad_input,
    "crowds": crowds,
    "kills": kills,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Tortures small stores and counts what was noticed.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--flips", type=int, default=1000, help="flipped bytes in each of four stores")
    parser.add_argument("--kills", type=int, default=50, help="kills of a build in each layout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="one number of `damage` alone, with what was said")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if not given")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - PARTS.keys()
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}: it is one of {', '.join(PARTS)}")
    tally = Tally()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name in arguments.parts or PARTS:
            started = time.monotonic()
            for kind, outcome in PARTS[name](Path(folder) / name, arguments):
                tally.add(kind, [outcome])
            print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print(tally.table())
    for failure in tally.failures:
        print(failure, file=sys.stderr)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
