"""The commands that a page names: relative paths, from one folder, so that they hold wherever it was copied to."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MOST_LEVELS_UP = 2
"""So far above the runs the commands' folder may lie: far enough for a store beside them, not for a home directory."""


@dataclass(frozen=True, slots=True)
class Rerun:
    """How to get the page's numbers again."""

    holds: tuple[str, ...]
    """What the folder to stand in has in it, by name."""
    train: tuple[str, ...]
    report: str
    stand_ins: tuple[str, ...]
    """Words in the commands that stand for places elsewhere."""


def plan_rerun(runs: Sequence[Path], options: Mapping[str, Path | None]) -> Rerun:
    """The commands that train each run anew and write this page again.

    Args:
        runs: resolved run folders.
        options: option of `dla report` → the place it was given; one without a place is left out.
    """
    places = {option: place.resolve() for option, place in options.items() if place is not None}
    base = common_folder(runs, list(places.values()))
    folders = [run.relative_to(base) for run in runs]
    train = [
        f"dla train {shlex.quote(str(folder / 'config.yaml'))} --out {shlex.quote(str(Path('again') / folder))}"
        for folder in folders
    ]
    inside = {option: place.relative_to(base) for option, place in places.items() if place.is_relative_to(base)}
    words = {option: option.strip("-").upper() for option in places.keys() - inside.keys()}
    given = [f"{option} {shlex.quote(str(inside.get(option, words.get(option, ''))))}" for option in places]
    report = " ".join(["dla report", *(shlex.quote(str(folder)) for folder in folders), *given])
    holds = sorted({place.parts[0] for place in [*folders, *inside.values()] if place.parts})
    return Rerun(tuple(holds), tuple(train), report, tuple(words[option] for option in places if option in words))


def common_folder(runs: Sequence[Path], places: Sequence[Path]) -> Path:
    """The folder that holds all runs; or one a little above it, if that one holds the other places as well."""
    above = [Path(os.path.commonpath([run.parent for run in runs]))]
    above += list(above[0].parents)[:MOST_LEVELS_UP]
    return next((folder for folder in above if all(place.is_relative_to(folder) for place in places)), above[0])
