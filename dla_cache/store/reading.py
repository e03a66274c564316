"""What a reader of an open store needs besides the layout: maps of files, and whether its row table still holds."""

import resource
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dla_cache.errors import CorruptShardError, MissingLatentError, StoreError, TooManyFilesError, name_some
from dla_cache.maps import naming_a_lack_of_files
from dla_cache.shards import ShardPlan
from dla_cache.store.commits import CommitLog
from dla_cache.store.files import StoreFiles
from dla_cache.store.layout import OpenShard, OtherSamplesError, not_as_written, open_shard
from dla_cache.store.metadata import StoreMetadata, has_rows_of, how_to_go_on
from dla_cache.store.rows import RowTable

MAPS_AT_MOST = 16_384
"""Files that one store keeps mapped. Linux grants a process 65,530 maps."""

OTHER_FILES = 512
"""Files that the rest of a process may have open."""


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
            with naming_a_lack_of_files(self._main_file):
                rows_sha256 = self._opened.layout.read_attributes(self._path)["rows_sha256"]
        except TooManyFilesError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise not_as_written(self._path, f"main file `{self._main_file.name}`") from error
        if not has_rows_of(self._path, self._opened, rows_sha256):
            raise StoreError(
                f"images were removed from `{self._path}` since it was opened",
                hint="open it again (start the command again)",
            )
        self._seen = state


class ShardMaps:
    """Shards of a store as maps of their files, kept once they were asked for, as many as the process may keep."""

    def __init__(
        self, files: StoreFiles, opened: StoreMetadata, shards: ShardPlan, logs: Mapping[str, CommitLog]
    ) -> None:
        self.rows_watch = RowsWatch(files.path, opened)
        self._files = files
        self._rows = opened.rows
        self._layouts = opened.series
        self._recipe_hashes = opened.recipe_hashes
        self._shards = shards
        self._shard_size = opened.shard_size
        self._logs = logs
        self.open = lru_cache(maps_at_once(len(shards) * len(logs)))(self._open)
        """The shard of a number of a series; errors as of `LatentStore.read`."""

    def _open(self, series: str, shard: int) -> OpenShard:
        try:
            return self._map(series, shard)
        except TooManyFilesError:  # others of the process have them
            if not self.open.cache_info().currsize:
                raise
            self.open.cache_clear()
            return self._map(series, shard)

    def _map(self, series: str, shard: int) -> OpenShard:
        record = self._logs[series].find(shard)
        planned = self._shards[shard]
        try:
            if record is None:
                raise self.not_committed(series, shard)
            if record.n_rows != len(planned):
                raise ValueError(f"its record is of {record.n_rows} images, {len(planned)} are planned")
            if (record.modality, record.recipe_hash) != (series, self._recipe_hashes[series]):
                raise ValueError(f"its record is of `{record.modality}`, recipe `{record.recipe_hash}`")
            layout = self._layouts[series]
            contents = self._files.map(layout.files(shard), record.file_sha256)
            return open_shard(layout, contents, record.n_rows, record.size_bytes, record.edge_crc32c)
        except (MissingLatentError, TooManyFilesError):
            raise
        except (OSError, ValueError) as error:
            if self._logs[series].find(shard, anew=True) != record:  # rewritten since its record was read
                return self._map(series, shard)
            if is_out_of_reach(error):
                raise
            rows: Sequence[int] = range(planned.start, planned.stop)
            if isinstance(error, OtherSamplesError):
                rows = [planned.start + row for row in dict.fromkeys(error.rows)]
            raise self._damaged(series, shard, said_of(error), rows) from error
        finally:
            self.rows_watch.require_same()  # only now: see there

    def not_committed(self, series: str, shard: int) -> MissingLatentError:
        """For a shard that no record vouches for."""
        planned = self._shards[shard]
        return MissingLatentError(
            f"shard {shard} of `{series}` in `{self._files.place}` is not committed:"
            f" {len(planned)} images from `{self._rows.image_ids[planned.start]}` on are not there",
            hint=how_to_go_on(self._files.path),
        )

    def refuse_damage(self, series: str, rows: NDArray[np.int64], damaged: Sequence[int]) -> None:
        """Passes if no place of `rows` is among the damaged ones.

        Raises:
            CorruptShardError: naming the first shard of these, and the images there.
        """
        if damaged:
            where = np.unique(np.asarray(rows)[damaged])
            shards = where // self._shard_size
            of_first = where[shards == shards[0]].tolist()
            raise self._damaged(series, int(shards[0]), "a sample does not have its checksum", of_first)

    def _damaged(self, series: str, shard: int, problem: str, rows: Sequence[int]) -> CorruptShardError:
        names = name_some([self._rows.image_ids[row] for row in rows])
        files = self._layouts[series].files(shard)
        record = self._logs[series].find(shard)
        if record is not None:
            self._files.forget(files, record.file_sha256)
            self.open.cache_clear()
        return CorruptShardError(
            f"shard {shard} of `{series}` is damaged at {names}: {problem} (`{self._files.place}/{files[0]}`)",
            hint=f"`dla cache verify {self._files.place}` lists all damage; restore the file from a copy,"
            " or run its `dla cache build` with `--repair`",
        )


def is_out_of_reach(error: Exception) -> bool:
    """Whether an error of reading a file says nothing of the file: network or server failed, not a disk."""
    return isinstance(error, StoreError) and not isinstance(error, (CorruptShardError, FileNotFoundError))


def said_of(error: Exception) -> str:
    """What an error says, without a hint."""
    return error.message if isinstance(error, StoreError) else str(error)


def maps_at_once(files: int) -> int:
    """How many of so many files may be mapped at a time; each holds a file descriptor.

    A process begins with a soft limit of 1024 descriptors or less, for the sake of old programs, and may raise it
    itself up to the hard limit, which is what its administrator means. It is raised here as far as the files need.
    """
    wanted = min(files, MAPS_AT_MOST) + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted and soft != resource.RLIM_INFINITY:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):  # macOS has a limit of its own below an infinite one
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    allowed = wanted if soft == resource.RLIM_INFINITY else min(wanted, soft)
    return max(1, allowed - OTHER_FILES)


def require_rows(rows: RowTable, wanted: NDArray[np.int64], store: str) -> None:
    """Passes rows of a store whose images were not removed.

    Raises:
        MissingLatentError: naming the others.
    """
    if not rows.known(wanted).all():
        strays = wanted[~rows.known(wanted)]
        raise MissingLatentError(f"rows lie in [0, {rows.end}), asked for [{strays.min()}, {strays.max()}]")
    gone = rows.removed_rows
    removed = rows.ids_of([row for row in wanted.tolist() if row in gone]) if gone else ()
    if removed:
        raise MissingLatentError(f"{len(removed)} images were removed from `{store}`: {name_some(removed)}")
