"""A build in a process of its own: MANIFEST STORE SECONDS_PER_BATCH RANK WORLD_SIZE LAYOUT. Its claims end soon."""

import functools
import sys
from pathlib import Path

from conftest import PixelSource

from dla_cache.build import build_cache
from dla_cache.manifest import read_manifest
from dla_cache.spec import CacheSpec, LatentSpec, Modality
from dla_cache.store import turns

if __name__ == "__main__":
    manifest_path, store_place, seconds, rank, world_size, layout = sys.argv[1:]
    turns.LEASE_S = 1.0
    report = build_cache(
        read_manifest(Path(manifest_path)),
        CacheSpec(latents=(LatentSpec(modality=Modality.DEPTH, source="pixels"),), shard_size=5, layout=layout),
        store_place,
        open_source=functools.partial(PixelSource, seconds=float(seconds)),
        batch_size=4,
        rank=int(rank),
        world_size=int(world_size),
    )
    print(report.content_hash)
