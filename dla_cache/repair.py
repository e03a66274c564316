"""Committed shards that are no longer what their records say: found, and taken out of the log to be made again."""

from collections.abc import Callable, Mapping, Sequence

from dla_cache.errors import CorruptShardError, name_some
from dla_cache.shards import Shard
from dla_cache.store import LatentStore
from dla_cache.store.commits import CommitRecord
from dla_cache.store.parts import UNFINISHED
from dla_cache.verify import record_problem, shard_problems


def require_shards(store: LatentStore, series: str, shards: Sequence[Shard]) -> None:
    """Passes if each committed shard among `shards` has files of its size and a record of this recipe; reads none.

    Raises:
        CorruptShardError: naming those that have not.
    """
    lost = [str(shard) for shard in lost_shards(store, series, shards)]
    if lost:
        raise CorruptShardError(
            f"{len(lost)} committed shards of `{series}` in `{store.place}` have lost their file, or it has another"
            f" size: {name_some(lost)} (`{store.place}/{store.layout_of(series).files(int(lost[0]))[0]}`)",
            hint="restore them from a copy, or run the same `dla cache build` with `--repair`: it makes them again",
        )


def lost_shards(store: LatentStore, series: str, shards: Sequence[Shard]) -> list[int]:
    """Those committed shards whose files are missing or of another size, or whose record is of another recipe."""
    committed = store.committed(series)
    files = {shard: store.layout_of(series).files(shard.index) for shard in shards if shard.index in committed}
    sizes = store.files.sizes([name for names in files.values() for name in names])
    return [
        shard.index
        for shard, names in files.items()
        if record_problem(store, series, shard, committed[shard.index]) is not None
        or sum(sizes.get(name, -1) for name in names) != committed[shard.index].size_bytes
    ]


def withdraw_damaged(
    store: LatentStore, series: str, shards: Sequence[Shard], on_checked: Callable[[Shard], None]
) -> dict[int, CommitRecord]:
    """Reads each committed shard among `shards`, and takes out of the log those with a problem that `verify` names.

    Intact shards stay committed at any moment, whenever the process dies. Records of shards that are not planned, which
    nobody could make, go with them.

    Returns:
        The records that were taken out and are to be made again, by shard index.
    """
    committed = store.committed(series)
    damaged: dict[int, CommitRecord] = {}
    for shard in shards:
        if shard.index in committed:
            record = committed[shard.index]
            if any(True for _ in shard_problems(store, series, shard, record)):
                damaged[shard.index] = record
            on_checked(shard)
    stray = {index: record for index, record in committed.items() if not 0 <= index < len(store.shards)}
    if damaged or stray:
        store.withdraw(series, damaged | stray)
    return damaged


def changed_shards(store: LatentStore, withdrawn: Mapping[str, Mapping[int, CommitRecord]]) -> tuple[str, ...]:
    """Those that were withdrawn and made again, by now with another content than before: `depth, shard 3`.

    Not those from which images are being removed: they cannot have the same.
    """
    is_removing = (store.path / UNFINISHED).is_file()
    changed = []
    for series, records in withdrawn.items():
        committed = store.committed(series)
        changed += [
            f"{series}, shard {shard}"
            for shard, before in records.items()
            if committed[shard].content_sum != before.content_sum
            and not (is_removing and len(store.kept_rows(store.shards[shard])) < len(store.shards[shard]))
        ]
    return tuple(changed)
