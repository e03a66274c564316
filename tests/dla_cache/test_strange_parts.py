"""Parts of a store that are links, pipes or devices, and a file system without locks: an error, never a hang."""

import errno
import fcntl
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dla_cache.build import build_cache
from dla_cache.durable import read_file
from dla_cache.errors import StoreError
from dla_cache.manifest import Manifest
from dla_cache.spec import CacheSpec
from dla_cache.store import LatentStore, open_store
from dla_cache.takedown import take_down
from dla_cache.verify import verify_store

SECONDS = 20


@pytest.fixture
def store(tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable) -> LatentStore:
    build_cache(manifest, spec, tmp_path / "s", open_source=open_source)
    return open_store(tmp_path / "s")


@pytest.fixture(autouse=True)
def never_hangs() -> Iterator[None]:
    """A read that waits ends the test."""

    def on_alarm(*_: object) -> None:
        raise TimeoutError(f"no answer for {SECONDS} s")

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def one_of(store: LatentStore, part: str) -> Path:
    found = {
        "shard": lambda: store.shard_path("depth", 1),
        "record": lambda: next((store.path / "commits" / "depth").glob("[!.]*")),
        "rows": lambda: next((store.path / "rows").glob("*.arrow")),
        "index of rows": lambda: next((store.path / "rows").glob("index-*")),
    }
    return found[part]()


def read_all(path: Path) -> bytes:
    store = open_store(path)
    return store.read("depth", store.rows_of()).tobytes()


def bind(path: Path) -> None:
    folder = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(folder)


MAKERS = {"pipe": os.mkfifo, "socket": bind, "/dev/zero": lambda path: path.symlink_to("/dev/zero")}


@pytest.mark.parametrize("part", ["shard", "record", "rows", "index of rows"])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_part_that_is_no_file_is_refused_at_once(store: LatentStore, part: str, kind: str) -> None:
    path = one_of(store, part)
    path.unlink()
    MAKERS[kind](path)
    with pytest.raises(StoreError, match=path.name[:12]):
        read_all(store.path)
    if part == "shard":
        assert "depth, shard 1" in [problem.where for problem in verify_store(open_store(store.path)).problems]


def test_a_file_of_ten_terabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as file:
        try:
            file.truncate(10**13)
        except OSError:
            pytest.skip("NOT TESTED: no file of 10 TB can be made here")
    with pytest.raises(OSError, match="do not fit into memory"):
        read_file(path)


def test_a_surplus_pipe_and_a_link_are_problems(store: LatentStore) -> None:
    os.mkfifo(store.path / "pipe")
    (store.path / "link").symlink_to("/dev/zero")
    problems = {problem.where: problem.what for problem in verify_store(store).problems}
    assert problems["pipe"].startswith("it is a pipe, a socket or a device")
    assert problems["link"].startswith("it is a link, which may lead out of the store")


@pytest.mark.parametrize("part", ["commits", "commits/depth", "shards", "rows"])
def test_a_store_with_a_link_for_a_folder_is_read_and_never_written(
    tmp_path: Path, store: LatentStore, manifest: Manifest, spec: CacheSpec, open_source: Callable, part: str
) -> None:
    folder = store.shard_path("depth", 0).parent if part == "shards" else store.path / part
    folder.rename(tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside")
    before = sorted(path.name for path in (tmp_path / "outside").iterdir())
    linked = open_store(store.path)
    assert linked.read("depth", linked.rows_of()).tobytes() == store.read("depth", store.rows_of()).tobytes()
    works: list[Callable[[], object]] = [
        lambda: build_cache(manifest, spec, store.path, open_source=open_source, repair=True),
        lambda: take_down([store.path], ["image-4"]),
        lambda: linked.withdraw("depth", linked.committed("depth")),
    ]
    for work in works:
        with pytest.raises(StoreError, match=rf"`{folder}` is a link"):
            work()
    assert sorted(path.name for path in (tmp_path / "outside").iterdir()) == before
    assert f"{folder.relative_to(store.path)}" in [problem.where for problem in verify_store(linked).problems]


def test_a_shard_that_is_a_link_is_made_again_in_its_place(
    tmp_path: Path, store: LatentStore, manifest: Manifest, spec: CacheSpec, open_source: Callable
) -> None:
    path = store.shard_path("depth", 1)
    content = path.read_bytes()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    report = build_cache(manifest, spec, store.path, open_source=open_source, repair=True)
    assert (report.shards_repaired, path.is_symlink(), path.read_bytes() == content) == (1, False, True)
    assert (tmp_path / "elsewhere").read_bytes() == content


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_a_build_is_one_error_and_what_is_committed_stays(
    store: LatentStore,
    manifest: Manifest,
    spec: CacheSpec,
    open_source: Callable,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    store.withdraw("depth", {4: store.committed("depth")[4]})
    committed, latents = store.committed("depth"), store.read("depth", store.rows_of(["train"])[:5])
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        with pytest.raises(StoreError, match=f"cannot be written: {os.strerror(code)}") as refused:
            build_cache(manifest, spec, store.path, open_source=open_source)
        assert "file system that has locks" in refused.value.hint
        assert open_store(store.path).read("depth", store.rows_of(["train"])[:5]).tobytes() == latents.tobytes()
    assert open_store(store.path).committed("depth") == committed
    assert build_cache(manifest, spec, store.path, open_source=open_source).shards_committed == 1
