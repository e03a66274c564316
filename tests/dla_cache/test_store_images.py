"""Image bytes in a store: as they were, checked, and in no way part of what the latents are."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dla_cache.build import BuildReport, build_cache
from dla_cache.describe import describe_image, describe_store
from dla_cache.errors import CorruptShardError, ImageError, IncompleteBuildError, MissingLatentError
from dla_cache.images import decode_image
from dla_cache.manifest import Manifest, ManifestRow, write_manifest
from dla_cache.pairs import PairStream
from dla_cache.spec import ORIGINAL_IMAGES, CacheSpec
from dla_cache.store import open_store
from dla_cache.store.rows import RowTable
from dla_cache.verify import verify_store


@pytest.fixture
def with_images(spec: CacheSpec) -> CacheSpec:
    return spec.model_copy(update={"images": "original"})


@pytest.fixture
def build(tmp_path: Path, manifest: Manifest, with_images: CacheSpec, open_source: Callable) -> Callable:
    """Builds the same store of 23 images in five shards, again and again."""

    def run(**options: object) -> BuildReport:
        return build_cache(manifest, with_images, tmp_path / "s", open_source=open_source, **options)

    return run


def files_of(manifest: Manifest) -> list[bytes]:
    return [manifest.path_of(row.uri).read_bytes() for row in manifest.rows()]


def test_images_in_any_order_read_as_their_files(tmp_path: Path, manifest: Manifest, build: Callable) -> None:
    report = build()
    assert (report.images_encoded, report.images_stored, report.shards_committed) == (23, 23, 10)
    store = open_store(tmp_path / "s")
    files = files_of(manifest)
    rows = [22, 3, 3, 0, 17, 4]
    assert store.read_images(np.array(rows)) == [files[row] for row in rows]
    assert store.has_images
    assert (store.modalities, store.series) == (("depth",), ("depth", "images"))
    assert verify_store(store, manifest).problems == ()
    assert store.committed("images")[0].statistics == {}


def test_the_content_hash_is_that_of_a_store_without_images(
    tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable, build: Callable
) -> None:
    bare = build_cache(manifest, spec, tmp_path / "bare", open_source=open_source)
    assert build().content_hash == bare.content_hash
    assert not open_store(tmp_path / "bare").has_images


def test_images_join_a_store_and_stay_when_the_spec_no_longer_asks(
    tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable, build: Callable
) -> None:
    build_cache(manifest, spec, tmp_path / "s", open_source=open_source)
    joined = build()
    assert (joined.images_encoded, joined.images_stored) == (0, 23)
    build_cache(manifest, spec, tmp_path / "s", open_source=open_source)
    assert open_store(tmp_path / "s").read_images(np.arange(23)) == files_of(manifest)


def test_images_are_copied_without_being_decoded(
    tmp_path: Path, made: SimpleNamespace, with_images: CacheSpec, open_source: Callable
) -> None:
    manifest = made.manifest(tmp_path / "few", 3)
    store = made.create(tmp_path / "s", RowTable.from_manifest(manifest), [], 5, {}, images=ORIGINAL_IMAGES)
    files = files_of(manifest)
    with pytest.raises(ImageError, match=r"`image-1`\nhint: "):
        store.write_images(store.shards[0], [files[0], files[1] + b"x", files[2]], seconds=0)
    assert store.missing("images") == [0]
    # No PNG decoder would take these.
    broken = [file[:40] for file in files]
    rows = [
        ManifestRow(f"image-{n}", f"{n}.png", None, "train", made.sha256_of_bytes(broken[n]), 8, 8) for n in range(3)
    ]
    damaged = write_manifest(tmp_path / "damaged.parquet", rows, [])
    store = made.create(tmp_path / "t", RowTable.from_manifest(damaged), [], 5, {}, images=ORIGINAL_IMAGES)
    store.write_images(store.shards[0], broken, seconds=0)
    assert store.read_images(np.arange(3)) == broken


def test_a_flipped_bit_in_any_image_is_noticed_and_named(tmp_path: Path, manifest: Manifest, build: Callable) -> None:
    build()
    path = open_store(tmp_path / "s").shard_path("images", 1)
    content = path.read_bytes()
    for row, file in list(enumerate(files_of(manifest)))[5:10]:
        for place in (0, len(file) // 2, len(file) - 1):
            flipped = bytearray(content)
            flipped[content.index(file) + place] ^= 1
            path.write_bytes(flipped)
            store = open_store(tmp_path / "s")
            with pytest.raises(CorruptShardError, match=f"shard 1 of `images` is damaged at `image-{row}`"):
                store.read_images(np.arange(23))
            (problem,) = verify_store(store).problems
            assert problem.where == "images, shard 1"
            assert f"`image-{row}`" in problem.what


def test_another_image_under_an_id_is_noticed_by_verify_and_cannot_be_written(
    tmp_path: Path, manifest: Manifest, build: Callable
) -> None:
    build()
    store = open_store(tmp_path / "s")
    files = files_of(manifest)[5:10]
    swapped = [files[1], files[0], *files[2:]]
    for path, content in zip(
        store.shard_files("images", 1),
        store.layout_of("images").encode(store.rows.image_ids[5:10], swapped),
        strict=True,
    ):
        path.write_bytes(content)
    with pytest.raises(ImageError, match="not the files of the row table: `image-5`, `image-6`"):
        store.write_images(store.shards[1], swapped, seconds=0)
    assert "images, shard 1: 2 images do not have the sha256 of their row: `image-5`, `image-6`" in [
        f"{problem.where}: {problem.what}" for problem in verify_store(store).problems
    ]


@pytest.mark.parametrize("file", [0, 1])
def test_a_lost_file_of_images_is_noticed_and_repaired(
    tmp_path: Path, manifest: Manifest, build: Callable, file: int
) -> None:
    build()
    open_store(tmp_path / "s").shard_files("images", 3)[file].unlink()
    with pytest.raises(CorruptShardError, match=r"1 committed shards of `images`[\s\S]*--repair"):
        build()
    assert (build(repair=True).shards_repaired, build().shards_committed) == (1, 0)
    assert verify_store(open_store(tmp_path / "s"), manifest).problems == ()


def test_status_counts_images_apart_from_modalities(tmp_path: Path, layout: str, build: Callable) -> None:
    build(rank=0, world_size=2)
    state = describe_store(open_store(tmp_path / "s"))
    assert [part.modality for part in state.modalities] == ["depth"]
    assert (state.layout, state.image_bytes.images, state.image_bytes.shards_missing) == (layout, 13, (1, 3))
    assert build(rank=1, world_size=2).shards_missing == 0


def test_an_image_tells_the_size_of_its_file(tmp_path: Path, manifest: Manifest, build: Callable) -> None:
    build()
    assert describe_image(open_store(tmp_path / "s"), "image-7").image_bytes == len(files_of(manifest)[7])


def test_a_stream_needs_no_image_folder_where_the_store_has_the_images(
    tmp_path: Path, manifest: Manifest, build: Callable
) -> None:
    build()
    store = open_store(tmp_path / "s")
    settings = {"splits": ["train", "test"], "batch_size": 4, "seed": 0, "decode": decode_image}
    from_folder = list(PairStream(store, manifest.root, **settings).epoch_once())
    shutil.rmtree(manifest.root / "images")
    (tmp_path / "s").rename(tmp_path / "moved")
    for keep in (0, 2**30):
        moved = PairStream(open_store(tmp_path / "moved"), None, keep_decoded_bytes=keep, **settings).epoch_once()
        for one, two in zip(from_folder, moved, strict=True):
            assert one.image_ids == two.image_ids
            np.testing.assert_array_equal(one.pixels, two.pixels)


def test_a_stream_without_images_anywhere_is_refused(
    tmp_path: Path,
    manifest: Manifest,
    spec: CacheSpec,
    with_images: CacheSpec,
    open_source: Callable,
    made: SimpleNamespace,
) -> None:
    build_cache(manifest, spec, tmp_path / "bare", open_source=open_source)
    settings = {"splits": ["train"], "batch_size": 4, "seed": 0, "decode": decode_image}
    with pytest.raises(MissingLatentError, match=r"does not hold the bytes of its images[\s\S]*images=original"):
        PairStream(open_store(tmp_path / "bare"), None, **settings)
    half = made.create(tmp_path / "half", RowTable.from_manifest(manifest), [], 5, {}, images=ORIGINAL_IMAGES)
    with pytest.raises(IncompleteBuildError, match="lacks 5 of 5 shards of `images`"):
        PairStream(half, None, **settings)


def test_a_manifest_of_byte_ranges_in_tars_is_built(
    tmp_path: Path, manifest: Manifest, with_images: CacheSpec, open_source: Callable, build: Callable
) -> None:
    whole = build()
    packed = b"some bytes before"
    rows = []
    for row, file in zip(manifest.rows(), files_of(manifest), strict=True):
        uri = f"shards/000.tar#{len(packed)}+{len(file)}"
        rows.append(ManifestRow(row.image_id, uri, row.label, row.split, row.sha256, row.width, row.height))
        packed += file
    (tmp_path / "tars" / "shards").mkdir(parents=True)
    (tmp_path / "tars" / "shards" / "000.tar").write_bytes(packed)
    ranges = write_manifest(tmp_path / "tars" / "images.parquet", rows, manifest.class_names)
    report = build_cache(ranges, with_images, tmp_path / "t", open_source=open_source)
    assert report.content_hash == whole.content_hash
    assert open_store(tmp_path / "t").read_images(np.arange(23)) == files_of(manifest)
    (tmp_path / "tars" / "shards" / "000.tar").write_bytes(packed[:-1])
    with pytest.raises(ImageError, match=r"`image-22` at .* is cut off"):
        build_cache(ranges, with_images, tmp_path / "u", open_source=open_source)
