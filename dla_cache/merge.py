"""Several stores written as one, joined by image ID; or one store written anew, without gaps and removed rows."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dla_cache.card import write_card
from dla_cache.durable import write_durably
from dla_cache.errors import CorruptShardError, RecipeMismatchError, StoreError, name_some
from dla_cache.joined import ABSENT
from dla_cache.memory import LOOSE_RECORDS
from dla_cache.merge_plan import MergePlan, rows_in_store
from dla_cache.shards import Shard
from dla_cache.store import LatentStore, create_store
from dla_cache.store.adopted import Adoption, content_of, read_adoptions
from dla_cache.store.commits import CommitRecord
from dla_cache.store.content import MODULUS, checked_latents, content_sum
from dla_cache.store.exchange import one_by_one
from dla_cache.store.layout import IMAGES
from dla_cache.store.metadata import has_rows_of, read_metadata, sole_writer
from dla_cache.store.parts import ADOPTED
from dla_cache.store.precision import to_payloads
from dla_cache.store.statistics import StoredError, merge_errors
from dla_cache.verify import shard_problems

ROWS_AT_ONCE = 1024
"""Payloads that are read at a time where no shard says how many."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did."""

    plan: MergePlan
    shards_written: int
    """By this run."""
    content_hash: str
    """Of the merged modalities in the new store."""


def merge_stores(
    plan: MergePlan,
    target: Path,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> MergeReport:
    """Writes the new store that `plan_merge` said; run again, it goes on where it stopped.

    Every source shard is compared with its record before anything is taken from it, every payload goes through the same
    write as if it had been computed, and at the end the sums of all payloads must be those of the sources. The new
    store has the content hash of a build of these images in one go, in that order. Statistics are measured anew;
    what had been lost when the latents were first stored is carried on, see `error_of`.

    Args:
        on_progress: told after each shard how many of this run are written and how many there are.
        should_stop: asked between two shards.

    Raises:
        CorruptShardError: if something in a store is damaged, or the target has shards from elsewhere.
        RecipeMismatchError: if two stores hold different latents, or pictures, of one image; if the target holds
            other things.
        StoreError: if the target cannot be written, or images were removed from a store meanwhile.
        WorkInterrupted: if `should_stop` said so.
    """
    metadata = plan.metadata
    written = create_store(
        target,
        metadata.rows,
        metadata.class_names,
        metadata.shard_size,
        metadata.recipes,
        layout=metadata.layout.name,
        images=metadata.images,
    )
    merge = _Merge(plan.stores, written)
    todo = [(series, written.shards[shard]) for series in metadata.series for shard in written.missing(series)]
    for series, shard in one_by_one(todo, target, on_progress, should_stop):
        merge.write(series, shard)
        written.consolidate(series, at_least=LOOSE_RECORDS)
    for store in plan.stores:
        if not has_rows_of(store.path, store.metadata, read_metadata(store.path).rows_sha256):
            raise StoreError(
                f"images were removed from `{store.path}` while it was merged, and `{target}` may hold them",
                hint=f"`dla cache takedown` with `{target}` removes them from there, too",
            )
    for series in metadata.series:
        written.consolidate(series)
        merge.check_sum(series)
    _copy_adoptions(plan.stores, written)
    write_card(written)
    return MergeReport(plan, len(todo), written.content_hash(list(metadata.recipes)))


@dataclass(frozen=True, slots=True)
class Part:
    """What a new shard takes from one shard of a store."""

    record: CommitRecord
    """Of that shard."""
    n_images: int
    """That are taken."""
    n_kept: int
    """That the shard has, without those that were removed."""


def error_of(parts: Sequence[Part]) -> StoredError | None:
    """What was lost of the latents of a shard that is put together from these parts; None if nothing was.

    Records keep errors by shard, not by image: the images of a part are taken to have lost as much as its whole shard
    did. So a shard that is taken as it was keeps its error; of others `rms` is an estimate and `max_abs` a bound. Over
    a store into which all images of its sources go, the mean square is exact again: every shard counts by its images.
    """
    if len(parts) == 1:  # the root of a square need not be the number it came from
        error = parts[0].record.error
        return None if error is None else error.model_copy(update={"count": parts[0].n_images})
    errors = [(part.n_images, part.record.error) for part in parts]
    return merge_errors([(n, error and error.model_copy(update={"count": n})) for n, error in errors])


def made_with_of(parts: Sequence[Part]) -> dict[str, str | int | float | bool]:
    """What all parts of a shard were made with; where they differ, each value once."""
    told: dict[str, list[str | int | float | bool]] = {}
    for part in parts:
        for name, value in part.record.made_with.items():
            if value not in told.setdefault(name, []):
                told[name].append(value)
    return {name: values[0] if len(values) == 1 else ", ".join(map(str, values)) for name, values in told.items()}


def audit_of(parts: Sequence[Part], n_images: int) -> dict[str, int]:
    """The counts of all parts together, if they were taken whole: of a part of a shard nobody knows them."""
    if sum(part.n_kept for part in parts) != n_images:
        return {}
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.record.audit)
    return dict(counts)


