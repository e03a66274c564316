"""What a reader of an open store needs besides the layout: maps of files, and whether its row table still holds."""

import mmap
from pathlib import Path
from typing import Any

from dla_cache.errors import StoreError
from dla_cache.store.layout import not_as_written
from dla_cache.store.metadata import StoreMetadata


class RowsWatch:
    """Whether a store has the row table with which it was opened: else a removed image's latent would read as zeros.

    A removal replaces row table and main file before it rewrites the first shard. So who looks here after mapping a
    shard has mapped the shard of the rows that it knows. While the main file is the same this costs one `stat`.
    """

    def __init__(self, path: Path, opened: StoreMetadata) -> None:
        self._path = path
        self._main_file = path / opened.layout.main_file
        self._opened = opened
        self._seen: tuple[int, ...] | None = None

    def require_same(self) -> None:
        """Passes if no image was removed since the store was opened.

        Raises:
            StoreError: if images were, or the main file is lost or damaged.
        """
        try:
            found = self._main_file.stat()
            state = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            if state == self._seen:
                return
            rows_sha256 = self._opened.layout.read_attributes(self._path)["rows_sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise not_as_written(self._path, f"main file `{self._main_file.name}`") from error
        if rows_sha256 != self._opened.rows_sha256:
            raise StoreError(
                f"images were removed from `{self._path}` since it was opened",
                hint="open it again (start the command again)",
            )
        self._seen = state


def map_file(path: Path) -> Any:
    """A read-only map of a file, which the kernel refuses to make of nothing."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
