"""A store from which images were taken is built on like any other, and none of them comes back."""

import fcntl
import functools
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import dla_cache
from dla_cache.build import BuildProgress, build_cache
from dla_cache.errors import RecipeMismatchError, StoreError, WorkInterrupted
from dla_cache.images import decode_image
from dla_cache.manifest import Manifest, write_manifest
from dla_cache.sources.seeding import sample_seed
from dla_cache.spec import CacheSpec, LatentSpec, Modality
from dla_cache.store import LatentStore, open_store
from dla_cache.store.exchange import convert_store
from dla_cache.store.metadata import unchanged_rows
from dla_cache.takedown import take_down
from dla_cache.verify import verify_store

SCRIPT = Path(__file__).with_name("build_process.py")

N_IMAGES = 12
"""Three shards, of 5, 5 and 2."""

DOOMED = ("image-1", "image-7", "image-10", "image-11")
"""One of the first shard, one of the second, and the whole short tail."""


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is played here, and there are many builds."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


@pytest.fixture
def images(tmp_path: Path, made: SimpleNamespace) -> Manifest:
    return made.manifest(tmp_path / "data", N_IMAGES)


@pytest.fixture
def whole(spec: CacheSpec) -> CacheSpec:
    """Depth, and the images' own bytes."""
    return spec.model_copy(update={"images": "original"})


@pytest.fixture
def build(tmp_path: Path, images: Manifest, whole: CacheSpec, open_source: Callable) -> Callable:
    """Builds a store of these images, `s` unless another name is given, again and again."""

    def run(name: str = "s", manifest: Manifest = images, spec: CacheSpec = whole, **options: object) -> object:
        return build_cache(manifest, spec, tmp_path / name, **{"open_source": open_source, "batch_size": 2, **options})

    return run


@pytest.fixture
def begin(build: Callable) -> Callable:
    """Builds until so many batches are through, of latents and images by turns: 5 make a shard, 12 the whole store."""

    def run(steps: int, **options: object) -> None:
        seen: list[BuildProgress] = []
        with suppress(WorkInterrupted):
            build(on_progress=seen.append, should_stop=lambda: len(seen) == steps, **options)

    return run


def without(manifest: Manifest, image_ids: Sequence[str]) -> Manifest:
    """A manifest made anew, without some images."""
    rows = [row for row in manifest.rows() if row.image_id not in image_ids]
    return write_manifest(manifest.root / "anew.parquet", rows, manifest.class_names)


def contents_of(path: Path) -> dict[str, bytes]:
    """Row table and shards; records tell the time of a computation."""
    store = open_store(path)
    files = [*store.path.glob("rows/*")]
    files += [
        file for series in store.series for shard in store.shards for file in store.shard_files(series, shard.index)
    ]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def check_is_without(path: Path, payloads: Sequence[bytes]) -> None:
    assert verify_store(open_store(path)).problems == ()
    found = [file.name for file in path.rglob("*") if file.is_file() for bit in payloads if bit in file.read_bytes()]
    assert found == []


def payloads_of(images: Manifest, source: object, image_ids: Sequence[str]) -> list[bytes]:
    """The files of some images, and their latents as `depth` of a store."""
    payloads = []
    for row in images.rows():
        if row.image_id in image_ids:
            content = images.path_of(row.uri).read_bytes()
            pixels = decode_image(content, row.image_id)[None]
            latent = source.encode(pixels, [sample_seed(0, "depth", row.image_id)])[0]
            payloads += [content, latent.astype(np.float16).tobytes()]
    return payloads


@pytest.fixture
def doomed_payloads(images: Manifest, whole: CacheSpec, open_source: Callable) -> list[bytes]:
    return payloads_of(images, open_source(whole.latents[0], "cpu"), DOOMED)


@pytest.mark.parametrize("seed", range(4))
def test_removals_at_any_moments_of_a_build_end_as_those_of_a_finished_store(
    tmp_path: Path,
    images: Manifest,
    build: Callable,
    begin: Callable,
    seed: int,
) -> None:
    rng = random.Random(seed)
    removed: set[str] = set()
    for _ in range(rng.randint(1, 3)):
        begin(rng.randint(1, 11))
        some = rng.sample(images.image_ids, rng.randint(1, 4))
        take_down([tmp_path / "s"], some)
        removed.update(some)
    report = build(manifest=rng.choice([images, without(images, removed)]))
    build("finished")
    (expected,) = take_down([tmp_path / "finished"], sorted(removed))
    assert report.content_hash == expected.content_hash
    assert contents_of(tmp_path / "s") == contents_of(tmp_path / "finished")
    found = verify_store(open_store(tmp_path / "s"), images)
    assert (found.problems, found.n_removed, found.n_images) == ((), len(removed), N_IMAGES - len(removed))


