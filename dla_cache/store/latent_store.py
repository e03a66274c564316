"""The store: shards in, batches out, however they lie on disk.

A shard is committed when its record is, and its record is written last. A reader believes
records only, never the files: rows that were not computed would read as zeros from an array.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dla_cache.durable import write_durably, writing_to
from dla_cache.errors import CorruptShardError, ImageError, IncompleteBuildError, MissingLatentError, name_some
from dla_cache.shards import Shard, plan_shards
from dla_cache.spec import Recipe
from dla_cache.store.commits import CommitLog, CommitRecord
from dla_cache.store.content import Payload, checked_latents, content_hash, content_sum
from dla_cache.store.layout import (
    IMAGES,
    OpenShard,
    SeriesLayout,
    commits_folder,
    open_shard,
    payload_bytes,
    stored_dtype,
)
from dla_cache.store.metadata import hash_of_images, how_to_go_on, read_metadata, unchanged_rows
from dla_cache.store.reading import RowsWatch, map_file
from dla_cache.store.statistics import LatentStatistics, SplitStatistics, measure, merge_statistics

MAX_OPEN_SHARDS = 512
"""Mapped shard files at a time; each holds a file descriptor, of which a process usually has 1024."""


class LatentStore:
    """An open store; `open_store` and `create_store` make one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = read_metadata(path)
        self.rows = self.metadata.rows
        self.class_names = self.metadata.class_names
        self.shard_size = self.metadata.shard_size
        self.shards = plan_shards(len(self.rows), self.shard_size)
        self._removed = frozenset(image.row for image in self.rows if image.removed)
        self._layouts = self.metadata.series
        self._logs = {series: CommitLog(commits_folder(path, series)) for series in self._layouts}
        self._rows_watch = RowsWatch(path, self.metadata)
        self._open = lru_cache(MAX_OPEN_SHARDS)(self._open_shard)

    def __reduce__(self) -> tuple[type["LatentStore"], tuple[Path]]:
        return LatentStore, (self.path,)  # maps of files do not travel to another process

    @property
    def modalities(self) -> tuple[str, ...]:
        """In alphabetical order."""
        return tuple(self.metadata.recipes)

    @property
    def series(self) -> tuple[str, ...]:
        """All that shards are committed of: the modalities, then `images` if the store holds them."""
        return tuple(self._layouts)

    @property
    def layout_name(self) -> str:
        """How the store lies on disk: `zarr` or `webdataset`."""
        return self.metadata.layout.name

    @property
    def has_images(self) -> bool:
        """Whether the images' own bytes belong to the store; they need not all be committed yet."""
        return IMAGES in self._layouts

    def recipe(self, modality: str) -> Recipe:
        """What the numbers of a modality are.

        Raises:
            MissingLatentError: if the store has no such modality.
        """
        try:
            return self.metadata.recipes[modality]
        except KeyError:
            raise MissingLatentError(
                f"`{self.path}` has no modality `{modality}`",
                hint=f"it has {', '.join(f'`{name}`' for name in self.modalities) or 'none'}",
            ) from None

    def recipe_hash(self, series: str) -> str:
        """The hash of what a series is, as its commit records say it."""
        if series == IMAGES:
            self.layout_of(IMAGES)
            return hash_of_images(self.metadata.images)
        return self.recipe(series).hash

    def layout_of(self, series: str) -> SeriesLayout:
        """How the shards of a series lie on disk.

        Raises:
            MissingLatentError: if the store has no such series.
        """
        if series == IMAGES and not self.has_images:
            raise MissingLatentError(
                f"`{self.path}` does not hold the bytes of its images",
                hint="name the folder they lie in, or add them: `dla cache build` with `--set images=original`",
            )
        if series != IMAGES:
            self.recipe(series)
        return self._layouts[series]

    def committed(self, series: str) -> dict[int, CommitRecord]:
        """The records of all committed shards by shard index, as the disk has them now."""
        self.layout_of(series)
        return self._logs[series].read()

    def missing(self, series: str) -> list[int]:
        """The planned shards that no record vouches for."""
        committed = self.committed(series)
        return [shard.index for shard in self.shards if shard.index not in committed]

    def require_complete(self, series: Sequence[str] | None = None) -> None:
        """Passes a store in which every planned shard of these series, by default all modalities, is committed.

        Raises:
            IncompleteBuildError: naming what is missing.
            MissingLatentError: if the store has no such series.
        """
        for name in self.modalities if series is None else series:
            missing = self.missing(name)
            if missing:
                raise IncompleteBuildError(
                    f"`{self.path}` lacks {len(missing)} of {len(self.shards)} shards of `{name}`:"
                    f" {name_some([str(shard) for shard in missing])}",
                    hint=how_to_go_on(self.path),
                )

    def rows_of(self, splits: Sequence[str] | None = None) -> NDArray[np.int64]:
        """The rows of some splits in row order, [n]; of all splits when None."""
        return self.rows.rows_of(splits)

    def kept_rows(self, shard: Shard) -> NDArray[np.int64]:
        """The rows of a shard whose images were not removed, [n]."""
        return np.array([row for row in range(shard.start, shard.stop) if not self.rows[row].removed], np.int64)

    def shard_files(self, series: str, shard: int) -> tuple[Path, ...]:
        """The files of a shard, the one with the payloads first."""
        return tuple(self.path / name for name in self.layout_of(series).files(shard))

    def shard_path(self, series: str, shard: int) -> Path:
        """The file with a shard's payloads."""
        return self.shard_files(series, shard)[0]

    def write_shard(
        self, modality: str, shard: Shard, latents: NDArray[np.generic], *, seconds: float, device: str
    ) -> bool:
        """Writes and commits the raw latents [n, *shape] of one shard; whether it was this call that committed it.

        They are those of its images that were not removed, see `kept_rows`.

        Where a process dies decides nothing: before the last rename the shard is not committed and
        the next attempt overwrites its leftovers, after it all is safe. A shard that is committed
        already, maybe meanwhile by another process, stays as it is.

        Raises:
            LatentShapeError, NonFiniteLatentError: if the latents are not what the recipe declares.
            StoreError: if the disk refuses, does not give back what was written, or images were removed from the
                store since it was opened.
        """
        latent = self.recipe(modality).format
        samples = np.ascontiguousarray(checked_latents(latents, latent, self.rows.kept_ids_of(shard)))
        payloads = samples.view(np.uint8).reshape(len(samples), payload_bytes(latent))
        return self._commit(modality, shard, payloads, seconds=seconds, device=device)

    def write_images(self, shard: Shard, contents: Sequence[bytes], *, seconds: float) -> bool:
        """Writes and commits the files of one shard's images, as `write_shard` does with latents.

        Raises:
            ImageError: if they are not the files of the row table.
            StoreError: as of `write_shard`.
        """
        self.layout_of(IMAGES)
        changed = self.rows.changed_images(self.kept_rows(shard).tolist(), contents)
        if changed:
            raise ImageError(
                f"not the files of the row table: {name_some([self.rows.image_ids[row] for row in changed])}",
                hint="restore the images, or make manifest and store again",
            )
        return self._commit(IMAGES, shard, contents, seconds=seconds, device="cpu")

    def _commit(self, series: str, shard: Shard, payloads: Any, *, seconds: float, device: str) -> bool:
        with unchanged_rows(self.path, self.metadata):
            return self._logs[series].commit_once(
                shard.index, lambda: self._write(series, shard, payloads, seconds=seconds, device=device)
            )

    def _write(self, series: str, shard: Shard, payloads: Any, *, seconds: float, device: str) -> CommitRecord:
        contents = self.encode_shard(series, shard, payloads)
        digest = hashlib.sha256()
        for path, content in zip(self.shard_files(series, shard.index), contents, strict=True):
            write_durably(path, content)
            digest.update(content)
        return CommitRecord(
            modality=series,
            shard=shard.index,
            n_rows=len(shard),
            size_bytes=sum(len(content) for content in contents),
            file_sha256=digest.hexdigest(),
            content_sum=f"{content_sum(self.rows.kept_ids_of(shard), payloads):064x}",
            recipe_hash=self.recipe_hash(series),
            statistics=self.measure_shard(series, shard, payloads),
            seconds=seconds,
            device=device,
        )

    def replace_shard(self, shard: Shard, payloads: Any, before: CommitRecord) -> None:
        """Puts these payloads of its `kept_rows` in the place of those of a shard, which may be withdrawn already.

        Whoever calls this is the `sole_writer` of the store.

        Args:
            before: the shard's record as it was; series, seconds and device stay.
        """
        series, log = before.modality, self._logs[before.modality]
        log.withdraw({index: record for index, record in log.read().items() if index == shard.index})
        log.commit_once(
            shard.index, lambda: self._write(series, shard, payloads, seconds=before.seconds, device=before.device)
        )

    def encode_shard(self, series: str, shard: Shard, payloads: Sequence[Payload]) -> tuple[bytes, ...]:
        """The bytes of a shard's files, of the payloads of its `kept_rows`."""
        following = iter(payloads)
        images = self.rows[shard.start : shard.stop]
        whole = [None if image.removed else bytes(next(following)) for image in images]
        return self.layout_of(series).encode([image.image_id for image in images], whole)

    def measure_shard(self, series: str, shard: Shard, payloads: Any) -> dict[str, SplitStatistics]:
        """The statistics of each split of a shard, as its record keeps them; none of images."""
        if series == IMAGES:
            return {}
        samples = self._samples(series, payloads)
        splits = np.array([self.rows[row].split for row in self.kept_rows(shard).tolist()])
        axis = self.recipe(series).format.channel_axis
        return {str(split): measure(samples[splits == split], axis) for split in np.unique(splits)}

    def withdraw(self, series: str, records: Mapping[int, CommitRecord]) -> None:
        """Takes these records out of the commit log: their shards are then not committed any more.

        Raises:
            StoreError: if the disk refuses, then some of them may still be there; or if images were removed meanwhile.
        """
        with unchanged_rows(self.path, self.metadata):
            self._logs[series].withdraw(records)

    def consolidate(self, series: str, *, at_least: int = 0) -> None:
        """Merges the commit records of a series into one file, if that many lie about."""
        with writing_to(self.path):
            if self._logs[series].loose_files() >= at_least:
                self._logs[series].consolidate()

    def read(self, modality: str, rows: NDArray[np.int64]) -> NDArray[np.generic]:
        """Raw latents [B, *shape] in the stored dtype, in the order of `rows`; every CRC is checked.

        Args:
            rows: int64 [B], any order, repetitions allowed.

        Raises:
            MissingLatentError: if a row's shard is not committed, or there is no such row.
            CorruptShardError: if a file or a payload is damaged, naming shard and images.
        """
        gathered = np.empty((len(rows), payload_bytes(self.recipe(modality).format)), np.uint8)
        for places, payloads in self._gather(modality, rows):
            gathered[places] = payloads
        return self._samples(modality, gathered)

    def present(self, modality: str, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which images have a latent of a modality, [B]: all, in a store by itself."""
        self.recipe(modality)
        return np.ones(len(rows), bool)

    def read_images(self, rows: NDArray[np.int64]) -> list[bytes]:
        """The files of images, in the order of `rows`; CRC and sha256 of each are checked.

        Raises:
            MissingLatentError: if the store holds no images, a row's shard is not committed, or there is no such row.
            CorruptShardError: if a file or an image is damaged, naming shard and images.
        """
        contents = [b""] * len(rows)
        for places, payloads in self._gather(IMAGES, rows):
            for place, payload in zip(places.tolist(), payloads, strict=True):
                contents[place] = payload
        changed = self.rows.changed_images(np.asarray(rows).tolist(), contents)
        if changed:
            shard = changed[0] // self.shard_size
            raise self._damaged(IMAGES, shard, "an image does not have the sha256 of its row", changed[:1])
        return contents

    def _gather(self, series: str, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Any]]:
        """Checked payloads shard by shard, and at which places of `rows` they are asked for."""
        self.layout_of(series)
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self.rows)):
            raise MissingLatentError(f"rows lie in [0, {len(self.rows)}), asked for [{rows.min()}, {rows.max()}]")
        removed = [self.rows.image_ids[row] for row in rows.tolist() if row in self._removed] if self._removed else []
        if removed:
            raise MissingLatentError(f"{len(removed)} images were removed from `{self.path}`: {name_some(removed)}")
        # In row order a shard's samples are neighbours: one gather a shard.
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        shards = ordered // self.shard_size
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        for start, stop in pairwise([*starts.tolist(), len(rows)]):
            shard = int(shards[start])
            payloads, damaged = self._open(series, shard).gather(ordered[start:stop] - shard * self.shard_size)
            if damaged:
                where = ordered[start:stop][damaged].tolist()
                raise self._damaged(series, shard, "a sample does not have its checksum", where)
            yield order[start:stop], payloads

    def _open_shard(self, series: str, shard: int) -> OpenShard:
        record = self._logs[series].find(shard)
        planned = self.shards[shard]
        try:
            if record is None:
                raise self._not_committed(series, shard)
            if record.n_rows != len(planned):
                raise ValueError(f"its record is of {record.n_rows} images, {len(planned)} are planned")
            contents = [map_file(path) for path in self.shard_files(series, shard)]
            return open_shard(self.layout_of(series), contents, record.n_rows, record.size_bytes)
        except MissingLatentError:
            raise
        except (OSError, ValueError) as error:
            if self.committed(series).get(shard) != record:  # rewritten since its record was read
                return self._open_shard(series, shard)
            raise self._damaged(series, shard, str(error), range(planned.start, planned.stop)) from error
        finally:
            self._rows_watch.require_same()  # only now: see there

    def _samples(self, modality: str, payloads: NDArray[np.uint8]) -> NDArray[np.generic]:
        latent = self.recipe(modality).format
        return np.ascontiguousarray(payloads).view(stored_dtype(latent)).reshape(len(payloads), *latent.shape)

    def statistics(self, modality: str, splits: Sequence[str]) -> LatentStatistics:
        """Per-channel statistics over all images of some splits, from the commit records.

        Raises:
            StoreError: if a split has no image.
            MissingLatentError: if a shard with such images is not committed.
        """
        self.recipe(modality)
        committed = self.committed(modality)
        shards = np.unique(self.rows_of(splits) // self.shard_size).tolist()
        for shard in shards:
            if shard not in committed:
                raise self._not_committed(modality, shard)
        self._rows_watch.require_same()
        parts = [committed[shard].statistics for shard in shards]
        return merge_statistics([part[split] for part in parts for split in sorted(part.keys() & set(splits))])

    def content_hash(self, modalities: Sequence[str] | None = None) -> str:
        """sha256 of image IDs, samples and recipes in row order, from the commit records; of all modalities when None.

        Times, devices, paths, the layout, the grouping into shards and the images' own bytes lie outside it, and so do
        images that were removed.

        Raises:
            IncompleteBuildError: if a planned shard is missing.
            MissingLatentError: if the store has no such modality.
        """
        chosen = self.modalities if modalities is None else modalities
        self.require_complete(chosen)
        sums = []
        for modality in chosen:
            committed = self.committed(modality)
            sums.append([int(committed[shard.index].content_sum, 16) for shard in self.shards])
        self._rows_watch.require_same()
        return content_hash(self.rows.kept_ids, list(zip(map(self.recipe, chosen), sums, strict=True)))

    def _not_committed(self, series: str, shard: int) -> MissingLatentError:
        planned = self.shards[shard]
        return MissingLatentError(
            f"shard {shard} of `{series}` in `{self.path}` is not committed:"
            f" {len(planned)} images from `{self.rows.image_ids[planned.start]}` on are not there",
            hint=how_to_go_on(self.path),
        )

    def _damaged(self, series: str, shard: int, problem: str, rows: Sequence[int]) -> CorruptShardError:
        return CorruptShardError(
            f"shard {shard} of `{series}` is damaged at {name_some([self.rows.image_ids[row] for row in rows])}:"
            f" {problem} (`{self.shard_path(series, shard)}`)",
            hint=f"`dla cache verify {self.path}` lists all damage; restore the file from a copy,"
            " or run its `dla cache build` with `--repair`",
        )
