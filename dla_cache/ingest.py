"""From what was found to a manifest: every image is read, hashed and decoded once, and becomes a row or is quarantined.

The result is a function of the images and the settings: neither the number of threads nor the order in which a
file system lists its files changes a byte.
"""

import hashlib
import json
import os
import re
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile

import pyarrow as pa
import pyarrow.parquet as pq

from dla_cache.candidates import Candidate, Quarantined, class_name_of
from dla_cache.durable import locked_folder, make_folder, write_durably, writing_to
from dla_cache.errors import ImageError, ManifestError, WorkInterrupted, name_some
from dla_cache.images import decode_image
from dla_cache.listing import Listing
from dla_cache.manifest import Label, ManifestRow, classes_of, read_manifest, write_manifest
from dla_cache.shares import NOTHING_BAD, Allowance, Shares
from dla_cache.tars import read_range

DEFAULT_SPLIT = "train"
"""Of all images where nothing names a split."""

AHEAD = 8
"""Images in work for each thread."""

WHAT_IT_IS = {
    name: re.compile(start, re.DOTALL | re.IGNORECASE)
    for name, start in {
        "an HTML page, perhaps of a failed download": rb"\s*<(?:!doctype html|html|head|body)",
        "an SVG drawing": rb"\s*<(?:\?xml.{0,500}?<svg|svg)",
        "HEIC, which you can convert to JPEG": rb".{4}ftyp(?:hei[cxms]|hev[cx]|mif1|msf1)",
        "JPEG XL, which you can convert to JPEG": rb"\xff\x0a|\0{3}\x0cJXL ",
        "a PDF": rb"%PDF-",
        "a ZIP archive": rb"PK\x03\x04",
    }.items()
}
"""First bytes, in either case, of what often bears an image's name."""


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """A candidate that is an image."""

    candidate: Candidate
    sha256: str
    width: int
    """Pixels, of the upright image."""
    height: int


@dataclass(frozen=True, slots=True)
class Repeat:
    """Images of one content, in the order of IDs."""

    where: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    """The different labels, each the classes of one image; more than one is a conflict."""
    splits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ManifestReport:
    """What became of everything that was found: `n_found = n_images + quarantined + skipped`."""

    layout: str
    root: str
    manifest: str | None
    """None if nothing was written: too many images are quarantined."""
    quarantine: str | None
    """The file that names the quarantined; None if there is none."""
    n_found: int
    n_images: int
    """Rows of the manifest."""
    quarantined: tuple[Quarantined, ...]
    skipped: dict[str, int]
    """How many of each kind."""
    is_multi_label: bool
    """Whether an image may have any number of classes."""
    images_per_class: dict[str, int]
    """In the order of the class map; an image counts for each of its classes."""
    classes_per_image: float
    """Mean number over the labelled images; 0 if there is none."""
    n_without_class: int
    """Images that are labelled and have none of the classes."""
    images_per_split: dict[str, int]
    unlabelled_per_split: dict[str, int]
    repeats: tuple[Repeat, ...]
    """Contents that occur more than once, also where all but the first were dropped."""
    seconds: float
    """Of reading and decoding."""

    @property
    def conflicts(self) -> tuple[Repeat, ...]:
        """Contents that are labelled in more than one way."""
        return tuple(repeat for repeat in self.repeats if len(repeat.labels) > 1)

    @property
    def leaks(self) -> tuple[Repeat, ...]:
        """Contents that lie in more than one split."""
        return tuple(repeat for repeat in self.repeats if len(repeat.splits) > 1)


def read_class_names(path: Path) -> tuple[str, ...]:
    """The class map of a manifest, or of a text file with one name a line.

    Raises:
        ManifestError: if the file cannot be read, or a name stands twice.
    """
    if path.suffix.lower() == ".parquet":
        return read_manifest(path).class_names
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except OSError as error:
        raise ManifestError(f"`{path}` cannot be read: {error.strerror}", hint="check the path") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"`{path}` is not in UTF-8", hint="save it as UTF-8") from error
    names = [name for line in lines if (name := class_name_of(line, "a class list"))]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ManifestError(f"class names stand twice in `{path}`: {name_some(twice)}", hint="name each class once")
    return tuple(names)


