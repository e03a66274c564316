"""What goes into a store and what it adds up to: checks of latents, and the content hash."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from dla_cache.errors import LatentShapeError, NonFiniteLatentError, name_some
from dla_cache.spec import LatentFormat, Recipe, canonical_json

MODULUS = 2**256

Payload = bytes | NDArray[np.uint8]
"""The payload of one row: a sample's numbers, little endian in C order, or the bytes of an image."""


def checked_latents(
    latents: NDArray[np.generic], latent_format: LatentFormat, image_ids: Sequence[str]
) -> NDArray[np.generic]:
    """What a source put out, [n, *shape] in the stored dtype, little endian.

    Floats may come wider than they are stored; integers of any width, within the vocabulary.

    Raises:
        LatentShapeError: if shape, number or kind of dtype are not the format's.
        NonFiniteLatentError: if a value is NaN, infinite, or beyond the stored dtype or vocabulary.
    """
    expected = (len(image_ids), *latent_format.shape)
    if latents.shape != expected:
        raise LatentShapeError(
            f"the source put out latents of shape `{list(latents.shape)}`, its recipe declares `{list(expected)}`"
            f" for {name_some(image_ids)}",
            hint="the source and its recipe disagree: mend the source",
        )
    stored = np.dtype(latent_format.dtype).newbyteorder("<")
    if (latents.dtype.kind == "f") != (stored.kind == "f") or latents.dtype.kind not in "fiu":
        raise LatentShapeError(
            f"the source put out `{latents.dtype}`, its recipe declares `{latent_format.dtype}`"
            f" for {name_some(image_ids)}",
            hint="the source and its recipe disagree: mend the source",
        )
    if latent_format.vocabulary is None:
        with np.errstate(over="ignore"):
            samples = latents.astype(stored)
        good = np.isfinite(samples)
        problem, hint = (
            f"NaN, infinity or a value beyond `{latent_format.dtype}`",
            "store `dtype: float32`, or look at these images and at the source's parameters",
        )
    else:
        codes = latents.astype(np.int64)
        samples = codes.astype(stored)
        good = (codes >= 0) & (codes < latent_format.vocabulary)
        problem, hint = f"a code outside [0, {latent_format.vocabulary})", "the source and its recipe disagree"
    bad = [image_ids[row] for row in np.flatnonzero(~good.all(axis=tuple(range(1, good.ndim)))).tolist()]
    if bad:
        raise NonFiniteLatentError(f"the source put out {problem} for {name_some(list(dict.fromkeys(bad)))}", hint=hint)
    return samples


def content_sum(image_ids: Iterable[str], payloads: Iterable[Payload]) -> int:
    """One number for a set of payloads under their image IDs, that adds up over sets.

    A sum of hashes rather than a hash of all bytes: then a store's hash comes from its commit
    records alone, and is the same however its images were cut into shards.

    Source: Bellare and Micciancio, "A New Paradigm for Collision-Free Hashing: Incrementality at
    Reduced Cost", 1997: AdHash.
    """
    total = 0
    for image_id, payload in zip(image_ids, payloads, strict=True):
        digest = hashlib.sha256(image_id.encode() + b"\0")
        digest.update(bytes(payload))
        total += int.from_bytes(digest.digest(), "big")
    return total % MODULUS


def content_hash(image_ids: Sequence[str], sums: Iterable[tuple[Recipe, Iterable[int]]]) -> str:
    """sha256 over the IDs in row order and, per modality, its recipe and the sum of its samples.

    Every sample is hashed under its ID, so the order of IDs is the order of samples too.
    """
    parts = sorted((recipe.hash, f"{sum(shard_sums) % MODULUS:064x}") for recipe, shard_sums in sums)
    return hashlib.sha256(canonical_json([list(image_ids), parts]).encode()).hexdigest()
