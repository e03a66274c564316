"""The row table on disk: parts of Arrow record batches, and an index whose hash vouches for all of them.

The index holds the hash of every part and the checksum of every block of it, and the store's main file holds the hash
of the index. So a single image's row is read, and checked, without reading the others.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from fastcrc.crc32 import iscsi as crc32c

from dla_cache.durable import make_folder, read_file, write_durably
from dla_cache.errors import StoreError
from dla_cache.maps import map_file
from dla_cache.parquet import from_parquet, to_parquet
from dla_cache.spec import canonical_json
from dla_cache.store.layout import not_as_written
from dla_cache.store.row_blocks import BLOCK_ROWS, RowBlock, schema_of
from dla_cache.store.row_parts import RowPart
from dla_cache.store.rows import RowTable

FOLDER = "rows"

MAGIC_BYTES = 8
"""Before the schema, in a file of Arrow's."""

INDEX_SCHEMA = pa.schema(
    [
        pa.field("start", pa.int64(), nullable=False),
        pa.field("n_rows", pa.int64(), nullable=False),
        pa.field("n_removed", pa.int64(), nullable=False),
        pa.field("splits", pa.list_(pa.struct([("split", pa.string()), ("images", pa.int64())])), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        # Of each block: its split if all images have it and none was removed, where it begins (and the last one ends),
        # and the checksum of these bytes.
        pa.field("block_splits", pa.list_(pa.string()), nullable=False),
        pa.field("block_offsets", pa.list_(pa.int64()), nullable=False),
        pa.field("block_crc32c", pa.list_(pa.uint32()), nullable=False),
    ]
)


OURS = re.compile(rf"{FOLDER}/(\d{{12,}}-[0-9a-f]{{16}}\.arrow|index-[0-9a-f]{{16}}\.parquet)")


OF_BLOCKS = ("block_splits", "block_offsets", "block_crc32c")
"""The columns with a value for each block."""


def is_of_rows(store: Path, path: Path) -> bool:
    """Whether a path in a store is that of a row table, be it a former one."""
    return OURS.fullmatch(path.relative_to(store).as_posix()) is not None


def row_files(rows: RowTable, rows_sha256: str) -> tuple[str, ...]:
    """The paths in its store of a row table that was read from there."""
    return index_name(rows_sha256), *(part.entry["file"] for part in rows.parts if part.entry is not None)


def index_name(rows_sha256: str) -> str:
    """The path of an index in its store."""
    return f"{FOLDER}/index-{rows_sha256[:16]}.parquet"


def write_rows(store: Path, rows: RowTable) -> str:
    """Puts a row table beside whatever other one is there, and says its hash; parts that are there stay.

    It counts once the main file has that hash.

    Raises:
        OSError: if the disk refuses.
    """
    make_folder(store / FOLDER)
    entries = []
    for part in rows.parts:
        if part.entry is not None and _is_there(store, part.entry):
            entries.append({**part.entry, "block_splits": part.block_splits})
            continue
        entry, content = _encode(part, rows.is_multi_label)
        path = store / entry["file"]
        if not (path.is_file() and path.read_bytes() == content):
            write_durably(path, content)
        entries.append(entry)
    facts = canonical_json({"block_rows": BLOCK_ROWS, "is_multi_label": rows.is_multi_label})
    table = pa.Table.from_pylist(entries, schema=INDEX_SCHEMA).replace_schema_metadata({"dla": facts})
    content = to_parquet(table)
    rows_sha256 = hashlib.sha256(content).hexdigest()
    if not (store / index_name(rows_sha256)).is_file():
        write_durably(store / index_name(rows_sha256), content)
    return rows_sha256


def _encode(part: RowPart, is_multi_label: bool) -> tuple[dict[str, Any], bytes]:
    """A part's entry in the index, and its file: the same rows give the same bytes."""
    schema = schema_of(is_multi_label=is_multi_label)
    sink = pa.BufferOutputStream()
    offsets = []
    with pa.ipc.new_file(sink, schema) as writer:
        for block in part.blocks():
            writer.write_batch(block.batch)
            offsets.append(sink.tell())
    content = sink.getvalue().to_pybytes()
    offsets = [MAGIC_BYTES + schema.serialize().size, *offsets]
    sha256 = hashlib.sha256(content).hexdigest()
    entry = {
        "start": part.start,
        "n_rows": part.n_rows,
        "n_removed": part.n_removed,
        "splits": [{"split": split, "images": images} for split, images in part.images_by_split.items()],
        "file": f"{FOLDER}/{part.start:012d}-{sha256[:16]}.arrow",
        "size_bytes": len(content),
        "sha256": sha256,
        "block_splits": part.block_splits,
        "block_offsets": offsets,
        "block_crc32c": [crc32c(content[start:stop]) for start, stop in pairwise(offsets)],
    }
    return entry, content


def drop_former_rows(store: Path, rows_sha256: str) -> None:
    """Removes what no longer belongs to a row table; who has it open needs parts alone, which all stay in the next one.

    Raises:
        OSError: if the disk refuses.
    """
    former = [path for path in (store / FOLDER).glob("index-*.parquet") if path != store / index_name(rows_sha256)]
    for path in former:
        path.unlink()


def read_rows(store: Path, rows_sha256: str) -> RowTable:
    """The row table of a store, of which no row is read yet.

    Raises:
        StoreError: if the index is not the one of this hash, or a part is not there in its size.
        OSError: if there is no index.
    """
    content = read_file(store / index_name(rows_sha256))
    if hashlib.sha256(content).hexdigest() != rows_sha256:
        raise not_as_written(store, f"index of the row table `{index_name(rows_sha256)}`")
    table = from_parquet(content)
    facts = json.loads((table.schema.metadata or {}).get(b"dla", b"{}"))
    if facts.get("block_rows") != BLOCK_ROWS:
        raise StoreError(f"`{store}` has rows in blocks of `{facts.get('block_rows')}`", hint="upgrade dla")
    table = table.cast(INDEX_SCHEMA).combine_chunks()
    entries = table.drop_columns(list(OF_BLOCKS)).to_pylist()
    # What is known of blocks stays where it lies: of a thousand million rows there are a million.
    blocks = {name: table[name].combine_chunks() for name in OF_BLOCKS}
    parts = [
        _part(store, entry, {name: column[place] for name, column in blocks.items()}, bool(facts["is_multi_label"]))
        for place, entry in enumerate(entries)
    ]
    for before, after in pairwise(parts):
        if after.start < before.stop:
            raise ValueError("parts of the row table overlap")
    return RowTable.of_parts(parts, is_multi_label=bool(facts["is_multi_label"]))


def _part(store: Path, entry: dict[str, Any], blocks: dict[str, pa.ListScalar], is_multi_label: bool) -> RowPart:
    """A part as the index tells of it.

    Raises:
        ValueError: if the index contradicts itself.
        StoreError: if the part's file is not there in its size.
    """
    n_rows, size = entry["n_rows"], entry["size_bytes"]
    offsets = entry["block_offsets"] = np.from_dlpack(blocks["block_offsets"].values)
    crc32cs = entry["block_crc32c"] = np.from_dlpack(blocks["block_crc32c"].values)
    splits = blocks["block_splits"].values
    if not OURS.fullmatch(entry["file"]):
        raise ValueError(f"the index of the row table names a file `{entry['file']}`")
    if n_rows < 1 or entry["start"] < 0 or {len(offsets) - 1, len(crc32cs), len(splits)} != {-(-n_rows // BLOCK_ROWS)}:
        raise ValueError("the index of the row table does not fit its parts")
    if not 0 <= offsets[0] <= offsets[-1] <= size or (np.diff(offsets) <= 0).any():
        raise ValueError("the index of the row table leads out of its parts")
    if not _is_there(store, entry):
        raise not_as_written(store, f"row table's part `{entry['file']}`")
    return RowPart(
        start=entry["start"],
        n_rows=n_rows,
        n_removed=entry["n_removed"],
        images_by_split={found["split"]: found["images"] for found in entry["splits"]},
        list_splits=splits.to_pylist,
        load=_loader(store, entry, is_multi_label),
        entry=entry,
    )


def _is_there(store: Path, entry: dict[str, Any]) -> bool:
    path = store / str(entry["file"])
    return path.is_file() and path.stat().st_size == int(entry["size_bytes"])


def _loader(store: Path, entry: dict[str, Any], is_multi_label: bool) -> Callable[[int], RowBlock]:
    """What reads a block of a part, the file being mapped when the first is read."""
    schema = schema_of(is_multi_label=is_multi_label)
    mapped: list[Any] = []

    def load(number: int) -> RowBlock:
        try:
            if not mapped:
                mapped.append(memoryview(map_file(store / entry["file"])))
            start, stop = entry["block_offsets"][number : number + 2].tolist()
            content = mapped[0][start:stop]
            if crc32c(content) != entry["block_crc32c"][number]:
                raise ValueError("a block does not have its checksum")
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(pa.py_buffer(content)), schema)
            batch.validate(full=True)
            first = entry["start"] + number * BLOCK_ROWS
            rows = np.arange(first, min(first + BLOCK_ROWS, entry["start"] + entry["n_rows"]))
            if not np.array_equal(np.from_dlpack(batch.column("row")), rows):
                raise ValueError("a block has other rows than its place says")
        except FileNotFoundError as error:  # it was there when the store was opened
            raise StoreError(
                f"images were removed from `{store}` since it was opened",
                hint="open it again (start the command again)",
            ) from error
        except (OSError, ValueError, pa.ArrowException) as error:
            raise not_as_written(store, f"row table's part `{entry['file']}` ({error})") from error
        return RowBlock(batch)

    return load


def listed_parts(store: Path, index: str) -> dict[str, int]:
    """Files and bytes of the parts that an index names, unchecked; none if there is no such index, or it is damaged."""
    try:
        listed = from_parquet(read_file(store / index), ["file", "size_bytes"]).to_pylist()
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return {}
    return {entry["file"]: entry["size_bytes"] for entry in listed if OURS.fullmatch(entry["file"])}


def row_problems(store: Path, rows_sha256: str) -> Iterator[tuple[str, str]]:
    """Whatever is amiss with the row table on disk, every byte of it being read: where, and what."""
    try:
        parts = read_rows(store, rows_sha256).parts
    except StoreError as error:
        yield "row table", error.message
        return
    except (OSError, ValueError) as error:
        yield "row table", f"it cannot be read: {error}"
        return
    for part in parts:
        entry = part.entry or {}
        try:
            if hashlib.sha256(read_file(store / entry["file"])).hexdigest() != entry["sha256"]:
                yield entry["file"], "it is not the part of the row table that was written"
            elif _known_of(RowPart.of_blocks(part.start, list(part.blocks()))) != _known_of(part):
                yield entry["file"], "the index of the row table tells something else of it"
        except StoreError as error:
            yield entry["file"], error.message
        except OSError as error:
            yield entry["file"], f"it cannot be read: {error.strerror}"


def _known_of(part: RowPart) -> tuple[Any, ...]:
    return part.n_rows, part.n_removed, part.images_by_split, part.block_splits
