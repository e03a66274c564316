"""The cache of objects: fetched once, bounded, and never half a file."""

import hashlib
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dla_cache.errors import CorruptShardError, StoreError
from dla_cache.remote import FolderObjects, MissingObjectError, ObjectStat, ReadThroughCache, S3Objects


class CountedObjects(FolderObjects):
    """A folder that counts what is fetched from it, and is slow where it is told to be."""

    def __init__(self, folder: Path, seconds: float = 0) -> None:
        super().__init__(folder)
        self.n_fetched = 0
        self.seconds = seconds

    def read_into(self, name: str, file: BinaryIO, stat: ObjectStat) -> None:
        self.n_fetched += 1
        time.sleep(self.seconds)
        super().read_into(name, file, stat)


@pytest.fixture
def source(tmp_path: Path) -> CountedObjects:
    """Objects `0` to `9`; object n has n times 10 bytes."""
    made = CountedObjects(tmp_path / "source")
    for number in range(10):
        made.write(str(number), bytes([number]) * 10 * number)
    return made


@pytest.fixture
def cache(tmp_path: Path) -> ReadThroughCache:
    return ReadThroughCache(tmp_path / "cache", 100)


def test_an_object_is_fetched_once_for_each_version(source: CountedObjects, cache: ReadThroughCache) -> None:
    for version in ("1", "1", "2", "1"):
        assert cache.map(source, "7", version)[:] == bytes([7]) * 70 or version == "2"
        if version == "1":
            source.write("7", bytes([9]) * 20)
    assert source.n_fetched == 2
    assert cache.size_bytes() == 90


def test_an_object_below_a_prefix_is_mapped_like_a_file(s3: S3Objects, proxy: Any, cache: ReadThroughCache) -> None:
    s3.write("depth/c.0", b"latents")
    assert cache.map(s3, "depth/c.0", "version")[2:5] == b"ten"
    n_requests = len(proxy.requests)
    assert cache.map(s3, "depth/c.0", "version")[:] == b"latents"
    assert len(proxy.requests) == n_requests


@given(asked=st.lists(st.integers(0, 9), max_size=30), max_bytes=st.integers(90, 250))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_asked_for_comes_whole_and_the_bound_holds(
    source: CountedObjects, tmp_path_factory: pytest.TempPathFactory, asked: list[int], max_bytes: int
) -> None:
    cache = ReadThroughCache(tmp_path_factory.mktemp("cache"), max_bytes)
    for number in asked:
        assert cache.map(source, str(number), "v")[:] == bytes([number]) * 10 * number
        assert cache.size_bytes() <= max_bytes


def test_the_longest_unused_goes_first(source: CountedObjects, tmp_path: Path) -> None:
    cache = ReadThroughCache(tmp_path / "cache", 110)
    for name in ("2", "3", "4", "2", "5", "2", "4"):  # 5 takes the place of 3
        cache.map(source, name, "v")
        time.sleep(0.002)
    assert source.n_fetched == 4
    cache.map(source, "3", "v")
    assert source.n_fetched == 5


def test_a_map_outlives_the_removal_of_its_file(source: CountedObjects, cache: ReadThroughCache) -> None:
    mapped = cache.map(source, "8", "v")
    cache.map(source, "9", "v")
    assert cache.size_bytes() == 90
    assert mapped[:] == bytes([8]) * 80


def test_an_object_larger_than_the_bound_is_refused_with_both_sizes(source: CountedObjects, tmp_path: Path) -> None:
    cache = ReadThroughCache(tmp_path / "cache", 50)
    cache.map(source, "3", "v")
    with pytest.raises(StoreError, match=r"(?s)0\.000 GB.*hint: give the cache a higher bound"):
        cache.map(source, "9", "v")
    assert cache.size_bytes() == 30


def test_threads_that_ask_for_one_object_fetch_it_once(source: CountedObjects, cache: ReadThroughCache) -> None:
    source.seconds = 0.05
    with ThreadPoolExecutor(6) as pool:
        maps = list(pool.map(lambda _: cache.map(source, "9", "v"), range(6)))
    assert all(mapped[:] == bytes([9]) * 90 for mapped in maps)
    assert source.n_fetched == 1


def _read_all(source: FolderObjects, cache: ReadThroughCache, seed: int) -> None:
    for step in range(40):
        number = (seed * 7 + step * 3) % 10
        assert cache.map(source, str(number), "v")[:] == bytes([number]) * 10 * number


def test_processes_that_take_each_others_files_away_all_read_what_they_asked_for(source: CountedObjects) -> None:
    cache = ReadThroughCache(source.folder.parent / "cache", 400)
    fork = multiprocessing.get_context("fork")
    readers = [fork.Process(target=_read_all, args=(source, cache, seed)) for seed in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [reader.exitcode for reader in readers] == [0, 0, 0]
    assert cache.size_bytes() <= 400


def test_what_a_killed_process_left_is_fetched_again_or_makes_room(
    source: CountedObjects, cache: ReadThroughCache
) -> None:
    slow = CountedObjects(source.folder, seconds=60)
    for name in ("9", "8"):
        process = multiprocessing.get_context("fork").Process(target=cache.map, args=(slow, name, "v"))
        process.start()
        while not (cache.folder.is_dir() and cache.size_bytes() == int(name) * 10):
            time.sleep(0.005)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert cache.map(source, "9", "v")[:] == bytes([9]) * 90
        cache.forget(source, "9", "v")
    assert cache.size_bytes() == 0


@pytest.mark.parametrize("fault", ["missing", "other bytes", "unreadable"])
def test_what_could_not_be_fetched_leaves_nothing(
    source: CountedObjects, cache: ReadThroughCache, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "missing":
        with pytest.raises(MissingObjectError):
            cache.map(source, "nothing", "v")
    elif fault == "other bytes":
        with pytest.raises(CorruptShardError, match="sha256 with which it was committed"):
            cache.map(source, "9", "v", sha256="0" * 64)
    else:
        monkeypatch.setattr(source, "read_into", lambda *_: os.stat("/no/such/file"))
        with pytest.raises(StoreError, match="hint: "):
            cache.map(source, "9", "v")
    assert [*cache.folder.iterdir()] == []


def test_an_object_with_its_hash_is_mapped_and_can_be_forgotten(
    source: CountedObjects, cache: ReadThroughCache
) -> None:
    sha256 = hashlib.sha256(bytes([9]) * 90).hexdigest()
    for _ in range(2):
        cache.map(source, "9", "v", sha256=sha256)
        cache.forget(source, "9", "v")
        cache.forget(source, "9", "v")
    assert source.n_fetched == 2
