"""Where the bytes of an open store are: in its folder, or below a prefix of an object store (`mirror.py`).

What is small, metadata and records, is always read from a folder. Shards are mapped, written and checked through this.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, Self

from dla_cache.durable import read_file, write_durably
from dla_cache.maps import map_file
from dla_cache.shards import Shard
from dla_cache.store.creation import create_metadata
from dla_cache.store.layout import commits_folder
from dla_cache.store.metadata import StoreMetadata
from dla_cache.store.record_files import LocalRecords, RecordFiles

IS_LINK = "it is a link, which may lead out of the store: put what it leads to in its place"

COPY_IT = (
    "copy the store to a folder, as `aws s3 sync` does, and name that;"
    " `build`, `status`, `inspect`, `verify`, `explain`, `diff`, `train` and `evaluate` take the URL itself"
)

MOVE_AWAY = "move it away"
"""What cures a file that no command of ours writes, reads or removes."""


class Turns(Protocol):
    """Who computes which shard, among the builders of one store."""

    def take(self, series: str, shards: Sequence[Shard]) -> Iterator[Shard]:
        """Those that are this process's to compute; each is asked for when it is about to be begun."""

    def release(self, series: str, shard: int) -> None:
        """Says that one is committed."""

    def left(self, series: str) -> Sequence[Shard]:
        """Of those that others had, what is not committed; if there is any, after a moment."""


class StoreFiles(Protocol):
    """The bytes of a store. Names are paths below it, with `/`."""

    path: Path
    """The folder of metadata and records, or of copies of them."""

    @property
    def place(self) -> str:
        """What messages call the store."""

    def map(self, names: Sequence[str], sha256: str) -> list[Any]:
        """Read-only maps of the files of a shard.

        Args:
            sha256: of their bytes, one after another.

        Raises:
            CorruptShardError: if a file that was fetched just now is another one.
            TooManyFilesError: if the process may not map more.
            OSError: if one is missing, or cannot be read.
        """

    def forget(self, names: Sequence[str], sha256: str) -> None:
        """Drops the copies of a shard that turned out to be damaged."""

    def size_bytes(self, name: str) -> int:
        """Of a file.

        Raises:
            FileNotFoundError: if there is none.
        """

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        """The bytes of those of these files that are there."""

    def read(self, name: str) -> bytes:
        """A whole file from where the store is, and not from a copy.

        Raises:
            FileNotFoundError: if there is none.
            OSError: if it cannot be read.
        """

    def entries(self) -> Iterator[tuple[str, str | None]]:
        """The names of all files there are, in order, and what is wrong with one that no store has."""

    def write(self, name: str, content: bytes) -> None:
        """Puts a file there, safe from then on.

        Raises:
            OSError: if it cannot be written.
        """

    def records(self, series: str) -> RecordFiles:
        """The files of the commit log of a series."""

    def refresh(self) -> None:
        """Brings copies of metadata up to date; none is left where there is no store.

        Raises:
            StoreError: if the place cannot be reached.
        """

    def create(self, wanted: StoreMetadata, *, append: bool) -> None:
        """What `create_metadata` does."""

    def turns(self, is_committed: Callable[[str, int], bool]) -> AbstractContextManager[Turns]:
        """The turns of a build, which end with the block."""

    def past_copies(self) -> AbstractContextManager["StoreFiles"]:
        """The same store, of which nothing is read from copies that were made before."""

    def naming(self) -> AbstractContextManager[None]:
        """Lets errors of the block name the place of the store where they name the folder of copies."""


class LocalFiles:
    """A store in a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def place(self) -> str:
        return str(self.path)

    def map(self, names: Sequence[str], sha256: str) -> list[Any]:
        return [map_file(self.path / name) for name in names]

    def forget(self, names: Sequence[str], sha256: str) -> None:
        pass

    def size_bytes(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        return {name: self.size_bytes(name) for name in names if (self.path / name).is_file()}

    def read(self, name: str) -> bytes:
        return read_file(self.path / name)

    def entries(self) -> Iterator[tuple[str, str | None]]:
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if path.is_symlink():
                yield name, IS_LINK
            elif path.is_file():
                yield name, None
            elif not path.is_dir() and path.exists():  # not another process's file that has its final name by now
                yield name, f"it is a pipe, a socket or a device: {MOVE_AWAY}"

    def write(self, name: str, content: bytes) -> None:
        write_durably(self.path / name, content)

    def records(self, series: str) -> RecordFiles:
        return LocalRecords(commits_folder(self.path, series))

    def refresh(self) -> None:
        pass

    def create(self, wanted: StoreMetadata, *, append: bool) -> None:
        create_metadata(self.path, wanted, append=append)

    def turns(self, is_committed: Callable[[str, int], bool]) -> AbstractContextManager[Turns]:
        return nullcontext(EverybodysTurn())

    @contextmanager
    def past_copies(self) -> Iterator[Self]:
        yield self

    def naming(self) -> AbstractContextManager[None]:
        return nullcontext()


class EverybodysTurn:
    """Each computes what it is given: in a folder the kernel's lock of a shard lets one commit it."""

    def take(self, series: str, shards: Sequence[Shard]) -> Iterator[Shard]:
        return iter(shards)

    def release(self, series: str, shard: int) -> None:
        pass

    def left(self, series: str) -> Sequence[Shard]:
        return ()
