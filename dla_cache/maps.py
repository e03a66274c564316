"""Files as memory that is read."""

import errno
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dla_cache.durable import open_regular
from dla_cache.errors import TooManyFilesError


def map_file(path: Path) -> Any:
    """A read-only map of a file, which the kernel refuses to make of nothing.

    Raises:
        TooManyFilesError: if the process may not open one more.
        OSError: if there is no such file, or none that can be mapped.
    """
    with naming_a_lack_of_files(path), open(open_regular(path), "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


@contextmanager
def naming_a_lack_of_files(path: Path) -> Iterator[None]:
    """Turns the error of an open or a map into one that says so where the process has too many files open."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise TooManyFilesError(
                f"`{path}` cannot be opened: the process has as many files open as it may",
                hint="close some, or raise the limit (`ulimit -n`)",
            ) from error
        raise
