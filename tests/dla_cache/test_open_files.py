"""Files mapped at a time: as many as the shards need if the process may, and no failure if it may not."""

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dla_cache.errors import CorruptShardError, StoreError
from dla_cache.store.reading import MAPS_AT_MOST, OTHER_FILES, maps_at_once


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def allow_files() -> Iterator[Callable[[int], None]]:
    """Sets the soft limit of this process, until the test ends."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda soft: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("layout", ["zarr"], indirect=True)
def test_the_soft_limit_of_open_files_is_raised_as_far_as_the_shards_need(
    allow_files: Callable[[int], None], layout: str
) -> None:
    allow_files(1024)
    assert maps_at_once(500) == 500
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 1024
    assert maps_at_once(3000) == 3000
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 3000 + OTHER_FILES
    assert maps_at_once(0) == 1


@pytest.mark.parametrize(
    ("limits", "maps"),
    [((1024, 1024), 512), ((256, 256), 1), ((1024, -1), MAPS_AT_MOST), ((-1, -1), MAPS_AT_MOST)],
    ids=["no more to be had", "fewer than others need", "no hard limit", "no limit"],
)
@pytest.mark.parametrize("layout", ["zarr"], indirect=True)
def test_no_more_files_are_mapped_than_the_limit_leaves(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], maps: int, layout: str
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _which, _limits: None)
    assert maps_at_once(10**6) == maps


def test_a_system_that_refuses_to_raise_the_limit_is_asked_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_which: int, _limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _which: (600, -1))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert maps_at_once(1000) == 88


def test_a_store_is_read_where_other_files_of_the_process_leave_few(
    tmp_path: Path, made: SimpleNamespace, allow_files: Callable[[int], None]
) -> None:
    recipe = made.recipe()
    latents = made.latents(recipe, 15)
    store = made.store(tmp_path / "s", recipe, latents, 1)
    allow_files(open_files() + 6)
    for seed in range(3):
        rows = np.random.default_rng(seed).permutation(15)
        np.testing.assert_array_equal(store.read("depth", rows), latents[rows])


def test_a_lack_of_files_is_one_error_and_no_damage(
    tmp_path: Path, made: SimpleNamespace, allow_files: Callable[[int], None]
) -> None:
    recipe = made.recipe()
    store = made.store(tmp_path / "s", recipe, made.latents(recipe, 4), 2)
    store.committed("depth")  # the records are read
    allow_files(3)
    with pytest.raises(StoreError, match="as many files open as it may") as refused:
        store.read("depth", np.arange(4))
    assert not isinstance(refused.value, CorruptShardError)
