"""WebDataset shards: the samples of a tar file and where their bytes lie in it; nothing is unpacked."""

import errno
import json
import os
import posixpath
import re
import stat
import tarfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dla_cache.candidates import (
    IMAGE_SUFFIXES,
    RANGE,
    USUAL_COLUMNS,
    Columns,
    Found,
    Quarantined,
    Skipped,
    choose_columns,
    describe_columns,
    fault_of_file,
    fault_of_name,
    make_candidate,
    refuse_vectors,
)
from dla_cache.errors import ImageError, ManifestError

MAX_FILE_BYTES = 2**30
"""More is never an image that could be decoded, and a sparse file of a terabyte takes no room on a disk."""

MAX_TEXT_BYTES = 2**20
"""A member that holds a label and is larger than this is refused."""

SAMPLE_NAME = re.compile(r"((?:.*/)?[^/.][^/.]*)\.([^/]+)", re.DOTALL)
"""Key and extension of a member, as WebDataset splits them: at the first dot of the file's own name."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a tar."""

    name: str
    """Path in the tar, without a leading `./`."""
    offset: int
    """Of the first byte of the payload, in bytes from the start of the tar."""
    size_bytes: int
    is_contiguous: bool
    """Whether the payload lies in one piece: not so for a sparse file."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The members of a tar that have one key."""

    key: str
    members: dict[str, list[Member]] = field(default_factory=dict)
    """By extension in lower case, without the first dot: `jpg`, `seg.png`. More than one is a fault of the shard."""
    texts: dict[str, bytes] = field(default_factory=dict)
    """Payload of those members that were asked for, by extension."""


@dataclass(frozen=True, slots=True)
class Shard:
    """What a tar holds, in its order."""

    samples: tuple[Sample, ...]
    others: tuple[str, ...]
    """Names of members that belong to no sample: hidden files, links, names without an extension."""


