"""What goes into a store and what it adds up to: checks of latents, and the content hash."""

import hashlib
from collections.abc import Iterable, Sequence
from json.encoder import encode_basestring_ascii

import numpy as np
from numpy.typing import NDArray

from dla_cache.errors import LatentShapeError, NonFiniteLatentError, name_some
from dla_cache.spec import LatentFormat, Recipe, canonical_json
from dla_cache.store.precision import are_storable, decode_numbers, encode_numbers

MODULUS = 2**256

Payload = bytes | NDArray[np.uint8]
"""The payload of one row: a sample's numbers, little endian in C order, or the bytes of an image."""


def checked_latents(
    latents: NDArray[np.generic], latent_format: LatentFormat, image_ids: Sequence[str]
) -> NDArray[np.generic]:
    """What is stored of what a source put out, [n, *shape] in the dtype on disk, little endian.

    Floats may come wider than they are stored; integers of any width, within the vocabulary.

    Raises:
        LatentShapeError: if shape, number or kind of dtype are not the format's.
        NonFiniteLatentError: if a value is NaN, infinite, or beyond the stored dtype or vocabulary.
    """
    samples, problem, places = _stored(latents, latent_format, image_ids)
    if places:
        bad = name_some(list(dict.fromkeys(image_ids[place] for place in places)))
        hint = (
            "store `dtype: float32`, or look at these images and at the source's parameters"
            if latent_format.vocabulary is None
            else "the source and its recipe disagree"
        )
        raise NonFiniteLatentError(f"the source put out {problem} for {bad}", hint=hint)
    return samples


def find_unstorable(
    latents: NDArray[np.generic], latent_format: LatentFormat, image_ids: Sequence[str]
) -> tuple[str, list[int]]:
    """The places of those latents [n, *shape] that `checked_latents` refuses for their values, and what that is.

    Raises:
        LatentShapeError: as of `checked_latents`.
    """
    _, problem, places = _stored(latents, latent_format, image_ids)
    return problem, places


def _stored(
    latents: NDArray[np.generic], latent_format: LatentFormat, image_ids: Sequence[str]
) -> tuple[NDArray[np.generic], str, list[int]]:
    """What is stored, what would be wrong with a value, and the places of those latents that have such a one."""
    expected = (len(image_ids), *latent_format.shape)
    if latents.shape != expected:
        raise LatentShapeError(
            f"the source put out latents of shape `{list(latents.shape)}`, its recipe declares `{list(expected)}`"
            f" for {name_some(image_ids)}",
            hint="the source and its recipe disagree: mend the source",
        )
    is_continuous = latent_format.vocabulary is None
    if (latents.dtype.kind == "f") != is_continuous or latents.dtype.kind not in "fiu":
        raise LatentShapeError(
            f"the source put out `{latents.dtype}`, its recipe declares `{latent_format.dtype}`"
            f" for {name_some(image_ids)}",
            hint="the source and its recipe disagree: mend the source",
        )
    if latent_format.vocabulary is None:
        samples = encode_numbers(latents, latent_format)
        good = are_storable(samples, latent_format)
        problem = f"NaN, infinity or a value beyond `{latent_format.dtype}`"
    else:
        codes = latents.astype(np.int64)
        samples = encode_numbers(codes, latent_format)
        in_range = (codes >= 0) & (codes < latent_format.vocabulary)
        good = np.asarray(in_range.all(axis=tuple(range(1, in_range.ndim))))
        problem = f"a code outside [0, {latent_format.vocabulary})"
    return samples, problem, np.flatnonzero(~good).tolist()


def as_stored(
    latents: NDArray[np.generic], latent_format: LatentFormat, image_ids: Sequence[str]
) -> NDArray[np.generic]:
    """What a store makes of what a source put out: the same numbers as a reader of that store gets, [n, *shape].

    Rounded as often as the stored ones were.

    Raises:
        LatentShapeError, NonFiniteLatentError: as of `checked_latents`.
    """
    for dtype in latent_format.rounded_from:
        before = latent_format.model_copy(update={"dtype": dtype, "quantisation": None, "rounded_from": ()})
        latents = decode_numbers(checked_latents(latents, before, image_ids), before)
    return decode_numbers(checked_latents(latents, latent_format, image_ids), latent_format)


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
        digest.update(payload if isinstance(payload, bytes) else payload.data)
        total += int.from_bytes(digest.digest(), "big")
    return total % MODULUS


def content_hash(image_ids: Iterable[str], sums: Iterable[tuple[Recipe, Iterable[int]]]) -> str:
    """sha256 over the IDs in row order and, per modality, its recipe and the sum of its samples.

    Every sample is hashed under its ID, so the order of IDs is the order of samples too.
    """
    parts = sorted((recipe.hash, f"{sum(shard_sums) % MODULUS:064x}") for recipe, shard_sums in sums)
    # The canonical JSON of `[IDs, parts]`, without ever holding ten million IDs.
    digest = hashlib.sha256(b"[[")
    for place, image_id in enumerate(image_ids):
        digest.update(f"{',' if place else ''}{encode_basestring_ascii(image_id)}".encode())
    digest.update(f"],{canonical_json(parts)}]".encode())
    return digest.hexdigest()
