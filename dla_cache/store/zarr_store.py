"""The Zarr v3 store: shards in, batches out.

A shard is committed when its record is, and its record is written last. A reader believes
records only, never array contents: rows that were not computed would read as zeros.
"""

import hashlib
import mmap
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dla_cache.durable import write_durably, writing_to
from dla_cache.errors import CorruptShardError, IncompleteBuildError, MissingLatentError, name_some
from dla_cache.shards import Shard, plan_shards
from dla_cache.spec import Recipe
from dla_cache.store.commits import CommitLog, CommitRecord
from dla_cache.store.content import checked_latents, content_hash, content_sum
from dla_cache.store.layout import ShardLayout, commits_folder, damaged_records, shard_path
from dla_cache.store.metadata import read_metadata
from dla_cache.store.statistics import LatentStatistics, SplitStatistics, measure, merge_statistics

MAX_OPEN_SHARDS = 512
"""Mapped shard files at a time; each holds a file descriptor, of which a process usually has 1024."""


class ZarrStore:
    """An open store; `open_store` and `create_store` make one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata = read_metadata(path)
        self.rows = metadata.rows
        self.class_names = metadata.class_names
        self.shard_size = metadata.shard_size
        self.shards = plan_shards(len(self.rows), self.shard_size)
        self._recipes = metadata.recipes
        self._layouts = {name: ShardLayout.of(recipe, self.shard_size) for name, recipe in self._recipes.items()}
        self._logs = {name: CommitLog(commits_folder(path, name)) for name in self._recipes}
        self._records = lru_cache(MAX_OPEN_SHARDS)(self._map_records)

    @property
    def modalities(self) -> tuple[str, ...]:
        """In alphabetical order."""
        return tuple(self._recipes)

    def recipe(self, modality: str) -> Recipe:
        """What the numbers of a modality are.

        Raises:
            MissingLatentError: if the store has no such modality.
        """
        try:
            return self._recipes[modality]
        except KeyError:
            raise MissingLatentError(
                f"`{self.path}` has no modality `{modality}`",
                hint=f"it has {', '.join(f'`{name}`' for name in self._recipes) or 'none'}",
            ) from None

    def committed(self, modality: str) -> dict[int, CommitRecord]:
        """The records of all committed shards by shard index, as the disk has them now."""
        self.recipe(modality)
        return self._logs[modality].read()

    def missing(self, modality: str) -> list[int]:
        """The planned shards that no record vouches for."""
        committed = self.committed(modality)
        return [shard.index for shard in self.shards if shard.index not in committed]

    def require_complete(self, modalities: Sequence[str] | None = None) -> None:
        """Passes a store in which every planned (modality, shard) is committed.

        Raises:
            IncompleteBuildError: naming what is missing.
        """
        for modality in self.modalities if modalities is None else modalities:
            missing = self.missing(modality)
            if missing:
                raise IncompleteBuildError(
                    f"`{self.path}` lacks {len(missing)} of {len(self.shards)} shards of `{modality}`:"
                    f" {name_some([str(shard) for shard in missing])}",
                    hint="run `dla cache build` with the same spec again",
                )

    def rows_of(self, splits: Sequence[str] | None = None) -> NDArray[np.int64]:
        """The rows of some splits in row order, [n]; of all splits when None."""
        return self.rows.rows_of(splits)

    def shard_path(self, modality: str, shard: int) -> Path:
        """The one file of a shard."""
        return shard_path(self.path, modality, shard, self.recipe(modality).format.shape)

    def write_shard(
        self, modality: str, shard: Shard, latents: NDArray[np.generic], *, seconds: float, device: str
    ) -> bool:
        """Writes and commits the raw latents [n, *shape] of one shard; whether it was this call that committed it.

        Where a process dies decides nothing: before the last rename the shard is not committed and
        the next attempt overwrites its leftovers, after it all is safe. A shard that is committed
        already, maybe meanwhile by another process, stays as it is.

        Raises:
            LatentShapeError, NonFiniteLatentError: if the latents are not what the recipe declares.
            StoreError: if the disk refuses, or does not give back what was written.
        """
        recipe, layout = self.recipe(modality), self._layouts[modality]
        image_ids = self.rows.image_ids[shard.start : shard.stop]
        samples = checked_latents(latents, recipe.format, image_ids)
        path = self.shard_path(modality, shard.index)

        def write() -> CommitRecord:
            content = layout.encode(samples)
            write_durably(path, content)
            return CommitRecord(
                modality=recipe.modality,
                shard=shard.index,
                n_rows=len(shard),
                size_bytes=len(content),
                file_sha256=hashlib.sha256(content).hexdigest(),
                content_sum=f"{content_sum(image_ids, samples):064x}",
                recipe_hash=recipe.hash,
                statistics=self.measure_shard(modality, shard, samples),
                seconds=seconds,
                device=device,
            )

        with writing_to(self.path):
            return self._logs[modality].commit_once(shard.index, write)

    def measure_shard(self, modality: str, shard: Shard, samples: NDArray[np.generic]) -> dict[str, SplitStatistics]:
        """The statistics of each split of a shard, as its record keeps them."""
        splits = np.array([self.rows[row].split for row in range(shard.start, shard.stop)])
        axis = self.recipe(modality).format.channel_axis
        return {str(split): measure(samples[splits == split], axis) for split in np.unique(splits)}

    def withdraw(self, modality: str, records: Mapping[int, CommitRecord]) -> None:
        """Takes these records out of the commit log: their shards are then not committed any more.

        Raises:
            StoreError: if the disk refuses; then some of them may still be there.
        """
        with writing_to(self.path):
            self._logs[modality].withdraw(records)

    def consolidate(self, modality: str, *, at_least: int = 0) -> None:
        """Merges the commit records of a modality into one file, if that many lie about."""
        with writing_to(self.path):
            if self._logs[modality].loose_files() >= at_least:
                self._logs[modality].consolidate()

    def read(self, modality: str, rows: NDArray[np.int64]) -> NDArray[np.generic]:
        """Raw latents [B, *shape] in the stored dtype, in the order of `rows`; every CRC is checked.

        Args:
            rows: int64 [B], any order, repetitions allowed.

        Raises:
            MissingLatentError: if a row's shard is not committed, or there is no such row.
            CorruptShardError: if a file or a payload is damaged, naming shard and images.
        """
        self.recipe(modality)
        layout = self._layouts[modality]
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self.rows)):
            raise MissingLatentError(f"rows lie in [0, {len(self.rows)}), asked for [{rows.min()}, {rows.max()}]")
        # In row order a shard's samples are neighbours: one gather a shard, into place.
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        gathered = np.empty((len(rows), layout.stride), np.uint8)
        shards = ordered // self.shard_size
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        for start, stop in pairwise([*starts.tolist(), len(rows)]):
            shard = int(shards[start])
            local = ordered[start:stop] - shard * self.shard_size
            np.take(self._records(modality, shard), local, axis=0, out=gathered[start:stop], mode="clip")
        damaged = damaged_records(gathered)
        if damaged:
            shard = int(shards[damaged[0]])
            where = [row for row in ordered[damaged].tolist() if row // self.shard_size == shard]
            raise self._damaged(modality, shard, "a sample does not have its checksum", where)
        # Back to the caller's order, in the copy that drops the checksums.
        return layout.samples(gathered, np.argsort(order))

    def statistics(self, modality: str, splits: Sequence[str]) -> LatentStatistics:
        """Per-channel statistics over all images of some splits, from the commit records.

        Raises:
            StoreError: if a split has no image.
            MissingLatentError: if a shard with such images is not committed.
        """
        committed = self.committed(modality)
        shards = np.unique(self.rows_of(splits) // self.shard_size).tolist()
        for shard in shards:
            if shard not in committed:
                raise self._not_committed(modality, shard)
        parts = [committed[shard].statistics for shard in shards]
        return merge_statistics([part[split] for part in parts for split in sorted(part.keys() & set(splits))])

    def content_hash(self, modalities: Sequence[str] | None = None) -> str:
        """sha256 of image IDs, samples and recipes in row order, from the commit records; of all modalities when None.

        Times, devices, paths and the grouping into shards lie outside it.

        Raises:
            IncompleteBuildError: if a planned shard is missing.
            MissingLatentError: if the store has no such modality.
        """
        chosen = self.modalities if modalities is None else modalities
        self.require_complete(chosen)
        return content_hash(
            self.rows.image_ids,
            [
                (self.recipe(modality), [int(record.content_sum, 16) for record in self.committed(modality).values()])
                for modality in chosen
            ],
        )

    def _map_records(self, modality: str, shard: int) -> NDArray[np.uint8]:
        record = self._logs[modality].find(shard)
        if record is None:
            raise self._not_committed(modality, shard)
        try:
            with self.shard_path(modality, shard).open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return self._layouts[modality].records(content, record.n_rows)
        except (OSError, ValueError) as error:
            planned = self.shards[shard]
            raise self._damaged(modality, shard, str(error), range(planned.start, planned.stop)) from error

    def _not_committed(self, modality: str, shard: int) -> MissingLatentError:
        planned = self.shards[shard]
        return MissingLatentError(
            f"shard {shard} of `{modality}` in `{self.path}` is not committed:"
            f" {len(planned)} images from `{self.rows.image_ids[planned.start]}` on have no latent",
            hint="run `dla cache build` with the same spec again",
        )

    def _damaged(self, modality: str, shard: int, problem: str, rows: Sequence[int]) -> CorruptShardError:
        return CorruptShardError(
            f"shard {shard} of `{modality}` is damaged at {name_some([self.rows.image_ids[row] for row in rows])}:"
            f" {problem} (`{self.shard_path(modality, shard)}`)",
            hint=f"`dla cache verify {self.path}` lists all damage; restore the file from a copy,"
            " or run its `dla cache build` with `--repair`",
        )