class _Merge:
    """Where each image of a new store comes from: the first store that has it."""

    def __init__(self, stores: Sequence[LatentStore], target: LatentStore) -> None:
        self.target = target
        self.rows_in = [(store, rows_in_store(store, target.rows)) for store in stores]
        self.checked: set[tuple[Path, str, int]] = set()

    def write(self, series: str, shard: Shard) -> None:
        """Puts together and commits one shard of the new store."""
        rows = self.target.kept_rows(shard)
        parts = list(self.parts(series, rows))
        payloads = self.read(series, rows)
        # Of a shard that is taken as a whole exactly its own: a multiple of 1.
        seconds = sum(part.record.seconds * (part.n_images / part.n_kept) for part in parts)
        if series == IMAGES:
            self.target.write_images(shard, payloads, seconds=seconds)
            return
        latent = self.target.recipe(series).format
        latents = np.stack(payloads) if payloads else np.empty((0, *latent.shape), latent.read_dtype)
        devices = sorted({part.record.device for part in parts})
        self.target.write_shard(
            series,
            shard,
            latents,
            seconds=seconds,
            device=", ".join(devices),
            error=error_of(parts),
            made_with=made_with_of(parts),
            audit=audit_of(parts, len(rows)),
        )

    def holders(self, series: str) -> Iterator[tuple[LatentStore, NDArray[np.int64]]]:
        """The stores that have a series, and the row there of each row of the new store."""
        return ((store, rows_in) for store, rows_in in self.rows_in if series in store.series)

    def parts(self, series: str, rows: NDArray[np.int64]) -> Iterator[Part]:
        """The shards, each read and compared with its record, that some rows of the new store come from."""
        wanted = rows
        for store, rows_in in self.holders(series):
            is_here = rows_in[wanted] != ABSENT
            taken, wanted = rows_in[wanted[is_here]], wanted[~is_here]
            committed = store.committed(series)
            numbers, counts = np.unique(taken // store.shard_size, return_counts=True)
            for number, n_images in zip(numbers.tolist(), counts.tolist(), strict=True):
                self.check(store, series, number, committed[number])
                yield Part(committed[number], n_images, len(store.kept_rows(store.shards[number])))

    def check(self, store: LatentStore, series: str, number: int, record: CommitRecord) -> None:
        if (store.path, series, number) in self.checked:
            return
        for problem in shard_problems(store, series, store.shards[number], record):
            raise CorruptShardError(
                f"{problem.where} of `{store.path}` is damaged: {problem.what}",
                hint="restore it from a copy, or run its `dla cache build` with `--repair`",
            )
        self.checked.add((store.path, series, number))

    def read(self, series: str, rows: NDArray[np.int64]) -> list[Any]:
        """Latents or image bytes of rows of the new store; what several stores hold must be the same in all of them."""
        payloads: list[Any] = [None] * len(rows)
        for store, rows_in in self.holders(series):
            places = np.flatnonzero(rows_in[rows] != ABSENT)
            differing = []
            for place, payload in zip(places.tolist(), _read(store, series, rows_in[rows[places]]), strict=True):
                if payloads[place] is None:
                    payloads[place] = payload
                elif bytes(payloads[place]) != bytes(payload):
                    differing.append(self.target.rows.image_ids[int(rows[place])])
            if differing:
                raise RecipeMismatchError(
                    f"`{store.path}` holds another `{series}` of {len(differing)} images than a store before it, by the"
                    f" same recipe: {name_some(differing)}",
                    hint="another device or library version computed them: build these images again in a store of"
                    " their own, or merge without one of the stores",
                )
        return payloads

    def check_sum(self, series: str) -> None:
        """Passes if the new store holds what the sources do: the sums of their records, but for what was left out.

        Raises:
            CorruptShardError: if it does not.
        """
        target = self.target
        expected, rows = 0, target.rows_of()
        for store, rows_in in self.holders(series):
            taken, rows = rows_in[rows], rows[rows_in[rows] == ABSENT]
            committed = store.committed(series)
            expected += sum(int(committed[shard.index].content_sum, 16) for shard in store.shards)
            others = np.setdiff1d(store.rows_of(), taken)
            for start in range(0, len(others), ROWS_AT_ONCE):
                some = others[start : start + ROWS_AT_ONCE]
                image_ids = store.rows.ids_of(some.tolist())
                payloads: Any = _read(store, series, some)
                if series != IMAGES:
                    payloads = to_payloads(checked_latents(payloads, store.recipe(series).format, image_ids))
                expected -= content_sum(image_ids, payloads)
        committed = target.committed(series)
        if sum(int(committed[shard.index].content_sum, 16) for shard in target.shards) % MODULUS != expected % MODULUS:
            raise CorruptShardError(
                f"`{series}` in `{target.path}` is not what the merged stores hold",
                hint="something of it comes from another build, or a store was changed meanwhile: name a new folder",
            )


def _copy_adoptions(stores: Sequence[LatentStore], target: LatentStore) -> None:
    """What was declared harmless of a store is so of the same recipes elsewhere."""
    adopted: list[Adoption] = []
    for store in stores:
        adopted += [adoption for adoption in read_adoptions(store.path) if adoption not in adopted]
    if adopted and not (target.path / ADOPTED).is_file():
        with sole_writer(target.path, target.metadata):
            write_durably(target.path / ADOPTED, content_of(tuple(adopted)))


def _read(store: LatentStore, series: str, rows: NDArray[np.int64]) -> Any:
    return store.read_images(rows) if series == IMAGES else store.read(series, rows)
