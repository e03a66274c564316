"""How much memory a build needs, whatever the number of images."""

from collections.abc import Iterable

import numpy as np

from dla_cache.pipeline import SLOTS
from dla_cache.spec import Recipe
from dla_cache.store.layout import payload_bytes

LOOSE_RECORDS = 1000
"""Commit records are consolidated once so many lie about as single files."""

RAW_BYTES = 4
"""Of a number as sources put it out: a float32."""

COPIES = 4
"""Of a shard's stored bytes while it is written: samples, records, the file, and the file as it reads back."""

RECORD_BYTES = 20_000
"""Of a commit record, beside its statistics: while it waits to be consolidated, and while that is done."""

MOMENT_BYTES = 4 * 32
"""Of a channel's mean, variance, minimum and maximum in a record, as Python's numbers."""

STATISTICS_BYTES = 24
"""For each number of one channel of a shard while it is measured: it, and its distance from the mean, in float64."""


def batches_ahead(shard_size: int, batch_size: int) -> int:
    """Batches that are given out and not taken back: enough that the device goes on while one shard is written."""
    return SLOTS + -(-shard_size // batch_size) + 1


def memory_bound(recipes: Iterable[Recipe], *, batch_size: int, shard_size: int, n_splits: int = 1) -> int:
    """Bytes that the images of a build take at most, beside those that threads are just decoding.

        SLOTS · B · 3 · Σ S²                       views, S the side of each
        + (ahead · B + n) · Σ 4 N                  latents on their way or gathered, N numbers each
        + n · max(4 N + 4 stored + 24 N / C)       the shard that is written, C channels
        + 1000 · Σ (20000 + 128 C · splits)        commit records, until they are consolidated

    for batches of B images and shards of n, summed over views and modalities. The list of images, and what a process
    needs before it has read one, is not part of it. Images that the store is to hold come
    on top with their own bytes, (ahead · B + 4 n) images at a time.
    """
    recipes = list(recipes)
    views = sum(side**2 for side in {recipe.source_view_size for recipe in recipes})
    numbers = [int(np.prod(recipe.format.shape)) for recipe in recipes]
    ahead = batches_ahead(shard_size, batch_size) * batch_size
    n_channels = [recipe.format.shape[recipe.format.channel_axis] for recipe in recipes]
    written = [
        RAW_BYTES * count + COPIES * payload_bytes(recipe.format) + STATISTICS_BYTES * count // channels
        for count, channels, recipe in zip(numbers, n_channels, recipes, strict=True)
    ]
    return (
        SLOTS * batch_size * 3 * views
        + (ahead + shard_size) * RAW_BYTES * sum(numbers)
        + shard_size * max(written, default=0)
        + LOOSE_RECORDS * sum(RECORD_BYTES + MOMENT_BYTES * channels * n_splits for channels in n_channels)
    )
