"""What one process does of a build: it fills its shards of all series in one pass over the images."""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from dla_cache.batches import ImageReader, batches_of
from dla_cache.encoding import Encoder
from dla_cache.errors import WorkInterrupted
from dla_cache.filling import FilledShard, ShardWriter
from dla_cache.leaks import Synonyms
from dla_cache.manifest import Manifest
from dla_cache.memory import batches_ahead
from dla_cache.pipeline import DeviceTimes, bottleneck_of, run_pipeline
from dla_cache.progress import BuildProgress
from dla_cache.repair import require_shards, withdraw_damaged
from dla_cache.shards import Shard, shards_of_rank
from dla_cache.spec import CacheSpec, LatentSpec
from dla_cache.store import LatentStore, create_store
from dla_cache.store.commits import CommitRecord
from dla_cache.store.creation import stored_rows, with_removed
from dla_cache.store.files import Turns
from dla_cache.store.layout import IMAGES
from dla_cache.store.metadata import refuse_unfinished_removal
from dla_cache.store.mirror import files_at
from dla_cache.store.rows import RowTable
from dla_cache.stored_images import image_recipe

if TYPE_CHECKING:
    from dla_cache.sources import LatentSource

OpenSource = Callable[[LatentSpec, str], "LatentSource"]
OnProgress = Callable[[BuildProgress], None]
ShouldStop = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Pass:
    """What is to be filled, by which part of all processes."""

    manifest: Manifest
    """Of the images to build, no others."""
    spec: CacheSpec
    store_place: str | Path
    batch_size: int
    rank: int = 0
    world_size: int = 1
    share: int = 0
    """Number of this process among those of its rank."""
    n_shares: int = 1
    repair: bool = False
    append: bool = False
    synonyms: Synonyms = field(default_factory=dict)
    """Other names of classes, which captions are searched for as well."""


@dataclass(frozen=True, slots=True)
class Filled:
    """What one process, or several, have done."""

    committed: tuple[tuple[str, int], ...] = ()
    """Series and shard, by these processes."""
    withdrawn: dict[str, dict[int, CommitRecord]] = field(default_factory=dict)
    """Records of damaged shards that were taken out of the store, by series and shard."""
    bad: dict[str, str] = field(default_factory=dict)
    """Image ID → why it has no latent. Shards with such an image are not committed."""
    times: tuple[DeviceTimes, ...] = ()
    """A device each."""
    batch_sizes: dict[str, int] = field(default_factory=dict)
    """By modality, the smallest at the end."""

    def merged(self, other: "Filled") -> "Filled":
        names = self.withdrawn | other.withdrawn
        sizes = (self.batch_sizes, other.batch_sizes)
        return Filled(
            self.committed + other.committed,
            {name: self.withdrawn.get(name, {}) | other.withdrawn.get(name, {}) for name in names},
            self.bad | other.bad,
            self.times + other.times,
            {name: min(of[name] for of in sizes if name in of) for name in sizes[0] | sizes[1]},
        )


def shards_of_pass(store: LatentStore, work: Pass) -> list[Shard]:
    """Those that this process answers for."""
    of_rank = shards_of_rank(store.shards, work.rank, work.world_size)
    return shards_of_rank(of_rank, work.share, work.n_shares)


def series_of(spec: CacheSpec) -> list[str]:
    """All that a store of a spec has shards of."""
    return [*(entry.modality.value for entry in spec.latents), *([IMAGES] if spec.images != "none" else [])]


def fill_store(
    work: Pass,
    device: str,
    *,
    open_source: OpenSource,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
) -> tuple[LatentStore, Filled]:
    """Opens the sources and commits all shards of this process that are not committed yet and have no bad image.

    Raises:
        What `dla_cache.build.build_cache` raises, but for bad images.
    """
    files = files_at(work.store_place)
    with ExitStack() as stack:
        stack.enter_context(files.naming())
        files.refresh()
        sources = [stack.enter_context(closing(open_source(entry, device))) for entry in work.spec.latents]
        sides = [source.recipe.source_view_size for source in sources]
        encoders = {
            source.recipe.modality.value: Encoder(source, work.batch_size, shares_pixels=side in sides[place + 1 :])
            for place, (source, side) in enumerate(zip(sources, sides, strict=True))
        }
        store = create_store(
            work.store_place,
            with_removed(stored_rows(files.path), RowTable.from_manifest(work.manifest)),
            work.manifest.class_names,
            work.spec.shard_size,
            {name: encoder.recipe for name, encoder in encoders.items()},
            layout=work.spec.layout,
            images=image_recipe(work.spec),
            append=work.append,
        )
        if not work.repair:  # a repair is the way out where the removal met a damaged shard
            refuse_unfinished_removal(store.path)
        series = series_of(work.spec)
        mine = shards_of_pass(store, work)
        withdrawn = _withdraw(store, series, mine, should_stop) if work.repair else {}
        for name in series:
            require_shards(store, name, mine)
        todo = {name: _uncommitted(store, name, mine) for name in series}
        turns = stack.enter_context(files.turns(lambda name, shard: shard in store.committed(name)))
        filling = _Filling(store, encoders, todo, turns, work, device)
        for progress in stack.enter_context(closing(filling.run())):
            if on_progress is not None:
                on_progress(progress)
            if should_stop is not None and progress.images_done < progress.images_total and should_stop():
                raise interrupted(store, series)
        for name in series:
            store.consolidate(name)
    sizes = {name: encoder.batch_size for name, encoder in encoders.items() if todo[name]}
    return store, Filled(tuple(filling.committed), withdrawn, filling.writer.bad, (filling.times,), sizes)


