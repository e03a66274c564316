"""What might have told a student its answers: test images that are also trained on, and latents that saw labels.

Dimensions: N images.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn

from dla_cache.images import Pixels, decode_view
from dla_cache.leaks import trace_labels
from dla_cache.spec import StrictModel
from dla_cache.stored_images import image_contents
from trainer.records import read_record

if TYPE_CHECKING:
    from dla_cache.store import LatentStore
    from trainer.config import Roles

AUDIT_NAME = "audit.json"

TRAINING = ("labelled", "transfer")

NEAR_BITS = 2
"""Two images whose hashes differ in so many of 64 bits or fewer are called near-duplicates.

Measured on relief-digits at 32 pixels: copies that were scaled to 75 %, brightened or saved as JPEG are found in 98 to
100 of 100 cases, crops by one pixel in 16. Of its 1,600 test images, renderings of other digits than those that are
trained on, 0.4 % have such a neighbour among 3,800 (with 4 bits 3 %, with 6 13 %): so often it is wrong.
"""

SHOWN = 20
"""Pairs that an audit names."""

HASH_SIDE, HASH_KEPT = 32, 8
AT_ONCE = 256
"""Images that are read at one time."""


class SharedImage(StrictModel):
    """The same bytes in several roles."""

    sha256: str
    image_ids: dict[str, str]
    """Role → one image of it."""


class NearPair(StrictModel):
    """A training image and a test image that look alike."""

    image_id: str
    test_image_id: str
    bits: int
    """Of 64 that differ."""


class ModalityLabels(StrictModel):
    """Whether latents may tell labels by the way they were made."""

    store: str
    """Its name in the study; empty for the study's own."""
    modality: str
    source: str
    saw_labels: bool
    told: str


class LeakAudit(StrictModel):
    """What was looked for and what was found."""

    images: dict[str, int]
    """Role → its images."""
    n_shared: int
    """Contents that stand in two roles or more."""
    shared: tuple[SharedImage, ...]
    near_bits: int
    n_near_pairs: int
    n_near_test: int
    """Test images that look like a training image."""
    near: tuple[NearPair, ...]
    """The most alike first; bytes that are the same are not among them."""
    modalities: tuple[ModalityLabels, ...]
    test_in_statistics: bool
    """Whether the test split is among those whose latents' mean and spread a model may know."""
    test_in_selection: bool
    """Whether it is among those that steps and settings are chosen on."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found; near-duplicates by hash alone are only a reason to look."""
        labels = any(one.saw_labels for one in self.modalities)
        return not (self.n_shared or labels or self.test_in_statistics or self.test_in_selection)


def leak_audit(
    store: "LatentStore",
    roles: Iterable["Roles"],
    *,
    image_root: Path | None = None,
    more_stores: Mapping[str, "LatentStore"] | None = None,
    modalities: Collection[str] | None = None,
) -> LeakAudit:
    """Looks for test images among those that runs learn from, and for labels in the making of latents.

    Args:
        roles: those of all runs; a split that plays two parts in different runs counts for both.
        image_root: folder that the images' URIs start from; None takes them out of the store.
        more_stores: other stores of the same images by name, whose latents are looked at alone.
        modalities: those that some run reads; None for all of the stores.

    Raises:
        ImageError: if an image is missing or has changed.
    """
    splits: dict[str, list[str]] = {role: [] for role in ("labelled", "transfer", "validation", "test")}
    for one in roles:
        for role, named in splits.items():
            named += [split for split in getattr(one, role) if split not in named]
    rows = {role: store.rows_of(named) if named else np.empty(0, np.int64) for role, named in splits.items()}
    shared = shared_images(store, rows)
    training = np.unique(np.concatenate([rows[role] for role in TRAINING]))
    hashes = dict(_hashes(store, image_root, np.union1d(training, rows["test"])))
    near = near_pairs(store, training, rows["test"], hashes)
    learned_from = {split for role in TRAINING for split in splits[role]}
    stores = {"": store, **(more_stores or {})}
    return LeakAudit(
        images={role: len(found) for role, found in rows.items()},
        n_shared=len(shared),
        shared=tuple(shared[:SHOWN]),
        near_bits=NEAR_BITS,
        n_near_pairs=len(near),
        n_near_test=len({pair.test_image_id for pair in near}),
        near=tuple(near[:SHOWN]),
        modalities=tuple(
            ModalityLabels(
                store=name, modality=one.modality, source=one.source, saw_labels=one.saw_labels, told=one.in_words
            )
            for name, opened in stores.items()
            for one in trace_labels(opened)
            if modalities is None or one.modality in modalities
        ),
        test_in_statistics=not learned_from.isdisjoint(splits["test"]),
        test_in_selection=not set(splits["validation"]).isdisjoint(splits["test"]),
    )


