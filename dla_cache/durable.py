"""Files that are whole or absent, at whatever moment a process dies or the power goes."""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

from dla_cache.errors import StoreError


def write_durably(path: Path, content: bytes) -> None:
    """Puts `content` at `path`: temporary name, fsync, read back, rename, fsync of the folder.

    The caller alone may write `path`, by a lock where there can be others. So the temporary name
    can be a fixed one, and what a killed attempt leaves there the next one overwrites. A refused
    attempt takes its own away: on a full disk it would be what keeps it full.

    Raises:
        OSError: if the disk refuses, or does not give back what was written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb", opener=no_link) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if read_file(temporary) != content:
            raise OSError(errno.EIO, "a file does not read back as written")
        temporary.rename(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def read_file(path: Path) -> bytes:
    """The content of a regular file; what might never end, as a pipe or a device, is refused before a byte is read.

    Raises:
        OSError: if there is no such file, it is no regular one, or has more bytes than fit into memory.
    """
    descriptor = open_regular(path)
    try:
        with open(descriptor, "rb") as file:
            return file.read()
    except MemoryError as error:
        size_bytes = path.stat().st_size
        raise OSError(errno.EFBIG, f"its {size_bytes:,} bytes do not fit into memory", str(path)) from error


def open_regular(path: Path) -> int:
    """A descriptor to read a regular file by.

    Raises:
        OSError: if there is no such file, or it is a folder, a pipe, a device or a socket.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor


def no_link(path: str, flags: int) -> int:
    """Opens a file for writing unless its name is a link, which could lead anywhere."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def is_temporary(path: PurePath) -> bool:
    """Whether a file bears the name of one that is being written, or that a killed process has left."""
    return path.name.startswith(".") and path.suffix == ".tmp"


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Excludes every other process that locks the same folder; the kernel frees the lock of a dead one."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, each one's name safe on disk; an existing one is fine."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Forces the names in a folder to disk: without it a rename may not outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a StoreError that names the place.

    Raises:
        StoreError: if the disk is full, the folder read-only, or a file stands where a folder must.
    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"`{path}` cannot be written: {error.strerror or error}",
            hint="choose a writable folder with free space on a file system that has locks; what is committed stays",
        ) from error
