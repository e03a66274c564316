"""Folders that are no store, or one that somebody has broken or forged."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.torture.forgery import (
    edit_recipe,
    edit_records,
    edit_settings,
    main_file,
    row_part,
    shard_files,
)


@dataclass(frozen=True, slots=True)
class BadStore:
    """What is done to a copy of a good store; `outside` is a folder beside it that nothing may change."""

    kind: str
    name: str
    spoil: Callable[[Path, Path], object]
    must_be_refused: bool = False
    """By every door: not ours, or nothing that anybody could read."""
    is_harmless: bool = False
    """It is whole all the same: `verify` need not say anything."""
    layouts: tuple[str, ...] = ("zarr", "webdataset")


def depth_folder(store: Path) -> Path:
    return shard_files(store, "depth", 0)[0].parent


def shard(store: Path, series: str = "depth") -> Path:
    return shard_files(store, series, 1)[0]


def emptied(make: Callable[[Path], object]) -> Callable[[Path, Path], object]:
    """A spoiler that takes all away first."""

    def spoil(store: Path, _outside: Path) -> None:
        shutil.rmtree(store)
        make(store)

    return spoil


def _zarr_group(path: Path) -> None:
    array = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [4],
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "attributes": {},
    }
    (path / "latents").mkdir(parents=True)
    (path / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"mine": 1}}))
    (path / "latents" / "zarr.json").write_text(json.dumps(array))
    (path / "latents" / "c").mkdir()
    (path / "latents" / "c" / "0").write_bytes(bytes(16))


def _tars(path: Path) -> None:
    (path / "depth").mkdir(parents=True)
    for number in range(3):
        (path / "depth" / f"depth-{number:06d}.tar").write_bytes(bytes(1024))
        (path / f"{number:05d}.tar").write_bytes(bytes(1024))


def _text(text: str) -> Callable[[Path, Path], object]:
    return lambda store, _: main_file(store).write_text(text)


def with_settings(**changes: object) -> Callable[[Path, Path], object]:
    return lambda store, _: edit_settings(store, lambda settings: settings.update(changes))


def with_records(**changes: object) -> Callable[[Path, Path], object]:
    return lambda store, _: edit_records(store, "depth", lambda record: record.update(changes))


def replaced(find: Callable[[Path], Path], make: Callable[[Path], object]) -> Callable[[Path, Path], object]:
    def spoil(store: Path, _outside: Path) -> None:
        path = find(store)
        path.unlink()
        make(path)

    return spoil


def one_record(store: Path) -> Path:
    return sorted((store / "commits" / "depth").iterdir())[0]


FOREIGN = [
    BadStore("foreign", "a plain Zarr group", emptied(_zarr_group), must_be_refused=True),
    BadStore("foreign", "a folder of tars", emptied(_tars), must_be_refused=True),
    BadStore("foreign", "a file", emptied(lambda path: path.write_text("no store")), must_be_refused=True),
    BadStore(
        "foreign",
        "the main files of both layouts",
        lambda store, _: [(store / name).touch() for name in ("zarr.json", "dla.json")],
        must_be_refused=True,
    ),
    BadStore(
        "foreign",
        "attributes `dla` of another program",
        lambda store, _: main_file(store).write_text('{"attributes": {"dla": "yes"}, "format": []}'),
        must_be_refused=True,
    ),
    BadStore("foreign", "a list as main file", _text("[1, 2]"), must_be_refused=True),
    BadStore("foreign", "a main file of 100,000 brackets", _text("[" * 100_000), must_be_refused=True),
    BadStore("foreign", "a number of 10,000 digits", _text('{"format": ' + "9" * 10_000 + "}"), must_be_refused=True),
    BadStore("newer", "format 3", with_settings(format=3), must_be_refused=True),
    BadStore("newer", "format `2.1`", with_settings(format="2.1"), must_be_refused=True),
    BadStore(
        "newer",
        "no format",
        lambda store, _: edit_settings(store, lambda settings: settings.pop("format")),
        must_be_refused=True,
    ),
    BadStore("newer", "images as `avif`", with_settings(images="avif"), must_be_refused=True),
    BadStore(
        "newer",
        "a recipe with a field more",
        lambda store, _: edit_recipe(store, "depth", lambda recipe: recipe.update(colour="red")),
        must_be_refused=True,
    ),
    BadStore(
        "newer",
        "a modality that nobody knows",
        lambda store, _: edit_settings(
            store, lambda settings: settings["recipes"].update(lidar=settings["recipes"]["depth"])
        ),
        must_be_refused=True,
    ),
]

HALF = [
    BadStore("half-written", "no main file", lambda store, _: main_file(store).unlink(), must_be_refused=True),
    BadStore("half-written", "an empty main file", _text(""), must_be_refused=True),
    BadStore("half-written", "no row table", lambda store, _: row_part(store).unlink(), must_be_refused=True),
    BadStore(
        "half-written",
        "an empty row table",
        replaced(row_part, Path.touch),
        must_be_refused=True,
    ),
    BadStore("half-written", "no commit records", lambda store, _: shutil.rmtree(store / "commits")),
    BadStore("half-written", "no commit records of depth", lambda store, _: shutil.rmtree(store / "commits" / "depth")),
    BadStore("half-written", "an empty commit record", replaced(one_record, Path.touch)),
    BadStore("half-written", "no folder of depth", lambda store, _: shutil.rmtree(depth_folder(store))),
    BadStore("half-written", "a shard gone", lambda store, _: shard(store).unlink()),
    BadStore("half-written", "a shard empty", replaced(shard, Path.touch)),
    BadStore("half-written", "an index gone", lambda store, _: shard_files(store, "images", 1)[1].unlink()),
    BadStore("half-written", "a record of a shard that is not planned", with_records(shard=77)),
    BadStore("half-written", "an empty removal plan", lambda store, _: (store / "takedown.json").touch()),
    BadStore(
        "half-written",
        "a removal plan of other things",
        lambda store, _: (store / "takedown.json").write_text('{"removed": 7}'),
    ),
    BadStore(
        "half-written",
        "leftovers of killed writers",
        lambda store, _: [(path / ".0.json.tmp").touch() for path in (store / "commits").iterdir()],
        is_harmless=True,
    ),
]
