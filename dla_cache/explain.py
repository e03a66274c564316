"""Why one image of a cache is as it is: whole, missing, damaged, stale, removed, quarantined, or not known at all."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dla_cache.errors import CorruptShardError, DlaError, ImageError
from dla_cache.image_ids import escape_id
from dla_cache.ingest import quarantine_path
from dla_cache.manifest import ManifestRow, path_of, read_manifest
from dla_cache.quarantine import read_reasons
from dla_cache.store import LatentStore
from dla_cache.store.metadata import how_to_go_on
from dla_cache.store.rows import StoredImage
from dla_cache.tars import read_range

State = Literal["whole", "missing", "damaged", "stale", "removed", "quarantined", "unknown"]

WORST_FIRST: tuple[State, ...] = ("unknown", "removed", "quarantined", "damaged", "stale", "missing", "whole")


@dataclass(frozen=True, slots=True)
class Finding:
    """What one place says of the image."""

    where: str
    """A modality, `images`, `manifest`, `file` or `row table`."""
    state: State
    what: str
    """The reason, and what to do where something can be done."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """All that is known of one image."""

    image_id: str
    findings: tuple[Finding, ...]

    @property
    def state(self) -> State:
        """The worst that was found."""
        return min((finding.state for finding in self.findings), key=WORST_FIRST.index)


def explain_image(
    store: LatentStore, image_id: str, *, manifest_path: Path | None = None, image_root: Path | None = None
) -> Explanation:
    """What the store, and the manifest and the image's file if they are given, say of an image.

    Args:
        image_root: folder that the image's URI starts from; None for the manifest's.

    Raises:
        ManifestError: if the manifest cannot be read.
    """
    stored = next((image for image in store.rows if image.image_id == image_id), None)
    findings = []
    listed = None
    if manifest_path is not None:
        manifest = read_manifest(manifest_path)
        listed = next((row for row in manifest.rows() if row.image_id == image_id), None)
        image_root = image_root or manifest.root
    if stored is None:
        findings.append(_why_not_stored(store, image_id, manifest_path, listed))
    elif stored.removed and image_id in (reasons := read_reasons(store)):
        findings.append(Finding("row table", "quarantined", f"a build left it out: it {reasons[image_id]}"))
    elif stored.removed:
        findings.append(Finding("row table", "removed", "`dla cache takedown` removed it; nothing but its ID is left"))
    else:
        findings += _series_findings(store, stored)
        if manifest_path is not None:
            findings.append(_manifest_finding(stored, listed))
        if image_root is not None:
            findings.append(_file_finding(image_root, stored))
    return Explanation(image_id, tuple(findings))


def _why_not_stored(
    store: LatentStore, image_id: str, manifest_path: Path | None, listed: ManifestRow | None
) -> Finding:
    if listed is not None and listed.split not in store.rows.splits:
        what = (
            f"the manifest has it in split `{listed.split}`, of which the store has no image: see `splits` in its spec"
        )
        return Finding("row table", "missing", what)
    if listed is not None:
        return Finding("row table", "missing", "the manifest lists it, the store was built from a list without it")
    reason = None if manifest_path is None else _quarantined(quarantine_path(manifest_path), image_id)
    if reason is not None:
        return Finding("manifest", "quarantined", f"`dla manifest make` put it aside: it {reason}")
    return Finding(
        "row table", "unknown", "neither the store nor what else was named knows this ID: check its spelling"
    )


def _quarantined(path: Path, image_id: str) -> str | None:
    """Why an image was put aside, by its ID or by where it was found; None if it was not."""
    if not path.is_file():
        return None
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            thing = json.loads(line)
            where, reason = str(thing["where"]), str(thing["reason"])
        except (ValueError, KeyError, TypeError):
            continue
        if image_id in (where, escape_id(where)):
            return reason
    return None


def _series_findings(store: LatentStore, image: StoredImage) -> Iterator[Finding]:
    shard = image.row // store.shard_size
    reasons = read_reasons(store)
    for series in store.series:
        if shard not in store.committed(series):
            reason = reasons.get(image.image_id)
            bad = "" if reason is None else f"the last build made nothing of it, for it {reason}; "
            yield Finding(series, "missing", f"{bad}shard {shard} is not committed: {how_to_go_on(store.path)}")
            continue
        row = np.array([image.row])
        try:
            if series in store.modalities:
                store.read(series, row)
            else:
                store.read_images(row)
        except CorruptShardError:
            what = f"it cannot be read from shard {shard}: `dla cache build --repair` makes that again"
            yield Finding(series, "damaged", what)
        else:
            yield Finding(series, "whole", f"shard {shard}, and its checksum holds")


def _manifest_finding(image: StoredImage, listed: ManifestRow | None) -> Finding:
    if listed is None:
        return Finding("manifest", "stale", "it lists no such image any more; the store was built from another list")
    differing = [
        f"`{name}` `{getattr(image, name)}` → `{getattr(listed, name)}`"
        for name in ("sha256", "label", "split", "uri")
        if getattr(image, name) != getattr(listed, name)
    ]
    if differing:
        return Finding("manifest", "stale", f"it says otherwise: {', '.join(differing)}; build a new store from it")
    return Finding("manifest", "whole", "it says the same")


def _file_finding(image_root: Path, image: StoredImage) -> Finding:
    try:
        path_of(image_root, image.uri)
        content = read_range(image_root, image.uri)
    except ImageError as error:
        return Finding("file", "missing", f"{error.message}; its latents stay good, but it cannot be trained on")
    except DlaError as error:
        return Finding("file", "damaged", error.message)
    found = hashlib.sha256(content).hexdigest()
    if found != image.sha256:
        what = f"`{image.uri}` has changed: sha256 `{image.sha256[:16]}…` → `{found[:16]}…`"
        return Finding("file", "stale", f"{what}; restore it, or make manifest and store again")
    return Finding("file", "whole", f"`{image.uri}` is the file that was listed")