class _Filling:
    """One pass: which shards are begun, what has come of them, and how far it is."""

    def __init__(
        self,
        store: LatentStore,
        encoders: Mapping[str, Encoder],
        todo: Mapping[str, Sequence[Shard]],
        turns: Turns,
        work: Pass,
        device: str,
    ) -> None:
        self.writer = ShardWriter(store, encoders, device, work.synonyms)
        self.times = DeviceTimes()
        self.committed: list[tuple[str, int]] = []
        self._store, self._encoders, self._todo, self._turns = store, encoders, todo, turns
        self._batch_size = work.batch_size
        sides = {name: encoder.recipe.source_view_size for name, encoder in encoders.items()}
        self._reader = ImageReader(work.manifest.root, sides, store.metadata.images)
        self._totals = {name: self._count(shards) for name, shards in todo.items()}
        self._done = dict.fromkeys(todo, 0)

    def _count(self, shards: Collection[Shard]) -> int:
        return sum(len(self._store.kept_rows(shard)) for shard in shards)

    def run(self) -> Generator[BuildProgress, None, None]:
        """Fills shards as they are this process's turn, until all are committed but those with a bad image.

        Tells of every batch in every series. While it waits for other builders it tells of a shard of theirs.
        """
        filled: set[tuple[str, int]] = set()
        left: Mapping[str, Sequence[Shard]] = self._todo
        while any(left.values()):
            batches = batches_of(self._take_turns(left), self._store.rows, self._batch_size)
            ahead = batches_ahead(self._store.shard_size, self._batch_size)
            results = run_pipeline(
                batches, self._encoders, self._reader, self.times, batch_size=self._batch_size, ahead=ahead
            )
            with closing(results):
                for result in results:
                    ended = self.writer.take(result)
                    self._note(ended)
                    filled |= {(one.series, one.shard.index) for one in ended}
                    self._done[result.series] += len(result.batch.images)
                    yield self._progress(result.series, result.batch.segments[-1].shard)
            left = {name: self._turns.left(name) for name in left}
            for name, shards in left.items():
                if shards:
                    yield self._progress(name, shards[0], is_waiting=True)
        for name, shards in self._todo.items():
            others = [shard for shard in shards if (name, shard.index) not in filled]
            if others:
                self._done[name] += self._count(others)
                yield self._progress(name, others[-1])

    def _take_turns(self, left: Mapping[str, Sequence[Shard]]) -> Iterator[tuple[Shard, tuple[str, ...]]]:
        """Each shard that something lacks, with those series for which it is ours; taken when it is asked for."""
        wanted = {name: {shard.index for shard in shards} for name, shards in left.items()}
        shards = {shard.index: shard for shard in chain.from_iterable(left.values())}
        for index, shard in sorted(shards.items()):
            lacking = [name for name in left if index in wanted[name]]
            ours = tuple(name for name in lacking if any(True for _ in self._turns.take(name, [shard])))
            if ours:
                yield shard, ours

    def _note(self, ended: Sequence[FilledShard]) -> None:
        for one in ended:
            self._turns.release(one.series, one.shard.index)
            if one.is_ours:
                self.committed.append((one.series, one.shard.index))

    def _progress(self, series: str, shard: Shard, *, is_waiting: bool = False) -> BuildProgress:
        return BuildProgress(
            series,
            shard.index,
            len(self._store.shards),
            sum(self._done.values()),
            sum(self._totals.values()),
            is_waiting,
            dict(self._done),
            self._totals,
            len(self.writer.bad),
            self.times.busy,
            bottleneck_of([self.times]),
        )


def _withdraw(
    store: LatentStore, series: Collection[str], shards: Sequence[Shard], should_stop: ShouldStop | None
) -> dict[str, dict[int, CommitRecord]]:
    def stop_if_asked(_shard: Shard) -> None:
        if should_stop is not None and should_stop():
            raise interrupted(store, series)

    return {name: withdraw_damaged(store, name, shards, stop_if_asked) for name in series}


def _uncommitted(store: LatentStore, series: str, shards: Sequence[Shard]) -> list[Shard]:
    committed = store.committed(series)
    return [shard for shard in shards if shard.index not in committed]


def interrupted(store: LatentStore, series: Collection[str]) -> WorkInterrupted:
    """The error of a build that was asked to stop."""
    committed = sum(len(store.committed(name)) for name in series)
    planned = len(store.shards) * len(series)
    return WorkInterrupted(
        f"interrupted: {committed} of {planned} shards of `{store.place}` are committed",
        hint="run the same command again; it goes on from there",
    )
