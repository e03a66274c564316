"""A reader of stores for somebody who has no dla: written from docs/format.md alone, and held to it by the tests.

Standard library, numpy and pyarrow; nothing of dla. It does every check of "What a stranger's reader must check" and
refuses with `Refused`, so it is also the model of a reader in another language. `tests.stranger_checks` reads whole
stores with it.
"""

import functools
import hashlib
import io
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

SAFE_NAME = re.compile(r"[A-Za-z0-9_-]+")
MODALITIES = re.compile("depth|audio|shape|motion|normals")
MORE_MODALITIES = re.compile(
    "(depth|audio|shape|motion|normals|intrinsics|video|variation|features|caption)(-[a-z0-9]+)*"
)
AXES = {"channel", "height", "width", "token", "codebook", "step", "frequency", "time"}
MORE_AXES = {"draw", "frame", "layer"}
PART_NAME = re.compile(r"rows/(\d{12,})-([0-9a-f]{16})\.arrow")
INDEX_ENTRY = np.dtype([("offset", "<u8"), ("size", "<u8"), ("crc32c", "<u4")])
ON_DISK = {"float16": "<f2", "float32": "<f4", "bfloat16": "<u2", "int8": "i1", "uint8": "u1"} | {
    "int16": "<i2",
    "int32": "<i4",
}
ABSENT = 2**64 - 1


class Refused(Exception):
    """The store is not what docs/format.md says: what is wrong, and where."""


def refuse_unless(holds: bool, what: str) -> None:
    if not holds:
        raise Refused(what)


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


CRC32C_TABLE = _crc32c_table()


def crc32c(payload: bytes) -> int:
    """Source: RFC 3720, appendix B.4."""
    crc = 0xFFFFFFFF
    for byte in payload:
        crc = crc >> 8 ^ CRC32C_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: {error}") from None