def make_class_map(listing: Listing, given: Sequence[str] | None) -> tuple[str, ...]:
    """The class names in the order of their indices: the given ones, or all that were found, sorted.

    Names that are all whole numbers are sorted as numbers, others by their characters.

    Raises:
        ManifestError: if a class is found that is not among those given.
    """
    found = {name for candidate in listing.candidates for name in candidate.class_names or ()}
    if given is not None:
        unknown = sorted(found.difference(given))
        if unknown:
            raise ManifestError(
                f"{len(unknown)} classes are not among the {len(given)} given: {name_some(unknown)}",
                hint=f"mend the labels or the list, which has {name_some(given)}",
            )
        return tuple(given)
    if all(re.fullmatch("[0-9]{1,18}", name) for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def label_of(class_names: tuple[str, ...] | None, index_of: Mapping[str, int], *, is_multi_label: bool) -> Label | None:
    """The label of an image of these classes: exactly one, unless the manifest is multi-label."""
    if class_names is None:
        return None
    indices = sorted(index_of[name] for name in class_names)
    if is_multi_label:
        return tuple(indices)
    [index] = indices
    return index


def take_evenly(candidates: Sequence[Candidate], limit: int | None) -> Sequence[Candidate]:
    """At most `limit` candidates, evenly spaced in the order of IDs, so that all folders have their share."""
    if limit is None or limit >= len(candidates):
        return candidates
    return [candidates[number * len(candidates) // limit] for number in range(limit)]


def check_image(root: Path, candidate: Candidate) -> CheckedImage | Quarantined:
    """Reads, hashes and decodes one candidate."""
    content = b""
    try:
        content = read_range(root, candidate.uri)
        _, height, width = decode_image(content, candidate.uri).shape
    except ImageError as error:
        what_it_is = next((name for name, start in WHAT_IT_IS.items() if start.match(content)), None)
        reason = f"is {what_it_is}" if what_it_is else error.message.removeprefix(f"image `{candidate.uri}` ")
        return Quarantined(candidate.where, reason)
    return CheckedImage(candidate, hashlib.sha256(content).hexdigest(), width, height)


def check_images(
    root: Path, candidates: Sequence[Candidate], threads: int
) -> Generator[CheckedImage | Quarantined, None, None]:
    """Checks all candidates by threads; the results come in the order of the candidates."""
    ahead: deque[Future[CheckedImage | Quarantined]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="check")
    try:
        for candidate in candidates:
            ahead.append(pool.submit(check_image, root, candidate))
            if len(ahead) >= threads * AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def make_manifest(
    listing: Listing,
    out: Path,
    *,
    class_names: Sequence[str] | None = None,
    split: str | Shares | None = None,
    limit: int | None = None,
    allowance: Allowance = NOTHING_BAD,
    drop_duplicates: bool = False,
    threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> ManifestReport:
    """Checks what was listed, and writes the manifest `out` and, if anything is quarantined, a file that names it.

    If more is quarantined than is allowed, or no image is left, no manifest is written, and one that stands there
    stays. Rows are in the order of image IDs; their URIs start from the listing's root.

    Args:
        out: path that ends in `.parquet`.
        class_names: the class map; None makes it of the classes that were listed, whether or not `limit` takes them.
        split: one split for all, or shares; None takes the splits that were listed, or `DEFAULT_SPLIT` if none was.
        limit: at most so many candidates are checked, see `take_evenly`.
        drop_duplicates: of images with equal bytes, keep the one whose ID comes first.
        threads: None takes one for each processor.
        on_progress: told how many of how many candidates are checked.
        should_stop: asked between two images.

    Raises:
        ManifestError: if `out` is a file that is no manifest, a class is not in the class map, or an image is not
            accounted for.
        StoreError: if the files cannot be written, which is tried before the images are checked.
        WorkInterrupted: if `should_stop` said so; nothing is written.
    """
    started = time.monotonic()
    _check_out(out)
    class_map = make_class_map(listing, class_names)
    index_of = {name: index for index, name in enumerate(class_map)}
    quarantined = list(listing.quarantined)
    candidates = listing.candidates
    if split is None and any(candidate.split for candidate in candidates):
        quarantined += [Quarantined(candidate.where, "has no split") for candidate in candidates if not candidate.split]
        candidates = tuple(candidate for candidate in candidates if candidate.split)
    taken = take_evenly(candidates, limit)
    checked: list[CheckedImage] = []
    with closing(check_images(listing.root, taken, threads or os.cpu_count() or 1)) as outcomes:
        for done, outcome in enumerate(outcomes, start=1):
            if isinstance(outcome, CheckedImage):
                checked.append(outcome)
            else:
                quarantined.append(outcome)
            if on_progress is not None:
                on_progress(done, len(taken))
            if should_stop is not None and should_stop():
                raise WorkInterrupted(
                    f"interrupted: {done} of {len(taken)} images are checked, nothing is written",
                    hint="run the same command again",
                )
    first_of: dict[str, CheckedImage] = {}
    for image in checked:
        first_of.setdefault(image.sha256, image)
    kept = list(first_of.values()) if drop_duplicates else checked
    rows = [
        ManifestRow(
            image_id=image.candidate.image_id,
            uri=image.candidate.uri,
            label=label_of(image.candidate.class_names, index_of, is_multi_label=listing.is_multi_label),
            split=split_of(image, split),
            sha256=image.sha256,
            width=image.width,
            height=image.height,
        )
        for image in kept
    ]
    skipped = Counter(listing.skipped)
    skipped["beyond the limit"] += len(candidates) - len(taken)
    skipped["duplicate"] += len(checked) - len(kept)
    n_skipped = sum(skipped.values())
    if len(rows) + len(quarantined) + n_skipped != listing.n_found:
        raise ManifestError(
            f"of {listing.n_found} found, {len(rows)} are listed, {len(quarantined)} quarantined, {n_skipped} skipped",
            hint="an image is lost or counted twice, which is a fault of dla: report it",
        )
    is_allowed = bool(rows) and allowance.covers(len(quarantined), len(rows) + len(quarantined))
    _write_quarantine(out, quarantined)
    if is_allowed:
        write_manifest(out, rows, class_map, multi_label=listing.is_multi_label)
    labels = [classes_of(row.label) for row in rows if row.label is not None]
    images_of = Counter(index for label in labels for index in label)
    return ManifestReport(
        layout=listing.layout,
        root=str(listing.root),
        manifest=str(out) if is_allowed else None,
        quarantine=str(quarantine_path(out)) if quarantined else None,
        n_found=listing.n_found,
        n_images=len(rows),
        quarantined=tuple(quarantined),
        skipped={kind: count for kind, count in sorted(skipped.items()) if count},
        is_multi_label=listing.is_multi_label,
        images_per_class={name: images_of[index] for name, index in index_of.items()},
        classes_per_image=images_of.total() / len(labels) if labels else 0.0,
        n_without_class=labels.count(()),
        images_per_split=_count(row.split for row in rows),
        unlabelled_per_split=_count(row.split for row in rows if row.label is None),
        repeats=find_repeats(checked, split),
        seconds=time.monotonic() - started,
    )


def _check_out(out: Path) -> None:
    with writing_to(out.parent):
        make_folder(out.parent)
        TemporaryFile(dir=out.parent).close()
    if not os.path.lexists(out):
        return
    try:
        is_manifest = b"dla" in (pq.ParquetFile(out, pre_buffer=False).schema_arrow.metadata or {})
    except (pa.ArrowException, OSError):
        is_manifest = False
    if not is_manifest:
        raise ManifestError(f"`{out}` is there and is no manifest", hint="choose another name, or move that file away")


def _count(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def quarantine_path(manifest_path: Path) -> Path:
    """The file that names what is quarantined, beside the manifest."""
    return manifest_path.with_suffix(".quarantine.jsonl")


def split_of(image: CheckedImage, split: str | Shares | None) -> str:
    """The split of an image: of its share, the one for all, or the one that its source names."""
    if isinstance(split, Shares):
        return split.split_of(image.sha256)
    return split or image.candidate.split or DEFAULT_SPLIT


def find_repeats(checked: Iterable[CheckedImage], split: str | Shares | None) -> tuple[Repeat, ...]:
    """The contents that several images have, in the order of their first ones."""
    images_of: defaultdict[str, list[CheckedImage]] = defaultdict(list)
    for image in checked:
        images_of[image.sha256].append(image)
    return tuple(
        Repeat(
            tuple(image.candidate.where for image in images),
            tuple(sorted({image.candidate.class_names for image in images if image.candidate.class_names is not None})),
            tuple(sorted({split_of(image, split) for image in images})),
        )
        for images in images_of.values()
        if len(images) > 1
    )


def _write_quarantine(out: Path, quarantined: Sequence[Quarantined]) -> None:
    """Writes the list of what is quarantined, or removes an old one."""
    with writing_to(out.parent):
        make_folder(out.parent)
        with locked_folder(out.parent):
            if quarantined:
                lines = "".join(f"{json.dumps(asdict(thing))}\n" for thing in quarantined)
                write_durably(quarantine_path(out), lines.encode())
            else:
                quarantine_path(out).unlink(missing_ok=True)
