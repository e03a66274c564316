"""Files that are whole or absent, at whatever moment a process dies or the power goes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dla_cache.errors import StoreError


def write_durably(path: Path, content: bytes) -> None:
    """Puts `content` at `path`: temporary name, fsync, rename, fsync of the folder.

    The temporary name is hidden and the process's own, so that two writers of one path do not
    write into each other's file; a killed one leaves it behind and no reader looks at it.

    Raises:
        OSError: if the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


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