def read_shard(path: Path, text_extensions: Collection[str]) -> Shard:
    """The samples of a WebDataset shard.

    Args:
        text_extensions: members whose payload is wanted, as `cls` and `json`.

    Raises:
        ManifestError: if the file is no whole, uncompressed tar, or a wanted payload is too large.
    """
    samples: dict[str, Sample] = {}
    others: list[str] = []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (entry := tar.next()) is not None:
                if entry.isdir():
                    continue
                name = posixpath.normpath(entry.name)
                split = SAMPLE_NAME.fullmatch(name)
                if split is None or not entry.isreg():
                    others.append(name)
                    continue
                key, extension = split[1], split[2].lower()
                sample = samples.setdefault(key, Sample(key))
                member = Member(name, entry.offset_data, entry.size, is_contiguous=not entry.issparse())
                sample.members.setdefault(extension, []).append(member)
                if extension in text_extensions:
                    if entry.size > MAX_TEXT_BYTES:
                        raise ValueError(f"`{name}` has {entry.size} bytes, too many for a label")
                    file.seek(entry.offset_data)
                    sample.texts[extension] = file.read(entry.size)
            _check_end(tar.offset, path)
    except (OSError, tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        raise ManifestError(
            f"shard `{path}` cannot be read: {error}",
            hint="a shard is one whole, uncompressed tar file: get it again, or unpack the `.gz` around it",
        ) from error
    return Shard(tuple(samples.values()), tuple(others))


def _check_end(offset: int, path: Path) -> None:
    # tarfile takes a header that it cannot read, or half of one, for the end, and so loses the rest without a word.
    with path.open("rb") as file:
        file.seek(offset)
        while block := file.read(2**20):
            if block.count(0) != len(block):
                raise ValueError(f"from byte {offset} on it is damaged, or another tar is appended")


def find_samples(root: Path, shards: Sequence[str], columns: Columns) -> tuple[list[Found], str, bool]:
    """What the samples of WebDataset shards are, where classes, splits and IDs come from, and if they are multi-label.

    Args:
        shards: paths relative to `root`.

    Raises:
        ManifestError: if a shard is damaged, a column that was asked for is not there, or labels are no names.
    """
    real_root = os.path.realpath(root)
    usual = {"label": ("cls", *USUAL_COLUMNS["label"]), "split": USUAL_COLUMNS["split"]}
    asked = [name for name in (columns.label, columns.split, columns.image_id) if name is not None]
    wanted = {*usual["label"], *usual["split"], *asked}
    found: list[Found] = []
    samples: list[tuple[str, Sample, dict[str, Any] | None]] = []
    present: dict[str, None] = {}
    for shard in sorted(shards):
        fault = fault_of_name(shard) or fault_of_file(f"{root}/{shard}", real_root)
        if fault is not None:
            raise ManifestError(f"shard `{shard}` {fault}", hint="put the shard itself there, under a plain name")
        content = read_shard(root / shard, {"cls", "json", columns.label or "cls"})
        found += [Skipped(f"{shard}/{name}", "in a tar, of no sample") for name in content.others]
        for sample in content.samples:
            cells = _cells_of(sample)
            present |= dict.fromkeys(cells or ())
            # A million captions and web addresses would fill the memory.
            kept = None if cells is None else {name: cells[name] for name in wanted & cells.keys()}
            samples.append((shard, replace(sample, texts={}), kept))
    chosen = choose_columns(tuple(present), columns, usual)
    repeats = len({sample.key for _, sample, _ in samples}) < len(samples)
    found += [_find_sample(shard, sample, cells, chosen, repeats) for shard, sample, cells in samples]
    id_text = "shard and name, for names repeat" if repeats else "the name in the shard"
    labels = [cells.get(chosen.label) for _, _, cells in samples if cells] if chosen.label else []
    refuse_vectors(labels, chosen.label or "")
    lists = any(isinstance(label, list) for label in labels)
    is_multi_label = columns.label_separator is not None or lists
    remark = describe_columns(chosen, id_text, is_multi_label=is_multi_label)
    return found, f"from {len(shards)} {'shard' if len(shards) == 1 else 'shards'}, {remark}", is_multi_label


def _find_sample(shard: str, sample: Sample, cells: dict[str, Any] | None, columns: Columns, repeats: bool) -> Found:
    images = [
        member
        for extension in sample.members
        if f".{extension}" in IMAGE_SUFFIXES
        for member in sample.members[extension]
    ]
    if not images:
        return Skipped(f"{shard}/{sample.key}", "sample without an image")
    image = images[0]
    where = f"{shard}/{image.name}"
    if len(images) > 1:
        return Quarantined(where, f"is one of {len(images)} images of its sample")
    if cells is None:
        return Quarantined(where, "has a `.json` that is no JSON object, or a label that is not UTF-8")
    if not image.is_contiguous:
        return Quarantined(where, "is stored as a sparse file")
    uri = f"{shard}#{image.offset}+{image.size_bytes}"
    return make_candidate(where, uri, where if repeats else image.name, cells, columns)


def _cells_of(sample: Sample) -> dict[str, Any] | None:
    """The fields of a sample's JSON and the text of its other members that were read; None if they are damaged."""
    try:
        fields = json.loads(sample.texts.get("json", b"{}"))
        texts = {extension: text.decode() for extension, text in sample.texts.items() if extension != "json"}
    except (ValueError, RecursionError):
        return None
    return {**fields, **texts} if isinstance(fields, dict) else None


def read_range(root: Path, uri: str) -> bytes:
    """The bytes behind a URI below `root`: a whole file, or of `path#offset+size` that part of one.

    Never waits for a pipe and never reads more than `MAX_FILE_BYTES`.

    Raises:
        ImageError: if the file is missing, unreadable, too large, no regular file, or shorter than the range.
    """
    part = RANGE.fullmatch(uri)
    path, start = (root / part[1], int(part[2])) if part else (root / uri, 0)
    fault, content, size_bytes = "", b"", 0
    try:
        # O_NONBLOCK: opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            size_bytes = int(part[3]) if part else status.st_size
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(status.st_mode):
                fault = "is no regular file"
            elif size_bytes > MAX_FILE_BYTES:
                fault = f"has {size_bytes} bytes, more than an image that can be decoded"
            else:
                content = os.pread(descriptor, size_bytes, start)
                while len(content) < size_bytes and (more := os.pread(descriptor, size_bytes, start + len(content))):
                    content += more
        finally:
            os.close(descriptor)
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    if part and not fault and len(content) != size_bytes:
        fault = "is cut off: the file ends before it"
    if fault:
        raise ImageError(f"image `{uri}` {fault}", hint="restore the file, or drop the image from the manifest")
    return content