def shared_images(store: "LatentStore", rows: Mapping[str, NDArray[np.int64]]) -> list[SharedImage]:
    """Contents that stand in two roles or more, by the sha256 of their files."""
    roles_of: dict[str, dict[str, str]] = {}
    for role, of_role in rows.items():
        for image in store.rows.images_of(of_role):
            roles_of.setdefault(image.sha256, {}).setdefault(role, image.image_id)
    return [SharedImage(sha256=digest, image_ids=named) for digest, named in roles_of.items() if len(named) > 1]


def near_pairs(
    store: "LatentStore", training: NDArray[np.int64], test: NDArray[np.int64], hashes: Mapping[int, np.uint64]
) -> list[NearPair]:
    """Training and test images with nearly the same hash and other bytes, the most alike first."""
    known = np.array([hashes[row] for row in training.tolist()], np.uint64)
    digests = dict(zip(training.tolist(), (one.sha256 for one in store.rows.images_of(training)), strict=True))
    found = []
    for row, image in zip(test.tolist(), store.rows.images_of(test), strict=True):
        bits = np.bitwise_count(known ^ hashes[row])
        for place in np.flatnonzero(bits <= NEAR_BITS).tolist():
            if digests[int(training[place])] != image.sha256:
                found.append((int(bits[place]), int(training[place]), image.image_id))
    found.sort()
    ids = store.rows.ids_of([row for _, row, _ in found])
    return [
        NearPair(image_id=image_id, test_image_id=test_id, bits=bits)
        for image_id, (bits, _, test_id) in zip(ids, found, strict=True)
    ]


def _hashes(store: "LatentStore", image_root: Path | None, rows: NDArray[np.int64]) -> Iterable[tuple[int, np.uint64]]:
    for start in range(0, len(rows), AT_ONCE):
        these = rows[start : start + AT_ONCE]
        ids = store.rows.ids_of(these)
        for row, image_id, content in zip(these.tolist(), ids, image_contents(store, image_root, these), strict=True):
            yield row, perceptual_hash(decode_view(content, image_id, min_side=HASH_SIDE))


def perceptual_hash(pixels: Pixels) -> np.uint64:
    """64 bits that stay nearly the same when an image is scaled, compressed or brightened.

    Which of the 8 by 8 lowest frequencies of the grey image at 32 by 32 pixels lie above their median, the mean of all
    left out of it. Images of one motif in one style agree in more bits than by chance, so what is found
    is a reason to look, not a finding.

    Args:
        pixels: uint8 [3, H, W].

    Source: Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions (2010), section 3.2.1 (DCT
    based hash).
    """
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    grey = np.asarray(image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.LANCZOS), np.float64)
    low = dctn(grey, norm="ortho")[:HASH_KEPT, :HASH_KEPT].ravel()
    bits = low > np.median(low[1:])
    return np.uint64(int.from_bytes(np.packbits(bits).tobytes(), "big"))


def read_audit(folder: Path) -> LeakAudit | None:
    """The audit in a study's folder, if it has one.

    Raises:
        CheckpointError: if it is damaged.
    """
    path = folder / AUDIT_NAME
    return read_record(path, LeakAudit) if path.exists() else None
