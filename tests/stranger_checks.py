"""A whole store, every byte of it checked with `tests.stranger`: what `dla cache verify` does, without dla.

Legend: C channels, N values.
"""

import io
import struct
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tests.stranger import ABSENT, Store, canonical_json, crc32c, open_store, read_bytes, refuse_unless, sha256


@dataclass(frozen=True)
class Contents:
    """All that a store holds, checked."""

    rows: list[dict[str, Any]]
    latents: dict[str, dict[str, np.ndarray]]
    """By modality and image ID; as a reader gets them."""
    images: dict[str, bytes]
    content_hash: str | None
    """None while shards are missing."""


def read_store(folder: Path) -> Contents:
    """Everything, every byte checked against everything that vouches for it."""
    store = open_store(folder)
    rows = read_rows(store)
    latents = {
        modality: {
            row["image_id"]: store.latent(modality, row["row"])
            for row in rows
            if not row["removed"] and row["row"] // store.shard_size in store.records(modality)
        }
        for modality in store.recipes
    }
    images = {
        row["image_id"]: store.image(row["row"])
        for row in rows
        if "images" in store.series and not row["removed"] and row["row"] // store.shard_size in store.records("images")
    }
    sums = dict.fromkeys(store.series, 0)
    for series in store.series:
        for shard, record in store.records(series).items():
            of_shard = [row for row in rows if row["row"] // store.shard_size == shard]
            sums[series] += _check_shard(store, series, record, of_shard)
    recorded = {m: sum(int(record["content_sum"], 16) for record in store.records(m).values()) for m in store.recipes}
    content_hash = _content_hash(store, rows, {m: sums[m] for m in store.recipes})
    refuse_unless(content_hash == _content_hash(store, rows, recorded), f"{folder}: the content hash is another")
    refuse_unless(store.is_current(), f"{folder}: images were removed in the meantime")
    shards = {row["row"] // store.shard_size for row in rows}
    is_whole = all(store.records(modality).keys() == shards for modality in store.recipes)
    return Contents(rows, latents, images, content_hash if is_whole else None)


def read_rows(store: Store) -> list[dict[str, Any]]:
    """All rows, every byte of the row table checked."""
    every: list[dict[str, Any]] = []
    for part in store.parts:
        file = read_bytes(store.folder / part["file"])
        refuse_unless(len(file) == part["size_bytes"] and sha256(file) == part["sha256"], f"{part['file']} is damaged")
        rows = [row for block in range(len(part["block_crc32c"])) for row in store.block(part, block)]
        table = pa.ipc.open_file(pa.py_buffer(file)).read_all()
        refuse_unless(
            table.schema.equals(store.schema) and table.to_pylist() == rows, f"{part['file']}: not its blocks"
        )
        refuse_unless(
            [row["row"] for row in rows] == list(range(part["start"], part["start"] + part["n_rows"])),
            f"{part['file']}: rows do not follow each other",
        )
        _check_counts(store, part, rows)
        every += rows
    refuse_unless(len({row["image_id"] for row in every}) == len(every), "an ID stands twice")
    return every


def _check_counts(store: Store, part: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    kept = Counter(row["split"] for row in rows if not row["removed"])
    refuse_unless(sum(row["removed"] for row in rows) == part["n_removed"], f"{part['file']}: n_removed")
    refuse_unless({x["split"]: x["images"] for x in part["splits"]} == kept, f"{part['file']}: splits")
    for block, split in enumerate(part["block_splits"]):
        of_block = rows[block * store.block_rows : (block + 1) * store.block_rows]
        splits = {None if row["removed"] else row["split"] for row in of_block}
        refuse_unless(split == (splits.pop() if len(splits) == 1 else None), f"{part['file']}: block_splits")


def _content_hash(store: Store, rows: list[dict[str, Any]], sums: dict[str, int]) -> str:
    kept = [row["image_id"] for row in rows if not row["removed"]]
    pairs = sorted([store.recipe_hash(modality), f"{total % 2**256:064x}"] for modality, total in sums.items())
    return sha256(canonical_json([kept, pairs]))


def _check_shard(store: Store, series: str, record: dict[str, Any], rows: list[dict[str, Any]]) -> int:
    """The content sum of a shard, made anew; its bytes, its index, its removed images and its statistics checked."""
    where = f"{series} of shard {record['shard']}"
    files = [read_bytes(path) for path in store.files(series, record["shard"])]
    refuse_unless(sha256(b"".join(files)) == record["file_sha256"], f"{where}: other bytes")
    total, numbers = 0, {}
    for row in rows:
        if row["removed"]:
            offset, size, crc = store.place(series, record["shard"], row["row"] % store.shard_size)
            nothing = (0, 0) if len(files) > 1 else (size, crc32c(bytes(size)))
            gone = (size, crc) == nothing and not any(files[0][offset : offset + size])
            refuse_unless(gone, f"{where}: something is left of row {row['row']}")
        elif series == "images":
            payload = store.image(row["row"])
            total += int(sha256(row["image_id"].encode() + b"\0" + payload), 16)
        else:
            numbers[row["row"]] = store.numbers(series, row["row"])
            total += int(sha256(row["image_id"].encode() + b"\0" + numbers[row["row"]].tobytes()), 16)
    refuse_unless(f"{total % 2**256:064x}" == record["content_sum"], f"{where}: content sum")
    if len(files) == 1:
        _check_zarr_index(store, files[0], rows, where)
    else:
        _check_members(store, series, record["shard"], rows, files[0])
    if series != "images":
        _check_statistics(store, series, record, [row for row in rows if not row["removed"]], numbers)
    return total


def _check_zarr_index(store: Store, file: bytes, rows: list[dict[str, Any]], where: str) -> None:
    index = file[-16 * store.shard_size - 4 :]
    refuse_unless(crc32c(index[:-4]) == struct.unpack("<I", index[-4:])[0], f"{where}: index of the shard")
    entries = np.frombuffer(index[:-4], "<u8").reshape(-1, 2).tolist()
    stride = (len(file) - len(index)) // len(rows)
    expected = [[place * stride, stride] for place in range(len(rows))]
    absent = [[ABSENT, ABSENT]] * (store.shard_size - len(rows))
    refuse_unless(entries == expected + absent, f"{where}: index of the shard")


def _check_members(store: Store, series: str, shard: int, rows: list[dict[str, Any]], file: bytes) -> None:
    """That the index says of a tar what the tar says of itself; that a blob has no gaps."""
    where = f"{series} of shard {shard}"
    kept = [
        (row["image_id"], *entry[:2])
        for row, entry in zip(rows, store.index(series, shard).tolist(), strict=True)
        if not row["removed"]
    ]
    if store.is_zarr:
        ends = np.cumsum([0] + [size for _, _, size in kept]).tolist()
        refuse_unless([offset for _, offset, _ in kept] + [len(file)] == ends, f"{where}: gaps")
        return
    with tarfile.open(fileobj=io.BytesIO(file)) as tar:
        members = tar.getmembers()
    named = [(member.name.partition(".")[0], member.offset_data, member.size) for member in members]
    refuse_unless(named == kept, f"{where}: tar and index disagree")
    suffixes = {member.name.partition(".")[2] for member in members}
    refuse_unless(series == "images" or suffixes <= {f"{series}.npy"}, f"{where}: names of members")
    plain = all((m.mtime, m.mode, m.uid, m.gid, m.uname, m.gname) == (0, 0o644, 0, 0, "", "") for m in members)
    refuse_unless(plain, f"{where}: members say more than they should")
    end = max((offset + -(-size // 512) * 512 for _, offset, size in kept), default=0)
    refuse_unless(file[end:] == bytes(1024), f"{where}: end of the tar")


def _check_statistics(
    store: Store, modality: str, record: dict[str, Any], kept: list[dict[str, Any]], numbers: dict[int, np.ndarray]
) -> None:
    where = f"statistics of {modality}, shard {record['shard']}"
    axis = store.recipes[modality]["format"]["axes"].index(
        "codebook" if store.recipes[modality]["format"]["kind"] == "codes" else "channel"
    )
    refuse_unless(set(record["statistics"]) == {row["split"] for row in kept}, f"{where}: splits")
    for split, said in record["statistics"].items():
        samples = np.stack([store.decoded(modality, numbers[row["row"]]) for row in kept if row["split"] == split])
        values_CN = np.moveaxis(samples.astype(np.float64), axis + 1, 0).reshape(samples.shape[axis + 1], -1)
        measured = {
            "mean": values_CN.mean(1),
            "variance": values_CN.var(1),
            "minimum": values_CN.min(1),
            "maximum": values_CN.max(1),
        }
        refuse_unless(said["count"] == len(samples), f"{where}: count")
        for name, values in measured.items():
            refuse_unless(bool(np.allclose(said[name], values, rtol=1e-6, atol=1e-9)), f"{where}: {name}")