def test_removed_images_are_counted_and_neither_opened_nor_encoded(
    tmp_path: Path, images: Manifest, build: Callable, begin: Callable, open_source: Callable
) -> None:
    encoded = []

    class Watched(open_source):
        def encode(self, pixels: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
            encoded.append(len(seeds))
            return super().encode(pixels, seeds)

    begin(5)
    take_down([tmp_path / "s"], DOOMED)
    for row in images.rows():
        if row.image_id in DOOMED:
            images.path_of(row.uri).unlink()
    report = build(open_source=Watched)
    assert sum(encoded) == report.images_encoded == 4
    assert report.images_stored == report.n_images == 8
    assert report.images_left_out == 4


def test_a_manifest_may_list_removed_images_or_not(tmp_path: Path, images: Manifest, build: Callable) -> None:
    build()
    (removal,) = take_down([tmp_path / "s"], DOOMED)
    for gone, left_out in (((), 4), (DOOMED[:2], 2), (DOOMED, 0)):
        report = build(manifest=without(images, gone))
        assert (report.content_hash, report.images_left_out) == (removal.content_hash, left_out)


@pytest.mark.parametrize(
    ("alter", "fault"),
    [
        (lambda rows: [replace(rows[0], split="test"), *rows[1:]], "image `image-0`: `split` `train` → `test`"),
        (lambda rows: [*rows[:2], *rows[3:]], "`8` images → `7`"),
        (lambda rows: [*rows, replace(rows[1], image_id="again")], "`8` images → `9`"),
        (lambda rows: [replace(row, image_id="again") if row.image_id == "image-1" else row for row in rows], "→ `9`"),
        (lambda rows: rows[::-1], "row 0 is `image-0` → "),
    ],
    ids=["another split", "one missing", "removed bytes under another ID", "renamed", "another order"],
)
def test_all_others_must_be_as_they_were(
    tmp_path: Path, images: Manifest, build: Callable, alter: Callable, fault: str
) -> None:
    build()
    take_down([tmp_path / "s"], DOOMED)
    rows = alter(list(images.rows()))
    other = write_manifest(images.root / "other.parquet", rows, images.class_names)
    with pytest.raises(RecipeMismatchError, match=rf"another spec, source or manifest: row table: .*{fault}"):
        build(manifest=other)


def test_a_modality_and_the_images_are_added_without_those_removed(
    tmp_path: Path, build: Callable, spec: CacheSpec, whole: CacheSpec, doomed_payloads: list[bytes]
) -> None:
    build(spec=spec)
    take_down([tmp_path / "s"], DOOMED)
    both = (*spec.latents, LatentSpec(modality=Modality.AUDIO, source="pixels"))
    report = build(spec=whole.model_copy(update={"latents": both}))
    assert (report.images_encoded, report.images_stored) == (8, 8)
    build("finished", spec=whole.model_copy(update={"latents": both}))
    take_down([tmp_path / "finished"], DOOMED)
    assert contents_of(tmp_path / "s") == contents_of(tmp_path / "finished")
    check_is_without(tmp_path / "s", doomed_payloads)


def test_damaged_shards_are_made_again_without_those_removed(
    tmp_path: Path, build: Callable, doomed_payloads: list[bytes]
) -> None:
    build()
    (removal,) = take_down([tmp_path / "s"], DOOMED)
    before = contents_of(tmp_path / "s")
    store = open_store(tmp_path / "s")
    for series in store.series:
        for shard in store.shards:
            store.shard_path(series, shard.index).write_bytes(b"spoilt")
    report = build(repair=True)
    assert (report.shards_repaired, report.shards_changed, report.content_hash) == (6, (), removal.content_hash)
    assert contents_of(tmp_path / "s") == before
    check_is_without(tmp_path / "s", doomed_payloads)


def test_a_removal_that_met_a_damaged_shard_goes_on_after_a_repair(
    tmp_path: Path, build: Callable, doomed_payloads: list[bytes]
) -> None:
    build()
    open_store(tmp_path / "s").shard_path("depth", 1).write_bytes(b"spoilt")
    with pytest.raises(StoreError, match=r"(?s)cannot be written anew.*--repair"):
        take_down([tmp_path / "s"], DOOMED)
    with pytest.raises(StoreError, match="images are being removed"):
        build()
    assert build(repair=True).shards_changed == ()
    (report,) = take_down([tmp_path / "s"], [])
    assert report.content_hash == build().content_hash
    check_is_without(tmp_path / "s", doomed_payloads)


def test_nothing_is_written_by_a_row_table_of_before_a_removal(
    tmp_path: Path, images: Manifest, build: Callable, begin: Callable, doomed_payloads: list[bytes]
) -> None:
    build("other")
    other = open_store(tmp_path / "other")
    begin(5)
    late: LatentStore = open_store(tmp_path / "s")
    take_down([tmp_path / "s"], DOOMED)
    records = late.committed("depth")
    for shard in late.shards:
        rows = np.arange(shard.start, shard.stop)
        with pytest.raises(StoreError, match=r"(?s)images were removed .*hint: (run the same command|open it) again"):
            late.write_shard("depth", shard, other.read("depth", rows), seconds=0, device="cpu")
        with pytest.raises(StoreError, match="images were removed"):
            late.write_images(shard, other.read_images(rows), seconds=0)
    with pytest.raises(StoreError, match="images were removed"):
        late.withdraw("depth", records)
    assert open_store(tmp_path / "s").committed("depth") == records
    build()
    check_is_without(tmp_path / "s", doomed_payloads)


def test_nothing_is_written_by_it_where_the_removal_was_killed(
    tmp_path: Path,
    build: Callable,
    begin: Callable,
    dies_before: Callable,
    doomed_payloads: list[bytes],
) -> None:
    build("other")
    latents = open_store(tmp_path / "other").read("depth", np.arange(5, 10))
    begin(5)
    outcomes = []
    for deaths in range(1, 12, 2):
        path = tmp_path / f"killed-at-{deaths}"
        shutil.copytree(tmp_path / "s", path)
        late = open_store(path)
        before = late.metadata.rows_sha256
        assert dies_before(deaths, functools.partial(take_down, [path], DOOMED))
        is_refused = open_store(path).metadata.rows_sha256 != before
        outcomes.append(is_refused)
        with pytest.raises(StoreError, match="images were removed") if is_refused else nullcontext():
            late.write_shard("depth", late.shards[1], latents, seconds=0, device="cpu")
        take_down([path], DOOMED)
        build(path.name)
        check_is_without(path, doomed_payloads)
    assert set(outcomes) == {False, True}


def test_a_build_whose_images_are_removed_at_its_very_end_says_so(tmp_path: Path, build: Callable) -> None:
    def remove(progress: BuildProgress) -> None:
        if progress.images_done == progress.images_total:
            take_down([tmp_path / "s"], DOOMED)

    with pytest.raises(StoreError, match="images were removed"):
        build(on_progress=remove)
    assert build().content_hash == open_store(tmp_path / "s").content_hash()
    assert "of 8 images" in (tmp_path / "s" / "README.md").read_text()


def is_locked(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def test_a_removal_waits_for_who_writes_and_who_comes_then_waits_for_it(tmp_path: Path, build: Callable) -> None:
    build()
    store = open_store(tmp_path / "s")
    refused = []

    def write_late() -> None:
        try:
            with unchanged_rows(store.path, store.metadata):
                pass
        except StoreError as error:
            refused.append(error.message)

    removal = threading.Thread(target=take_down, args=([store.path], DOOMED))
    late = threading.Thread(target=write_late)
    with unchanged_rows(store.path, store.metadata):
        removal.start()
        while not is_locked(store.path):
            assert removal.is_alive()
        late.start()
        late.join(0.1)
        assert removal.is_alive()
        assert late.is_alive()
        assert open_store(store.path).rows.removed_ids == frozenset()
    removal.join()
    late.join()
    assert open_store(store.path).rows.removed_ids == frozenset(DOOMED)
    assert len(refused) == 1


def test_who_writes_keeps_nobody_from_beginning(tmp_path: Path, build: Callable) -> None:
    build()
    store = open_store(tmp_path / "s")
    with unchanged_rows(store.path, store.metadata):
        build()


def test_a_process_that_builds_meanwhile_is_refused_and_goes_on_without_them(
    tmp_path: Path,
    images: Manifest,
    build: Callable,
    spec: CacheSpec,
    open_source: Callable,
    layout: str,
    doomed_payloads: list[bytes],
) -> None:
    arguments = [images.root / "manifest.parquet", tmp_path / "s", 0.6, 0, 1, layout]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(dla_cache.__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.glob("s/commits/depth/*.json")):
        assert process.poll() is None, process.stderr.read()
    take_down([tmp_path / "s"], DOOMED)
    _, errors = process.communicate(timeout=60)
    assert "images were removed" in errors.splitlines()[-2]
    assert process.returncode == 1
    assert len(open_store(tmp_path / "s").committed("depth")) == 1
    build(spec=spec)
    check_is_without(tmp_path / "s", doomed_payloads)


def test_a_conversion_does_not_bring_them_back(tmp_path: Path, build: Callable, layout: str) -> None:
    build()
    source = open_store(tmp_path / "s")
    convert_store(source, tmp_path / "t", layout)
    take_down([tmp_path / "t"], ["image-7"])
    with pytest.raises(RecipeMismatchError, match=r"(?s)1 images were removed .*`image-7`.*dla cache takedown"):
        convert_store(source, tmp_path / "t", layout)
    take_down([tmp_path / "s"], ["image-7"])
    assert convert_store(open_store(tmp_path / "s"), tmp_path / "t", layout).shards_written == 0
