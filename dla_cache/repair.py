"""Committed shards that are no longer what their records say: found, and taken out of the log to be made again."""

from collections.abc import Callable, Mapping, Sequence

from dla_cache.errors import CorruptShardError, name_some
from dla_cache.shards import Shard
from dla_cache.store.commits import CommitRecord
from dla_cache.store.zarr_store import ZarrStore
from dla_cache.verify import record_problem, shard_problems


def require_shards(store: ZarrStore, modality: str, shards: Sequence[Shard]) -> None:
    """Passes if each committed shard among `shards` has a file of its size and a record of this recipe; reads none.

    Raises:
        CorruptShardError: naming those that have not.
    """
    committed = store.committed(modality)
    lost = [
        str(shard.index)
        for shard in shards
        if shard.index in committed and not _is_in_place(store, modality, shard, committed[shard.index])
    ]
    if lost:
        raise CorruptShardError(
            f"{len(lost)} committed shards of `{modality}` in `{store.path}` have lost their file, or it has another"
            f" size: {name_some(lost)} (`{store.shard_path(modality, int(lost[0]))}`)",
            hint="restore them from a copy, or run the same `dla cache build` with `--repair`: it makes them again",
        )


def withdraw_damaged(
    store: ZarrStore, modality: str, shards: Sequence[Shard], on_checked: Callable[[Shard], None]
) -> dict[int, CommitRecord]:
    """Reads each committed shard among `shards`, and takes out of the log those with a problem that `verify` names.

    Intact shards stay committed at any moment, whenever the process dies.

    Returns:
        The records that were taken out, by shard index.
    """
    committed = store.committed(modality)
    damaged: dict[int, CommitRecord] = {}
    for shard in shards:
        if shard.index in committed:
            record = committed[shard.index]
            if any(True for _ in shard_problems(store, modality, shard, record)):
                damaged[shard.index] = record
            on_checked(shard)
    if damaged:
        store.withdraw(modality, damaged)
    return damaged


def changed_shards(store: ZarrStore, withdrawn: Mapping[str, Mapping[int, CommitRecord]]) -> tuple[str, ...]:
    """Those that were withdrawn and made again, by now with other latents than before: `depth, shard 3`."""
    changed = []
    for modality, records in withdrawn.items():
        committed = store.committed(modality)
        changed += [
            f"{modality}, shard {shard}"
            for shard, before in records.items()
            if committed[shard].content_sum != before.content_sum
        ]
    return tuple(changed)


def _is_in_place(store: ZarrStore, modality: str, shard: Shard, record: CommitRecord) -> bool:
    path = store.shard_path(modality, shard.index)
    if record_problem(store, modality, shard, record) is not None:
        return False
    return path.is_file() and path.stat().st_size == record.size_bytes
