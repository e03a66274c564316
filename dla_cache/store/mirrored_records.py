"""The files of a commit log below a prefix: what they are is asked there, and each is copied once."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from dla_cache.errors import StoreError
from dla_cache.remote import FolderObjects, MissingObjectError, ObjectStore
from dla_cache.store.claims import Claims
from dla_cache.store.layout import commits_folder
from dla_cache.store.turns import POLL_S

REQUESTS_AT_ONCE = 8

MERGING, MERGING_S = "records", 120.0
"""In place of a series and for how long: the claim of who merges or withdraws commit records."""


class MirroredRecords:
    """A commit log whose copies lie in the mirror."""

    def __init__(self, objects: ObjectStore, store: Path, series: str) -> None:
        self.folder = commits_folder(store, series)
        self._objects = objects
        self._copies = FolderObjects(store)
        self._beginning = f"{self.folder.relative_to(store).as_posix()}/"

    @property
    def place(self) -> str:
        return f"{self._objects.url}/{self._beginning}".rstrip("/")

    def names(self) -> list[str]:
        listed = (name.removeprefix(self._beginning) for name in self._objects.names(self._beginning))
        names = sorted(name for name in listed if "/" not in name and not name.startswith("."))
        copied = {entry.name for entry in os.scandir(self.folder)} if self.folder.is_dir() else set()
        fetch(self._objects, self._copies, [self._beginning + name for name in names if name not in copied])
        for name in copied.difference(names):
            if not name.startswith("."):  # else it is being written
                (self.folder / name).unlink(missing_ok=True)
        return names

    def was_whole(self, names: Sequence[str]) -> bool:
        return True  # single records are listed before merged ones, which are there before the single ones go

    def path(self, name: str) -> Path:
        if not (self.folder / name).is_file():
            fetch(self._objects, self._copies, [self._beginning + name])
        return self.folder / name

    def commit(self, shard: int, is_committed: Callable[[], bool], make: Callable[[], tuple[str, bytes]]) -> bool:
        # A claim on the shard keeps others from it. Where it has lapsed both may come here: the records of both vouch
        # for the same bytes, or one of them is found not to.
        if is_committed():
            return False
        name, content = make()
        self._objects.create(self._beginning + name, content)
        self._copies.write(self._beginning + name, content)
        return True

    def write(self, name: str, content: bytes) -> None:
        self._objects.write(self._beginning + name, content)

    def remove(self, name: str) -> None:
        self._objects.delete(self._beginning + name)

    def sync(self) -> None:
        pass

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        claims = Claims(self._objects, MERGING_S)
        while (generation := claims.acquire(MERGING, 0)) is None:
            time.sleep(POLL_S)
        try:
            yield
        finally:
            with suppress(StoreError):  # it ends by itself
                claims.release(MERGING, 0, generation)


def fetch(objects: ObjectStore, copies: FolderObjects, names: Iterable[str]) -> None:
    """Copies objects that never change, as far as they are there."""

    def copy(name: str) -> None:
        with suppress(MissingObjectError):
            copies.write(name, objects.read(name))

    if wanted := list(names):
        with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="fetch") as pool:
            list(pool.map(copy, wanted))
