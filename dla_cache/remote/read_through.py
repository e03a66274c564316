"""A bounded local folder of whole objects: fetched once, read by their paths, the longest unused removed first.

Processes share one folder. Each object is fetched by one of them while the others wait for it; a killed one leaves a
temporary file that the next one overwrites or removes. All locks are the kernel's.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from dla_cache.durable import is_temporary, locked_folder, make_folder, writing_to
from dla_cache.errors import CorruptShardError, StoreError
from dla_cache.maps import map_file
from dla_cache.remote.objects import PIECE_BYTES, ObjectStore

GB = 10**9


class ReadThroughCache:
    """Objects as local files. The folder holds nothing else, and at most `max_bytes`.

    A file that is removed while a process has it mapped lies on the disk until that map is closed, and is not counted.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def map(self, objects: ObjectStore, name: str, version: str, sha256: str | None = None) -> Any:
        """A read-only map of an object, which is fetched if it is not there.

        Args:
            version: changes whenever the object's bytes do: its etag, or a hash.
            sha256: what the object has to have, checked when it is fetched.

        Raises:
            MissingObjectError: if there is no such object.
            CorruptShardError: if what was fetched has another sha256.
            StoreError: if it cannot be fetched, or does not fit into the cache.
        """
        path = self.folder / _file_name(objects, name, version)
        while True:
            try:
                os.utime(path)  # the time of last use
                return map_file(path)
            except FileNotFoundError:
                # Fetched and then removed by another process before it could be opened: it is fetched again.
                self._fetch(objects, name, path, sha256)
            except StoreError:
                raise
            except OSError as error:
                raise StoreError(
                    f"`{path}` cannot be read: {error.strerror or error}", hint="remove the folder of the cache"
                ) from error

    def forget(self, objects: ObjectStore, name: str, version: str) -> None:
        """Removes an object from the cache, as when its file turns out to be damaged; passes if it is not there."""
        with writing_to(self.folder), suppress(FileNotFoundError):
            (self.folder / _file_name(objects, name, version)).unlink()

    def size_bytes(self) -> int:
        """Bytes of all files, those that are being fetched included."""
        return sum(size for _, size, _ in self._files())

    def _fetch(self, objects: ObjectStore, name: str, path: Path, sha256: str | None) -> None:
        with writing_to(self.folder):
            make_folder(self.folder)
            with _locked_temporary(path.with_name(f".{path.name}.tmp")) as (temporary, file):
                if path.is_file():
                    return  # by another process, which this one waited for
                try:
                    stat = objects.stat(name)
                    self._make_room(file, stat.size_bytes, f"{objects.url}/{name}")
                    objects.read_into(name, file, stat)
                    file.flush()
                    os.fsync(file.fileno())
                    if sha256 is not None and _sha256_of(file) != sha256:
                        raise CorruptShardError(
                            f"`{objects.url}/{name}` does not have the sha256 with which it was committed",
                            hint="run `dla cache verify`, then `dla cache build --repair`",
                        )
                    temporary.rename(path)
                except BaseException:
                    temporary.unlink()
                    raise

    def _make_room(self, file: BinaryIO, size_bytes: int, where: str) -> None:
        """Removes the longest unused until this one fits, and takes its room, so that nobody else does."""
        if size_bytes > self.max_bytes:
            raise StoreError(
                f"`{where}` has {size_bytes / GB:.3f} GB, and the cache `{self.folder}` at most"
                f" {self.max_bytes / GB:.3f} GB",
                hint="give the cache a higher bound",
            )
        file.truncate(0)  # a killed process may have left more
        with locked_folder(self.folder):
            files = sorted(self._files())
            surplus = sum(size for _, size, _ in files) + size_bytes - self.max_bytes
            for _, size, path in files:
                if surplus <= 0:
                    break
                if not is_temporary(path) or _is_leftover(path):
                    with suppress(FileNotFoundError):
                        path.unlink()
                    surplus -= size
            if surplus > 0:
                raise StoreError(
                    f"the cache `{self.folder}` is full of what is being fetched at this moment",
                    hint="give it a higher bound, or start fewer workers",
                )
            file.truncate(size_bytes)

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Time of last use, bytes and path of every file."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    yield found.st_mtime, found.st_size, Path(entry.path)


def _file_name(objects: ObjectStore, name: str, version: str) -> str:
    return hashlib.sha256("\n".join((objects.key, name, version)).encode()).hexdigest()


def _sha256_of(file: BinaryIO) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while piece := file.read(PIECE_BYTES):
        digest.update(piece)
    return digest.hexdigest()


def _is_leftover(temporary: Path) -> bool:
    """Whether the process that was writing a file is gone: a living one holds its lock."""
    try:
        with temporary.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except (BlockingIOError, FileNotFoundError):
        return False


@contextmanager
def _locked_temporary(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """The file at `path`, made if absent, under an exclusive lock; waits for whoever holds it.

    Whoever held it has renamed or removed it, and a lock on a file without a name excludes nobody: it starts again.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with open(descriptor, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                is_current = os.path.samestat(path.stat(), os.fstat(file.fileno()))
            except FileNotFoundError:
                is_current = False
            if is_current:
                yield path, file
                return