def read_bytes(path: Path, offset: int = 0, size: int | None = None) -> bytes:
    """`size` bytes of a file from `offset`, and no others."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            read = file.read() if size is None else file.read(size)
    except OSError as error:
        raise Refused(f"{path}: {error}") from None
    refuse_unless(size is None or len(read) == size, f"{path} ends early")
    return read


@dataclass(frozen=True)
class Store:
    """The main file and the index of the row table; everything else is read when it is asked for."""

    folder: Path
    is_zarr: bool
    main: dict[str, Any]
    recipes: dict[str, dict[str, Any]]
    """By modality."""
    parts: list[dict[str, Any]]
    block_rows: int
    is_multi_label: bool
    _records: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    _blocks: dict[tuple[int, int], list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def shard_size(self) -> int:
        return int(self.main["shard_size"])

    @property
    def series(self) -> list[str]:
        return [*self.recipes, *(["images"] if "images" in self.main else [])]

    def recipe_hash(self, series: str) -> str:
        if series != "images":
            return sha256(canonical_json(self.recipes[series]))
        return sha256(canonical_json({name: value for name, value in self.main["images"].items() if value is not None}))

    # Rows.

    @functools.cached_property
    def schema(self) -> pa.Schema:
        label = pa.list_(pa.field("element", pa.int32(), nullable=False)) if self.is_multi_label else pa.int32()
        return pa.schema(
            [
                pa.field("row", pa.int64(), nullable=False),
                pa.field("image_id", pa.string(), nullable=False),
                pa.field("sha256", pa.binary(32)),
                pa.field("split", pa.string(), nullable=False),
                pa.field("label", label),
                pa.field("uri", pa.string()),
                pa.field("removed", pa.bool_(), nullable=False),
            ]
        )

    def row(self, number: int) -> dict[str, Any]:
        """A row by its number: one block is read and checked."""
        for part in self.parts:
            if part["start"] <= number < part["start"] + part["n_rows"]:
                block, place = divmod(number - part["start"], self.block_rows)
                row: dict[str, Any] = self.block(part, block)[place]
                refuse_unless(row["row"] == number, f"row {number} says that it is row {row['row']}")
                return row
        raise Refused(f"no row {number}")

    def block(self, part: dict[str, Any], block: int) -> list[dict[str, Any]]:
        """The rows of a block, kept once it was read."""
        if (part["start"], block) not in self._blocks:
            self._blocks[part["start"], block] = self._read_block(part, block)
        return self._blocks[part["start"], block]

    def _read_block(self, part: dict[str, Any], block: int) -> list[dict[str, Any]]:
        begin, end = part["block_offsets"][block : block + 2]
        refuse_unless(0 <= begin < end <= part["size_bytes"], f"{part['file']}: block {block} lies outside")
        message = read_bytes(self.folder / part["file"], begin, end - begin)
        refuse_unless(crc32c(message) == part["block_crc32c"][block], f"{part['file']}: block {block} is damaged")
        batch = pa.ipc.read_record_batch(pa.ipc.read_message(pa.py_buffer(message)), self.schema)
        rows: list[dict[str, Any]] = batch.to_pylist()
        for row in rows:
            self._check_row(row)
        return rows

    def _check_row(self, row: dict[str, Any]) -> None:
        where = f"row {row['row']}"
        refuse_unless(SAFE_NAME.fullmatch(row["image_id"]) is not None, f"{where}: unsafe ID")
        gone = [row[name] is None for name in ("sha256", "uri", "label")]
        refuse_unless(all(gone) if row["removed"] else not any(gone[:2]), f"{where}: removed and not removed")
        if row["label"] is not None:
            labels = row["label"] if self.is_multi_label else [row["label"]]
            refuse_unless(labels == sorted(set(labels)), f"{where}: labels do not rise")
            refuse_unless(
                all(0 <= label < len(self.main["class_names"]) for label in labels), f"{where}: no such class"
            )
        if row["uri"] is not None:
            path = row["uri"].rpartition("#")[0] or row["uri"]
            refuse_unless(not path.startswith("/") and ".." not in path.split("/"), f"{where}: leads outside")

    def rows_of_shard(self, shard: int) -> int:
        """How many rows a shard has, from the index alone."""
        begin, end = shard * self.shard_size, (shard + 1) * self.shard_size
        return sum(max(0, min(part["start"] + part["n_rows"], end) - max(part["start"], begin)) for part in self.parts)

    # Commit records.

    def records(self, series: str) -> dict[int, dict[str, Any]]:
        """The commit record of each committed shard of a series."""
        if series not in self._records:
            self._records[series] = {}
            for record in self._all_records(series):
                shard = record["shard"]
                refuse_unless(record["modality"] == series, f"commits/{series}: of another series")
                refuse_unless(record["recipe_hash"] == self.recipe_hash(series), f"commits/{series}: another recipe")
                refuse_unless(
                    record["n_rows"] == self.rows_of_shard(shard) > 0, f"commits/{series}: shard {shard} has other rows"
                )
                other = self._records[series].setdefault(shard, record)
                refuse_unless(other["content_sum"] == record["content_sum"], f"commits/{series}: shard {shard} twice")
        return self._records[series]

    def _all_records(self, series: str) -> Iterator[dict[str, Any]]:
        folder = self.folder / "commits" / series
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.name.startswith("."):
                continue
            file = read_bytes(path)
            refuse_unless(path.stem.rpartition("-")[2] == sha256(file)[:16], f"{path} is damaged")
            if path.suffix == ".json":
                record = json.loads(file)
                refuse_unless(path.stem.split("-")[0].isdigit(), f"{path}: no such name")
                refuse_unless(int(path.stem.split("-")[0]) == record["shard"], f"{path}: of another shard")
                yield record
            else:
                refuse_unless(path.stem.startswith("consolidated-"), f"{path}: no such name")
                for columns in pyarrow.parquet.read_table(io.BytesIO(file)).to_pylist():
                    yield columns | json.loads(columns.pop("measured"))

    # Payloads.

    def latent(self, modality: str, number: int) -> np.ndarray:
        """What a reader gets of one sample."""
        return self.decoded(modality, self.numbers(modality, number))

    def decoded(self, modality: str, numbers: np.ndarray) -> np.ndarray:
        made = self.recipes[modality]["format"]
        if made["dtype"] == "bfloat16":
            return (numbers.astype("<u4") << 16).view("<f4")
        if made["dtype"] == "int8":
            of_channel = [1] * numbers.ndim
            of_channel[made["axes"].index("channel")] = -1
            scale, offset = (
                np.array(made["quantisation"][name], np.float32).reshape(of_channel) for name in ("scale", "offset")
            )
            return numbers.astype(np.float32) * scale + offset
        return numbers

    def numbers(self, modality: str, number: int) -> np.ndarray:
        """What lies on disk of one sample, checked."""
        made = self.recipes[modality]["format"]
        payload = self._payload(modality, number)
        if self.is_zarr:
            numbers = np.frombuffer(payload, ON_DISK[made["dtype"]]).reshape(made["shape"])
        else:
            refuse_unless(payload[:8] == b"\x93NUMPY\x01\x00", f"{modality} of row {number} is no .npy 1.0")
            numbers = np.load(io.BytesIO(payload), allow_pickle=False)
            refuse_unless(
                numbers.shape == tuple(made["shape"])
                and numbers.dtype == ON_DISK[made["dtype"]]
                and numbers.flags.c_contiguous
                and (len(payload) - numbers.nbytes) % 64 == 0,
                f"{modality} of row {number} has another form",
            )
        if made["kind"] == "codes":
            refuse_unless(bool(((numbers >= 0) & (numbers < made["vocabulary"])).all()), "a code is out of vocabulary")
        return numbers

    def image(self, number: int) -> bytes:
        payload = self._payload("images", number)
        encoding = self.main["images"]["encoding"]
        if encoding == "original":
            refuse_unless(
                hashlib.sha256(payload).digest() == self.row(number)["sha256"], f"row {number}: another image"
            )
        else:
            begins = {"jpeg": b"\xff\xd8", "raw": b"P6"}[encoding]
            refuse_unless(payload.startswith(begins), f"row {number}: not {encoding}")
        return payload

    def _payload(self, series: str, number: int) -> bytes:
        """One payload, read by its place alone."""
        refuse_unless(not self.row(number)["removed"], f"row {number} was removed")
        shard, place = divmod(number, self.shard_size)
        refuse_unless(shard in self.records(series), f"{series} of shard {shard} is not committed")
        record = self.records(series)[shard]
        edges = [self.place(series, shard, edge)[2] for edge in (0, record["n_rows"] - 1)]
        refuse_unless(edges == record["edge_crc32c"], f"{series}: the files of shard {shard} are those of another")
        offset, size, crc = self.place(series, shard, place)
        payload = read_bytes(self.files(series, shard)[0], offset, size)
        refuse_unless(crc32c(payload) == crc, f"{series} of row {number} is damaged")
        return payload

    def place(self, series: str, shard: int, place: int) -> tuple[int, int, int]:
        """Offset, size and CRC32C of a payload in the first file of its shard."""
        files = self.files(series, shard)
        size_bytes = sum(path.stat().st_size for path in files if path.is_file())
        refuse_unless(size_bytes == self.records(series)[shard]["size_bytes"], f"{files[0]} has another size")
        if len(files) == 1:
            made = self.recipes[series]["format"]
            size = int(np.prod(made["shape"])) * np.dtype(ON_DISK[made["dtype"]]).itemsize
            offset = place * (size + 4)
            return offset, size, struct.unpack("<I", read_bytes(files[0], offset + size, 4))[0]
        offset, size, crc = self.index(series, shard)[place].tolist()
        refuse_unless(offset + size <= files[0].stat().st_size, f"{files[1]} leads outside")
        return offset, size, crc

    def files(self, series: str, shard: int) -> list[Path]:
        """The files of a shard, in the order in which its record hashes them."""
        if not self.is_zarr:
            stem = self.folder / series / f"{series}-{shard:06d}"
            return [stem.with_suffix(".tar"), stem.with_suffix(".index")]
        if series == "images":
            return [self.folder / "images" / f"{shard:06d}{suffix}" for suffix in (".blob", ".index")]
        zeros = ["0"] * len(self.recipes[series]["format"]["shape"])
        return [self.folder / "latents" / series / ".".join(["c", str(shard), *zeros])]

    def index(self, series: str, shard: int) -> np.ndarray:
        path = self.files(series, shard)[1]
        file = read_bytes(path)
        refuse_unless(file[:8] == b"dlaindex", f"{path} is no index")
        refuse_unless(crc32c(file[:-4]) == struct.unpack("<I", file[-4:])[0], f"{path} is damaged")
        refuse_unless(len(file) == 12 + 20 * self.records(series)[shard]["n_rows"], f"{path} has other rows")
        return np.frombuffer(file[8:-4], INDEX_ENTRY)

    def is_current(self) -> bool:
        """Whether what was read still holds: no image was removed since."""
        now = open_store(self.folder)
        return now.parts[: len(self.parts)] == self.parts


def open_store(folder: Path) -> Store:
    """A store whose main file and index of rows hold; nothing else is read."""
    try:
        return _open_store(folder)
    except (KeyError, ValueError, TypeError, AttributeError, pa.ArrowException) as error:
        raise Refused(f"{folder}: {error!r}") from error


def _open_store(folder: Path) -> Store:
    is_zarr = (folder / "zarr.json").exists()
    main = (
        read_json(folder / "zarr.json").get("attributes", {}).get("dla") if is_zarr else read_json(folder / "dla.json")
    )
    refuse_unless(isinstance(main, dict), f"{folder} is no store of dla")
    requires = main.get("requires")
    known = isinstance(requires, list) and set(requires) <= {"modalities", "axes"}
    refuse_unless(main.get("format") == "v1" and known, f"{folder} needs a newer reader")
    others = {name: value for name, value in main.items() if name != "sha256"}
    refuse_unless(main.get("sha256") == sha256(canonical_json(others)), f"the main file of {folder} is damaged")
    refuse_unless(main.get("layout") == (None if is_zarr else "webdataset"), f"{folder} is of another layout")
    refuse_unless(1 <= main["shard_size"] <= 1_000_000, f"{folder}: shard size")
    names = MORE_MODALITIES if "modalities" in requires else MODALITIES
    known = all(names.fullmatch(name) and len(name) <= 48 for name in main["recipes"])
    refuse_unless(known, f"{folder}: modalities that it does not say it requires")
    file = read_bytes(folder / "rows" / f"index-{main['rows_sha256'][:16]}.parquet")
    refuse_unless(sha256(file) == main["rows_sha256"], f"the index of rows of {folder} is damaged")
    index = pyarrow.parquet.read_table(io.BytesIO(file))
    said = json.loads(index.schema.metadata[b"dla"])
    parts = index.to_pylist()
    end = 0
    for part in parts:
        named = PART_NAME.fullmatch(part["file"])
        refuse_unless(named is not None, f"{part['file']} is no name of a part")
        assert named is not None
        refuse_unless(
            int(named[1]) == part["start"] and named[2] == part["sha256"][:16], f"{part['file']}: another's name"
        )
        refuse_unless(
            part["start"] in (end, -(-end // main["shard_size"]) * main["shard_size"]), f"{part['file']}: an odd gap"
        )
        n_blocks = -(-part["n_rows"] // said["block_rows"])
        lengths = [len(part[name]) for name in ("block_crc32c", "block_splits", "block_offsets")]
        refuse_unless(lengths == [n_blocks, n_blocks, n_blocks + 1], f"{part['file']}: number of blocks")
        end = part["start"] + part["n_rows"]
    recipes = {
        modality: _recipe(folder, main, modality, end) if is_zarr else main["recipes"][modality]
        for modality in main["recipes"]
    }
    dtypes = {recipe["format"]["dtype"] for recipe in recipes.values()}
    refuse_unless(dtypes <= set(ON_DISK), f"{folder}: dtypes that no reader of v1 knows")
    return Store(folder, is_zarr, main, recipes, parts, said["block_rows"], said["is_multi_label"])


def _recipe(folder: Path, main: dict[str, Any], modality: str, n_rows: int) -> dict[str, Any]:
    """The recipe of a modality from its Zarr array, which must be as the page says."""
    array = read_json(folder / "latents" / modality / "zarr.json")
    recipe: dict[str, Any] = array["attributes"]["dla"]["recipe"]
    hashes = {sha256(canonical_json(recipe)), array["attributes"]["dla"]["recipe_hash"], main["recipes"][modality]}
    refuse_unless(len(hashes) == 1, f"the recipe of {modality} is another")
    shape, (codec,) = recipe["format"]["shape"], array["codecs"]
    refuse_unless(array["shape"] == [n_rows, *shape], f"{modality}: shape of the array")
    refuse_unless(
        array["chunk_grid"]["configuration"]["chunk_shape"] == [main["shard_size"], *shape], f"{modality}: shards"
    )
    refuse_unless(codec["name"] == "sharding_indexed", f"{modality}: codec")
    inner = codec["configuration"]
    refuse_unless(inner["chunk_shape"] == [1, *shape] and inner["index_location"] == "end", f"{modality}: inner chunks")
    refuse_unless([codec["name"] for codec in inner["codecs"]] == ["bytes", "crc32c"], f"{modality}: inner codecs")
    on_disk = np.dtype(array["data_type"]).newbyteorder("<")
    refuse_unless(on_disk == np.dtype(ON_DISK[recipe["format"]["dtype"]]), f"{modality}: data type")
    return recipe
