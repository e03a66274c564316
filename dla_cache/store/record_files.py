"""Where the files of one commit log lie: each is written once, under a name that tells its content, and removed."""

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Protocol

from dla_cache.durable import locked_folder, no_link, sync_folder, write_durably


class RecordFiles(Protocol):
    """The files of a log."""

    folder: Path
    """Where they lie, or their copies."""

    @property
    def place(self) -> str:
        """What messages call it."""

    def names(self) -> list[str]:
        """Of all files, at this moment.

        Raises:
            OSError: if they cannot be listed.
        """

    def was_whole(self, names: Sequence[str]) -> bool:
        """Whether the files that were listed, and have been read since, were all that there were at one moment."""

    def path(self, name: str) -> Path:
        """A file, to be read.

        Raises:
            FileNotFoundError: if it was removed, at once or when it is opened.
        """

    def commit(self, shard: int, is_committed: Callable[[], bool], make: Callable[[], tuple[str, bytes]]) -> bool:
        """Writes the record of a shard, its name and content by `make`, unless it is committed; whether it did."""

    def write(self, name: str, content: bytes) -> None:
        """Puts a file there."""

    def remove(self, name: str) -> None:
        """Removes one that is there."""

    def sync(self) -> None:
        """Makes what was removed stay so."""

    def one_at_a_time(self) -> AbstractContextManager[None]:
        """Keeps others from merging files at the same time."""


class LocalRecords:
    """The files of a folder, which holds nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def place(self) -> str:
        return str(self.folder)

    def names(self) -> list[str]:
        return sorted(entry.name for entry in os.scandir(self.folder) if not entry.name.startswith("."))

    def was_whole(self, names: Sequence[str]) -> bool:
        # A merger may move records while the folder is listed. It brings its merged file before it deletes, so a
        # listing is whole if the merged files are the same after it. A lock would do as well, but a reader of a
        # read-only store could not take it.
        return _merged(names) == _merged(self.names())

    def path(self, name: str) -> Path:
        return self.folder / name

    def commit(self, shard: int, is_committed: Callable[[], bool], make: Callable[[], tuple[str, bytes]]) -> bool:
        claim = self.folder / f".{shard}.json.tmp"
        with _locked_file(claim) as file:
            if is_committed():
                claim.unlink()
                return False
            try:
                name, content = make()
                file.truncate(0)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                claim.rename(self.folder / name)
            except OSError:
                with suppress(OSError):
                    claim.unlink()
                raise
            sync_folder(self.folder)
        return True

    def write(self, name: str, content: bytes) -> None:
        write_durably(self.folder / name, content)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()

    def sync(self) -> None:
        sync_folder(self.folder)

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        with locked_folder(self.folder):
            for leftover in self.folder.glob(".consolidated-*.tmp"):
                leftover.unlink()
            yield


def _merged(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.endswith(".parquet")]


@contextmanager
def _locked_file(path: Path) -> Iterator[IO[bytes]]:
    """The file at `path`, made if absent, under an exclusive lock; waits for whoever holds it.

    Whoever held it may have renamed or deleted the file, and a lock on a file without a name
    excludes nobody: then it starts again.
    """
    while True:
        with open(path, "ab", opener=no_link) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                is_current = os.path.samestat(path.stat(), os.fstat(file.fileno()))
            except FileNotFoundError:
                is_current = False
            if is_current:
                yield file
                return
