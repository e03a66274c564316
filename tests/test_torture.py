"""A little of `make torture`: damage, kills and bad input on small stores; docs/torture.md has all of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.torture.bad_input import try_bad_input
from tests.torture.crowds import NoMount, full_disk, two_builders
from tests.torture.flips import Victim, choose_damage, inflict
from tests.torture.kills import kill_often, quick_build_work
from tests.torture.outcome import NOTICED, OTHER, SILENT, Outcome, Tally
from tests.torture.stores import make_manifest, make_stores

LAYOUTS = ("zarr", "webdataset")
STORES = [f"{layout}, {records}" for layout in LAYOUTS for records in ("loose", "consolidated")]


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_stores(tmp_path_factory.mktemp("torture"))


def tally_of(found: Iterator[tuple[str, Outcome]]) -> Tally:
    tally = Tally()
    for kind, outcome in found:
        tally.add(kind, [outcome])
    return tally


@pytest.mark.parametrize("name", STORES)
def test_no_flipped_byte_and_no_cut_file_is_read_as_something_else(stores: dict[str, Path], name: str) -> None:
    victim = Victim(stores[name])
    damages = [
        choose_damage(victim, kind, number, seed=1)
        for kind, count in (("flip", 42), ("truncation", 8))
        for number in range(count)
    ]
    tally = tally_of((damage.kind, outcome) for damage in damages for outcome in inflict(victim, damage))
    assert tally.failures == []
    assert tally.counts["flip"].total() == 84


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_build_that_is_killed_three_times_loses_nothing_and_doubles_nothing(tmp_path: Path, layout: str) -> None:
    work = quick_build_work(make_manifest(tmp_path / "data", 16), layout)
    outcomes = kill_often(work, tmp_path, 3, seed=0)
    assert [outcome.said for outcome in outcomes if outcome.is_failure] == []
    assert len(outcomes) == 3


def test_bad_stores_are_one_error_with_a_hint_or_do_no_harm(stores: dict[str, Path]) -> None:
    tally = tally_of(try_bad_input(stores["zarr, loose"].parent, every=41, seconds=3))
    assert tally.failures == []
    assert sum(counter[NOTICED] for counter in tally.counts.values()) > 10


def test_of_two_builders_with_two_specs_one_is_refused(tmp_path: Path) -> None:
    tally = tally_of(two_builders(tmp_path / "two", "zarr", 1, [(0, 1)]))
    assert tally.failures == []
    assert [dict(counter) for counter in tally.counts.values()] == [{NOTICED: 1}]


def test_a_full_disk_is_one_error_and_with_more_room_the_command_goes_on(tmp_path: Path) -> None:
    try:
        tally = tally_of(full_disk(tmp_path / "full", "webdataset", (120,), short=True))
    except NoMount as error:
        pytest.skip(f"NOT TESTED, a small disk cannot be mounted here: {error}")
    assert tally.failures == []
    assert tally.counts["full disk"][NOTICED] == 1


def test_the_table_counts_every_verdict() -> None:
    verdicts = (NOTICED, NOTICED, SILENT, OTHER)
    tally = tally_of(("a kind", Outcome(verdict, "said")) for verdict in verdicts)
    assert tally.table().splitlines()[1].split() == ["a", "kind", "4", "2", "0", "0", "1", "1", "0"]
    assert tally.failures == ["a kind: silent: said", "a kind: other: said"]
