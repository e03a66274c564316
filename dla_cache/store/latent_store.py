"""The store: shards in, batches out, however they lie on disk.

A shard is committed when its record is, and its record is written last. A reader believes
records only, never the files: rows that were not computed would read as zeros from an array.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dla_cache.durable import writing_to
from dla_cache.errors import ImageError, IncompleteBuildError, MissingLatentError, StoreError, name_some
from dla_cache.shards import Shard, ShardPlan
from dla_cache.spec import Recipe
from dla_cache.store.buffers import BufferPool
from dla_cache.store.commits import CommitLog, CommitRecord, Records
from dla_cache.store.content import Payload, checked_latents, content_hash, content_sum
from dla_cache.store.files import COPY_IT, LocalFiles, StoreFiles
from dla_cache.store.layout import IMAGES, SeriesLayout, commits_folder, edges_of, open_shard, payload_bytes, rows_of
from dla_cache.store.metadata import how_to_go_on, read_metadata, unchanged_rows
from dla_cache.store.parts import refuse_links
from dla_cache.store.precision import from_payloads, measure_error, to_payloads
from dla_cache.store.reading import ShardMaps, require_rows
from dla_cache.store.statistics import LatentStatistics, SplitStatistics, StoredError, measure, merge_statistics


class LatentStore:
    """An open store; `open_store` and `create_store` make one."""

    def __init__(self, path: Path, files: StoreFiles | None = None) -> None:
        """
        Args:
            path: the folder of metadata and commit records; of copies of them, where the store is somewhere else.
            files: where it is, if not in that folder.
        """
        self.path = path
        self.files = files or LocalFiles(path)
        self.metadata = read_metadata(path)
        self.rows = self.metadata.rows
        self.class_names = self.metadata.class_names
        self.shard_size = self.metadata.shard_size
        self.shards = ShardPlan(self.rows.spans, self.shard_size)
        self._layouts = self.metadata.series
        self._logs = {
            series: CommitLog(commits_folder(path, series), self.files.records(series)) for series in self._layouts
        }
        self._maps = ShardMaps(self.files, self.metadata, self.shards, self._logs)
        self._buffers = BufferPool()

    def __reduce__(self) -> tuple[type["LatentStore"], tuple[Path, StoreFiles]]:
        return LatentStore, (self.path, self.files)  # maps of files do not travel to another process

    @property
    def place(self) -> str:
        """Path or URL of the store, as messages name it."""
        return self.files.place

    def require_folder(self) -> None:
        """Passes a store that lies in a folder.

        Raises:
            StoreError: if it lies below a prefix, and its folder holds copies.
        """
        if self.place != str(self.path):
            raise StoreError(f"`{self.place}` is no folder, and this works on folders only", hint=COPY_IT)

    @contextmanager
    def past_copies(self) -> Iterator["LatentStore"]:
        """The store as it is where it lies: of one below a prefix nothing is read that was fetched before.

        Raises:
            StoreError: if it cannot be opened so.
        """
        with self.files.past_copies() as files:
            yield self if files is self.files else LatentStore(files.path, files)

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
                f"`{self.place}` has no modality `{modality}`",
                hint=f"it has {', '.join(f'`{name}`' for name in self.modalities) or 'none'}",
            ) from None

    def recipe_hash(self, series: str) -> str:
        """The hash of what a series is, as its commit records say it."""
        if series == IMAGES:
            self.layout_of(IMAGES)
            assert self.metadata.images is not None
            return self.metadata.images.hash
        return self.recipe(series).hash

    def layout_of(self, series: str) -> SeriesLayout:
        """How the shards of a series lie on disk.

        Raises:
            MissingLatentError: if the store has no such series.
        """
        if series == IMAGES and not self.has_images:
            raise MissingLatentError(
                f"`{self.place}` does not hold the bytes of its images",
                hint="name the folder they lie in, or add them: `dla cache build` with `--set images=original`",
            )
        if series != IMAGES:
            self.recipe(series)
        return self._layouts[series]

    def committed(self, series: str) -> Records:
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
                    f"`{self.place}` lacks {len(missing)} of {len(self.shards)} shards of `{name}`:"
                    f" {name_some([str(shard) for shard in missing])}",
                    hint=how_to_go_on(self.path),
                )

    def rows_of(self, splits: Sequence[str] | None = None) -> NDArray[np.int64]:
        """The rows of some splits in row order, [n]; of all splits when None."""
        return self.rows.rows_of(splits)

    def kept_rows(self, shard: Shard) -> NDArray[np.int64]:
        """The rows of a shard whose images were not removed, [n]."""
        return self.rows.kept_rows_of(shard)

    def shard_files(self, series: str, shard: int) -> tuple[Path, ...]:
        """The files of a shard, the one with the payloads first."""
        return tuple(self.path / name for name in self.layout_of(series).files(shard))

    def shard_path(self, series: str, shard: int) -> Path:
        """The file with a shard's payloads."""
        return self.shard_files(series, shard)[0]

    def write_shard(
        self,
        modality: str,
        shard: Shard,
        latents: NDArray[np.generic],
        *,
        seconds: float,
        device: str,
        error: StoredError | None = None,
        made_with: Mapping[str, str | int | float | bool] | None = None,
        audit: Mapping[str, int] | None = None,
    ) -> bool:
        """Writes and commits the raw latents [n, *shape] of one shard; whether it was this call that committed it.

        They are those of its images that were not removed, see `kept_rows`.

        Where a process dies decides nothing: before the last rename the shard is not committed and
        the next attempt overwrites its leftovers, after it all is safe. A shard that is committed
        already, maybe meanwhile by another process, stays as it is.

        Args:
            error: what was lost before. It stands in the record unless something is lost here, which is measured.
            made_with, audit: see `CommitRecord`.

        Raises:
            LatentShapeError, NonFiniteLatentError: if the latents are not what the recipe declares.
            StoreError: if the disk refuses, does not give back what was written, or images were removed from the
                store since it was opened.
        """
        latent = self.recipe(modality).format
        stored = checked_latents(latents, latent, self.rows.kept_ids_of(shard))
        told = {
            "seconds": seconds,
            "device": device,
            "error": measure_error(latents, stored, latent) or error,
            "made_with": dict(made_with or {}),
            "audit": dict(audit or {}),
        }
        return self._commit(modality, shard, to_payloads(stored), **told)

    def write_images(self, shard: Shard, contents: Sequence[bytes], *, seconds: float) -> bool:
        """Writes and commits one shard's images as the store holds them, as `write_shard` does with latents.

        Raises:
            ImageError: if they are to be the files of the row table, and are not.
            StoreError: as of `write_shard`.
        """
        self.layout_of(IMAGES)
        changed = self.metadata.changed_images(self.kept_rows(shard).tolist(), contents)
        if changed:
            raise ImageError(
                f"not the files of the row table: {name_some([self.rows.image_ids[row] for row in changed])}",
                hint="restore the images, or make manifest and store again",
            )
        return self._commit(IMAGES, shard, contents, seconds=seconds, device="cpu")

    def _commit(self, series: str, shard: Shard, payloads: Any, **told: Any) -> bool:  # `told`: see the record
        with unchanged_rows(self.path, self.metadata):
            return self._logs[series].commit_once(shard.index, lambda: self._write(series, shard, payloads, **told))

    def _write(self, series: str, shard: Shard, payloads: Any, **told: Any) -> CommitRecord:
        contents = self.encode_shard(series, shard, payloads)
        digest = hashlib.sha256()
        for name, content in zip(self.layout_of(series).files(shard.index), contents, strict=True):
            self.files.write(name, content)
            digest.update(content)
        size_bytes = sum(len(content) for content in contents)
        opened = open_shard(self.layout_of(series), contents, len(shard), size_bytes)
        return CommitRecord(
            modality=series,
            shard=shard.index,
            n_rows=len(shard),
            size_bytes=size_bytes,
            file_sha256=digest.hexdigest(),
            content_sum=f"{content_sum(self.rows.kept_ids_of(shard), payloads):064x}",
            edge_crc32c=edges_of(opened, len(shard)),
            recipe_hash=self.recipe_hash(series),
            statistics=self.measure_shard(series, shard, payloads),
            **told,
        )

    def replace_shard(self, shard: Shard, payloads: Any, before: CommitRecord) -> None:
        """Puts these payloads of its `kept_rows` in the place of those of a shard, which may be withdrawn already.

        Whoever calls this is the `sole_writer` of the store.

        Args:
            before: the shard's record as it was; series, seconds, device, error and what made it stay.
        """
        series, log = before.modality, self._logs[before.modality]
        log.withdraw({index: record for index, record in log.read().items() if index == shard.index})
        told = {name: getattr(before, name) for name in ("seconds", "device", "error", "made_with", "audit")}
        log.commit_once(shard.index, lambda: self._write(series, shard, payloads, **told))

    def encode_shard(self, series: str, shard: Shard, payloads: Sequence[Payload]) -> tuple[bytes, ...]:
        """The bytes of a shard's files, of the payloads of its `kept_rows`."""
        following = iter(payloads)
        rows, gone = range(shard.start, shard.stop), self.rows.removed_rows
        whole = [None if row in gone else bytes(next(following)) for row in rows]
        return self.layout_of(series).encode(self.rows.ids_of(rows), whole)

    def measure_shard(self, series: str, shard: Shard, payloads: Any) -> dict[str, SplitStatistics]:
        """The statistics of each split of a shard, as its record keeps them; none of images."""
        if series == IMAGES:
            return {}
        samples = self._samples(series, payloads)
        splits = self.rows.splits_of(self.kept_rows(shard).tolist())
        axis = self.recipe(series).format.channel_axis
        if len(set(splits)) == 1:
            return {splits[0]: measure(samples, axis)}
        return {split: measure(samples[np.array(splits) == split], axis) for split in sorted(set(splits))}

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
            refuse_links(self.path)
            if self._logs[series].loose_files() >= at_least:
                self._logs[series].consolidate(loose=at_least > 0)

    def read(self, modality: str, rows: NDArray[np.int64]) -> NDArray[np.generic]:
        """Raw latents [B, *shape] in `LatentFormat.read_dtype`, in the order of `rows`; every CRC is checked.

        Args:
            rows: int64 [B], any order, repetitions allowed.

        Raises:
            MissingLatentError: if a row's shard is not committed, or there is no such row.
            CorruptShardError: if a file or a payload is damaged, naming shard and images.
        """
        size = payload_bytes(self.recipe(modality).format)
        payloads = self._buffers.take(len(rows) * size).reshape(len(rows), size)
        targets = rows_of(payloads)
        found = self._find(modality, rows)
        self._maps.refuse_damage(modality, rows, [at for at, shard, row in found if not shard.copy(row, targets[at])])
        return self._samples(modality, payloads)

    def present(self, modality: str, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which images have a latent of a modality, [B]: all, in a store by itself."""
        self.recipe(modality)
        return np.ones(len(rows), bool)

    def read_images(self, rows: NDArray[np.int64]) -> list[bytes]:
        """Images as the store holds them, in the order of `rows`; the CRC of each is checked.

        Their sha256 are not: they were compared when the images were written, and `verify_store` does it again.

        Raises:
            MissingLatentError: if the store holds no images, a row's shard is not committed, or there is no such row.
            CorruptShardError: if a file or an image is damaged, naming shard and images.
        """
        contents, damaged = [b""] * len(rows), []
        for place, shard, row in self._find(IMAGES, rows):
            contents[place], is_intact = shard.payload(row)
            if not is_intact:
                damaged.append(place)
        self._maps.refuse_damage(IMAGES, rows, damaged)
        return contents

    def _find(self, series: str, rows: NDArray[np.int64]) -> Iterator[tuple[int, Any, int]]:
        """In the order of the files: the place in `rows`, the shard that it is of, and its row in there."""
        self.layout_of(series)
        rows = np.asarray(rows, np.int64)
        require_rows(self.rows, rows, self.place)
        order = np.argsort(rows, kind="stable")
        shards, locals_ = np.divmod(rows[order], self.shard_size)
        opened, number = None, -1
        # Nothing here is done shard by shard: in a full permutation of many shards each has one row of a batch.
        for place, shard, local in zip(order.tolist(), shards.tolist(), locals_.tolist(), strict=True):
            if shard != number:
                opened, number = self._maps.open(series, shard), shard
            yield place, opened, local

    def _samples(self, modality: str, payloads: NDArray[np.uint8]) -> NDArray[np.generic]:
        return from_payloads(payloads, self.recipe(modality).format)

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
                raise self._maps.not_committed(modality, shard)
        self._maps.rows_watch.require_same()
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
        self._maps.rows_watch.require_same()
        return content_hash(self.rows.iter_kept_ids(), list(zip(map(self.recipe, chosen), sums, strict=True)))
