"""Images that have no latent: why that is, kept with the store, and how they are put aside.

`quarantine.json` says of each the reason. It decides nothing: an image that was put aside has its tombstone in the row
table, as one that was taken down has; any other one keeps its shard uncommitted until a build finds it mended.
"""

import json
from collections.abc import Collection, Mapping

from dla_cache.durable import locked_folder, writing_to
from dla_cache.errors import StoreError
from dla_cache.store import LatentStore
from dla_cache.store.parts import QUARANTINE
from dla_cache.takedown import remove_unmade


def read_reasons(store: LatentStore) -> dict[str, str]:
    """Why images have no latent, by their IDs; nothing where the file is absent or says something else."""
    try:
        found = json.loads(store.files.read(QUARANTINE))
    except FileNotFoundError:  # also of an object that is not there, which is a StoreError
        return {}
    except StoreError:
        raise
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(image_id): str(reason) for image_id, reason in found.items()} if isinstance(found, dict) else {}


def keep_reasons(store: LatentStore, bad: Mapping[str, str], series: Collection[str]) -> None:
    """Writes what a build found, beside what is known of images that are removed or still lack a shard of `series`."""
    with writing_to(store.path), locked_folder(store.path):
        known = read_reasons(store)
        missing = {shard for name in series for shard in store.missing(name)} if known else set()
        kept = {image_id: reason for image_id, reason in known.items() if _is_open(store, image_id, missing)}
        told = dict(sorted((kept | dict(bad)).items()))
        if told != known:
            store.files.write(QUARANTINE, json.dumps(told, indent=2, ensure_ascii=False).encode() + b"\n")


def _is_open(store: LatentStore, image_id: str, missing: Collection[int]) -> bool:
    if image_id in store.rows.removed_ids:
        return True
    row = store.rows.row_by_id.get(image_id)
    return row is not None and row // store.shard_size in missing


def put_aside(store: LatentStore, image_ids: Collection[str]) -> None:
    """Removes images from a store that a build fills, be it that some of their shards are committed already.

    Raises:
        StoreError: if the store is none in a folder, or the disk refuses.
        CorruptShardError: if a shard that must be rewritten for it is damaged.
    """
    store.require_folder()
    remove_unmade(store.path, sorted(image_ids))
