"""Edits of a store that keep its seals, as somebody makes them by hand who has read docs/format.md and no code."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
from fastcrc.crc32 import iscsi as crc32c

Edit = Callable[[dict[str, Any]], None]


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main_file(store: Path) -> Path:
    return next(store / name for name in ("zarr.json", "dla.json") if (store / name).exists())


def row_part(store: Path) -> Path:
    return next(store.glob("rows/*.arrow"))


def edit_json(path: Path, edit: Edit) -> None:
    content = json.loads(path.read_bytes())
    edit(content)
    path.write_text(json.dumps(content, indent=2))


def edit_settings(store: Path, edit: Edit) -> None:
    """Changes what the main file says of the store, and its seal."""

    def sealed(content: dict[str, Any]) -> None:
        settings = content["attributes"]["dla"] if main_file(store).name == "zarr.json" else content
        edit(settings)
        settings.pop("sha256", None)
        settings["sha256"] = sha256(canonical(settings))

    edit_json(main_file(store), sealed)


def edit_records(store: Path, series: str, edit: Edit) -> None:
    """Changes every commit record of a series, each then in a file of its own under the name of its content."""
    folder = store / "commits" / series
    records = []
    for file in folder.glob("[!.]*"):
        if file.suffix == ".json":
            records.append(json.loads(file.read_bytes()))
        else:
            table = pyarrow.parquet.ParquetFile(file).read(use_threads=False)
            records += [json.loads(row.pop("measured")) | row for row in table.to_pylist()]
        file.unlink()
    for record in records:
        edit(record)
        content = canonical(record)
        (folder / f"{record['shard']}-{sha256(content)[:16]}.json").write_bytes(content)


def edit_recipe(store: Path, modality: str, edit: Edit) -> None:
    """Changes a recipe, its hash, the seal over it, and the records of its shards."""
    recipes: dict[str, str] = {}
    array = store / "latents" / modality / "zarr.json"

    def in_array(content: dict[str, Any]) -> None:
        attributes = content["attributes"]["dla"]
        edit(attributes["recipe"])
        recipes[modality] = attributes["recipe_hash"] = sha256(canonical(attributes["recipe"]))

    def in_settings(settings: dict[str, Any]) -> None:
        if array.exists():
            settings["recipes"][modality] = recipes[modality]
        else:
            edit(settings["recipes"][modality])
            recipes[modality] = sha256(canonical(settings["recipes"][modality]))

    if array.exists():
        edit_json(array, in_array)
    edit_settings(store, in_settings)
    edit_records(store, modality, lambda record: record.update(recipe_hash=recipes[modality]))


def shard_files(store: Path, series: str, shard: int) -> list[Path]:
    """The files of a shard, the one with the payloads first."""
    if main_file(store).name == "dla.json":
        names = [f"{series}/{series}-{shard:06d}.tar", f"{series}/{series}-{shard:06d}.index"]
        return [store / name for name in names]
    if series == "images":
        return [store / "images" / f"{shard:06d}.blob", store / "images" / f"{shard:06d}.index"]
    return sorted((store / "latents" / series).glob(f"c.{shard}.*"))


def edit_index(store: Path, series: str, shard: int, row: int, offset: int, size: int) -> None:
    """Lets an index say that a payload lies elsewhere; checksum and record agree."""
    index = shard_files(store, series, shard)[1]
    content = bytearray(index.read_bytes())
    struct.pack_into("<QQ", content, 8 + 20 * row, offset, size)
    content[-4:] = crc32c(bytes(content[:-4])).to_bytes(4, "little")
    index.write_bytes(content)
    recommit(store, series, shard)


def rename_member(store: Path, series: str, shard: int, name: str, kind: bytes = b"0") -> None:
    """Gives the first member of a tar another name or type; checksum and record agree."""
    tar = shard_files(store, series, shard)[0]
    content = bytearray(tar.read_bytes())
    content[:100] = name.encode().ljust(100, b"\0")
    content[156:157] = kind
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    tar.write_bytes(content)
    recommit(store, series, shard)


def recommit(store: Path, series: str, shard: int) -> None:
    """Makes the record of a shard agree with its files."""
    whole = b"".join(file.read_bytes() for file in shard_files(store, series, shard))

    def agree(record: dict[str, Any]) -> None:
        if record["shard"] == shard:
            record.update(size_bytes=len(whole), file_sha256=sha256(whole))

    edit_records(store, series, agree)
