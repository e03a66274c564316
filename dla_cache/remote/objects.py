"""Whole objects by their names: what an object store and a local folder can both do.

An object is written whole or not at all, and can be created only if it is absent. That is all that commit
records and claims need, so what is built on it works in both places.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from dla_cache.durable import is_temporary, locked_folder, make_folder, no_link, sync_folder, writing_to
from dla_cache.errors import StoreError

PIECE_BYTES = 1 << 20
"""Of an object at a time, where it goes to a file."""


class MissingObjectError(StoreError, FileNotFoundError):
    """There is no object of this name."""


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """What is known of an object without reading it."""

    size_bytes: int
    etag: str
    """Changes whenever the object is written again; compared, never understood."""


class ObjectStore(Protocol):
    """The objects below one place. Their names are relative: parts with `/` between, none of them `.` or `..`.

    Every failure is a StoreError that names the place and says what to do.
    """

    @property
    def url(self) -> str:
        """The place, without credentials."""

    @property
    def key(self) -> str:
        """What tells the place from any other, to name copies by once it is hashed: it may hold a password."""

    def read(self, name: str) -> bytes:
        """A whole object.

        Raises:
            MissingObjectError: if there is none.
        """

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of an object, fewer where it ends before.

        Raises:
            MissingObjectError: if there is none.
        """

    def read_into(self, name: str, file: BinaryIO, stat: ObjectStat) -> None:
        """Writes an object over the beginning of a seekable file, piece by piece.

        Raises:
            MissingObjectError: if there is none.
            StoreError: if it is not the one of `stat` any more.
        """

    def write(self, name: str, content: bytes) -> None:
        """Puts an object there, in the place of the one there may be."""

    def create(self, name: str, content: bytes) -> bool:
        """Puts an object there unless there is one; whether it did. Of several at once, one does."""

    def replace(self, name: str, content: bytes, etag: str) -> bool:
        """Puts an object in the place of the one with this etag; whether it was still that one."""

    def names(self, beginning: str = "") -> Iterator[str]:
        """The names that begin so, in no particular order."""

    def sizes(self, beginning: str = "") -> Iterator[tuple[str, int]]:
        """The same with the bytes of each."""

    def stat(self, name: str) -> ObjectStat:
        """Size and etag of an object.

        Raises:
            MissingObjectError: if there is none.
        """

    def delete(self, name: str) -> None:
        """Removes an object; passes if there is none."""


class FolderObjects:
    """The files below a local folder as objects. Hidden temporary files are none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def url(self) -> str:
        return str(self.folder)

    @property
    def key(self) -> str:
        return self.url

    def read(self, name: str) -> bytes:
        try:
            return self._path(name).read_bytes()
        except OSError as error:
            raise self._unreadable(name, error) from error

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        try:
            with self._path(name).open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        except OSError as error:
            raise self._unreadable(name, error) from error

    def read_into(self, name: str, file: BinaryIO, stat: ObjectStat) -> None:
        try:
            with self._path(name).open("rb") as source:
                if _stat_of(os.fstat(source.fileno())) != stat:
                    raise changed_meanwhile(f"{self.url}/{name}")
                file.seek(0)
                while piece := source.read(PIECE_BYTES):
                    file.write(piece)
        except StoreError:
            raise
        except OSError as error:
            raise self._unreadable(name, error) from error

    def write(self, name: str, content: bytes) -> None:
        self._put(name, content, replace=True)

    def create(self, name: str, content: bytes) -> bool:
        return self._put(name, content, replace=False)

    def replace(self, name: str, content: bytes, etag: str) -> bool:
        with writing_to(self._path(name)), locked_folder(self._path(name).parent):
            if self.stat(name).etag != etag:
                return False
            self.write(name, content)
        return True

    def names(self, beginning: str = "") -> Iterator[str]:
        folder = self.folder / beginning.rpartition("/")[0]
        try:
            found = [path for path in folder.rglob("*") if path.is_file() and not is_temporary(path)]
        except OSError as error:
            raise self._unreadable(beginning, error) from error
        names = (path.relative_to(self.folder).as_posix() for path in found)
        return (name for name in names if name.startswith(beginning))

    def sizes(self, beginning: str = "") -> Iterator[tuple[str, int]]:
        for name in self.names(beginning):
            with suppress(MissingObjectError):
                yield name, self.stat(name).size_bytes

    def stat(self, name: str) -> ObjectStat:
        try:
            return _stat_of(self._path(name).stat())
        except OSError as error:
            raise self._unreadable(name, error) from error

    def delete(self, name: str) -> None:
        path = self._path(name)
        with writing_to(path), suppress(FileNotFoundError):
            path.unlink()
            sync_folder(path.parent)

    def _put(self, name: str, content: bytes, *, replace: bool) -> bool:
        path = self._path(name)
        # Others may put the same name at the same moment, so each has a temporary name of its own.
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        with writing_to(path):
            make_folder(path.parent)
            try:
                with open(temporary, "xb", opener=no_link) as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                if replace:
                    temporary.rename(path)
                elif not _linked(temporary, path):
                    return False
                sync_folder(path.parent)
                return True
            finally:
                with suppress(FileNotFoundError):
                    temporary.unlink()

    def _path(self, name: str) -> Path:
        return self.folder / checked_name(name, self.url)

    def _unreadable(self, name: str, error: OSError) -> StoreError:
        if isinstance(error, FileNotFoundError):
            return missing(f"{self.url}/{name}")
        return StoreError(
            f"`{self.url}/{name}` cannot be read: {error.strerror or error}", hint="check the disk and its permissions"
        )


def _linked(temporary: Path, path: Path) -> bool:
    """Gives a written file its name unless that is taken: a link is made whole and once, also on NFS."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        # The reply of an NFS server may be lost and the request sent again: then the name that is there is ours.
        return temporary.stat().st_nlink == 2
    return True


def _stat_of(found: os.stat_result) -> ObjectStat:
    return ObjectStat(found.st_size, f"{found.st_ino}-{found.st_mtime_ns}")


def checked_name(name: str, place: str) -> str:
    """The name, if it leads nowhere but below the place.

    Raises:
        StoreError: if it does not.
    """
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise StoreError(f"`{place}` has an object `{name}`, whose name is no path below it", hint="move it away")
    return name


def missing(where: str) -> MissingObjectError:
    """For an object that is not there."""
    return MissingObjectError(f"there is no `{where}`", hint="check the name, or restore it from a copy")


def changed_meanwhile(where: str) -> StoreError:
    """For an object that was written again while it was read."""
    return StoreError(f"`{where}` was written again while it was read", hint="run the same command again")
