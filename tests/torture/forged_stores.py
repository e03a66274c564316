"""Stores that lead out of their folder, never end, or ask for ten terabytes, their seals intact."""

import os
from collections.abc import Callable
from pathlib import Path

from tests.torture.bad_stores import BadStore, depth_folder, one_record, replaced, shard, with_records, with_settings
from tests.torture.forgery import (
    edit_index,
    edit_json,
    edit_recipe,
    edit_records,
    edit_settings,
    main_file,
    rename_member,
    row_part,
    shard_files,
)

HUGE = 10**13


def _latent_shape(*shape: int) -> Callable[[Path, Path], object]:
    return lambda store, _: edit_recipe(
        store, "depth", lambda recipe: recipe["format"].update(shape=list(shape), axes=["channel", "height", "width"])
    )


def _one_huge_shard(store: Path, _outside: Path) -> None:
    edit_settings(store, lambda settings: settings.update(shard_size=HUGE))
    for series in ("depth", "audio", "images"):
        for other in range(1, 5):
            for file in shard_files(store, series, other):
                file.unlink()
        edit_records(store, series, lambda record: record.update(n_rows=24) if record["shard"] == 0 else None)
        for file in (store / "commits" / series).glob("[1-9]-*.json"):
            file.unlink()


def _link_out(find: Callable[[Path], Path]) -> Callable[[Path, Path], object]:
    """Moves a part of the store out and leaves a link to it."""

    def spoil(store: Path, outside: Path) -> None:
        part = find(store)
        part.rename(outside / part.name)
        part.symlink_to(outside / part.name)

    return spoil


def _link_to_victim(find: Callable[[Path], Path]) -> Callable[[Path, Path], object]:
    """A link, where the next write puts its temporary file, to a file that is none of ours; one shard is gone."""

    def spoil(store: Path, outside: Path) -> None:
        (outside / "precious").write_text("nobody may touch this\n")
        find(store).symlink_to(outside / "precious")
        edit_records(store, "depth", lambda _: None)
        next((store / "commits" / "depth").glob("1-*.json")).unlink()
        shard(store).unlink()

    return spoil


LINKS = [
    BadStore("leads out", "a shard", _link_out(shard)),
    BadStore("leads out", "the folder of depth", _link_out(depth_folder)),
    BadStore("leads out", "the records of depth", _link_out(lambda store: store / "commits" / "depth")),
    BadStore("leads out", "the row table", _link_out(row_part)),
    BadStore("leads out", "the main file", _link_out(main_file)),
    BadStore(
        "leads out",
        "where a shard's temporary file goes",
        _link_to_victim(lambda store: shard(store).with_name(f".{shard(store).name}.tmp")),
    ),
    BadStore(
        "leads out",
        "where a record's temporary file goes",
        _link_to_victim(lambda store: store / "commits" / "depth" / ".1.json.tmp"),
    ),
    BadStore(
        "leads out", "where the card's temporary file goes", _link_to_victim(lambda store: store / ".README.md.tmp")
    ),
    BadStore(
        "leads out",
        "the name of a modality",
        lambda store, _: edit_settings(
            store, lambda settings: settings["recipes"].update({"../../outside": settings["recipes"]["depth"]})
        ),
        must_be_refused=True,
    ),
    BadStore(
        "leads out",
        "the name of a tar's member",
        lambda store, _: rename_member(store, "depth", 1, "../../outside/evil.depth.npy"),
        layouts=("webdataset",),
    ),
    BadStore(
        "leads out",
        "a member that is a link",
        lambda store, _: rename_member(store, "depth", 1, "image-5.depth.npy", b"2"),
        layouts=("webdataset",),
    ),
    BadStore("never ends", "a shard that is a pipe", replaced(shard, os.mkfifo)),
    BadStore("never ends", "a record that is a pipe", replaced(one_record, os.mkfifo)),
    BadStore(
        "never ends",
        "a row table that is a pipe",
        replaced(row_part, os.mkfifo),
        must_be_refused=True,
    ),
    BadStore("never ends", "a shard that is /dev/zero", replaced(shard, lambda path: path.symlink_to("/dev/zero"))),
    BadStore(
        "never ends",
        "a row table that is /dev/zero",
        replaced(row_part, lambda path: path.symlink_to("/dev/zero")),
        must_be_refused=True,
    ),
]

TERABYTES = [
    BadStore(
        "10 TB",
        "an array of 10^13 rows",
        lambda store, _: edit_json(
            store / "latents/depth/zarr.json", lambda array: array.update(shape=[HUGE, 4, 2, 2])
        ),
        layouts=("zarr",),
    ),
    BadStore("10 TB", "shards of 10^13 rows", with_settings(shard_size=HUGE)),
    BadStore("10 TB", "shards of 10^13 rows, and records to match", _one_huge_shard),
    BadStore("10 TB", "shards of 10^400 rows", with_settings(shard_size=10**400)),
    BadStore("10 TB", "shards of no row", with_settings(shard_size=0), must_be_refused=True),
    BadStore("10 TB", "shards of -5 rows", with_settings(shard_size=-5), must_be_refused=True),
    BadStore("10 TB", "shards of 5.5 rows", with_settings(shard_size=5.5), must_be_refused=True),
    BadStore("10 TB", "shards of `5` rows", with_settings(shard_size="5"), must_be_refused=True),
    BadStore("10 TB", "latents of 10 TB", _latent_shape(10**4, 10**5, 5000)),
    BadStore("10 TB", "latents of more bytes than int64 counts", _latent_shape(2**40, 2**40, 2**40)),
    BadStore("10 TB", "a record of 10^13 rows", with_records(n_rows=HUGE)),
    BadStore("10 TB", "a record of 10^13 bytes", with_records(size_bytes=HUGE)),
    BadStore(
        "10 TB", "an index with an image of 10^13 bytes", lambda store, _: edit_index(store, "images", 1, 2, 0, HUGE)
    ),
    BadStore("10 TB", "an index that wraps round", lambda store, _: edit_index(store, "images", 1, 2, 2**64 - 8, 16)),
    BadStore("10 TB", "an index with an offset of 2^63", lambda store, _: edit_index(store, "images", 1, 2, 2**63, 0)),
]
