"""Pairs: pixels and latents of the same image, each once an epoch, in an order that resumes exactly."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dla_cache.build import build_cache
from dla_cache.errors import CorruptShardError, ImageError, IncompleteBuildError, MissingLatentError, StoreError
from dla_cache.images import decode_image
from dla_cache.manifest import Manifest, write_manifest
from dla_cache.pairs import PairBatch, PairStream
from dla_cache.sources.seeding import sample_seed
from dla_cache.spec import CacheSpec
from dla_cache.store import LatentStore, create_store, open_store
from dla_cache.store.rows import RowTable

# What a stream makes of a store does not depend on how it lies on disk.
LAYOUTS = ["zarr"]


@pytest.fixture
def store(tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable) -> LatentStore:
    build_cache(manifest, spec, tmp_path / "s", open_source=open_source)
    return open_store(tmp_path / "s")


@pytest.fixture
def stream(store: LatentStore, manifest: Manifest) -> Callable[..., PairStream]:
    """Streams over `train` and `test` with some settings of their own: 15 images in batches of 4."""

    def make(**changes: object) -> PairStream:
        settings = {"splits": ["train", "test"], "batch_size": 4, "seed": 0, "decode": decode_image, **changes}
        return PairStream(store, manifest.root, **settings)

    return make


def ids(batches: Iterable[PairBatch]) -> list[tuple[str, ...]]:
    return [batch.image_ids for batch in batches]


def images_of(manifest: Manifest, *splits: str) -> list[str]:
    return [row.image_id for row in manifest.rows() if row.split in splits]


@given(batch_size=st.integers(1, 20), seed=st.integers(0, 2**63), epoch=st.integers(0, 5))
@settings(deadline=None, max_examples=25)
def test_every_image_comes_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, made: SimpleNamespace, batch_size: int, seed: int, epoch: int
) -> None:
    folder = tmp_path_factory.mktemp("pairs")
    manifest = made.manifest(folder, 7)
    store = create_store(folder / "s", RowTable.from_manifest(manifest), [], 3, {})
    stream = PairStream(store, folder, ["train", "test"], batch_size, seed=seed, decode=decode_image)
    epochs = list(islice(stream.batches(epoch * len(stream)), len(stream)))
    assert sorted(sum(ids(epochs), ())) == sorted(images_of(manifest, "train", "test"))
    assert {batch.epoch for batch in epochs} == {epoch}


def test_pixels_latents_and_labels_are_of_the_image_they_name(
    stream: Callable[..., PairStream], manifest: Manifest, spec: CacheSpec, open_source: Callable
) -> None:
    rows = {row.image_id: row for row in manifest.rows()}
    source = open_source(spec.latents[0], "cpu")
    for batch in stream().epoch_once():
        for place, image_id in enumerate(batch.image_ids):
            pixels = decode_image(manifest.path_of(rows[image_id].uri).read_bytes(), image_id)
            np.testing.assert_array_equal(batch.pixels[place], pixels)
            latent = source.encode(pixels[None], [sample_seed(0, "depth", image_id)])[0].astype(np.float16)
            np.testing.assert_array_equal(batch.latents["depth"][place], latent)
            label = rows[image_id].label
            assert batch.labels[place] == (-1 if label is None else label)
        assert (batch.pixels[0].dtype, batch.latents["depth"].dtype, batch.labels.dtype) == (
            np.uint8,
            torch.float16,
            torch.int64,
        )


def test_images_are_joined_by_id_where_the_manifest_has_another_order(
    tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable, stream: Callable[..., PairStream]
) -> None:
    reversed_manifest = write_manifest(
        manifest.root / "reversed.parquet", list(manifest.rows())[::-1], manifest.class_names
    )
    build_cache(reversed_manifest, spec, tmp_path / "reversed", open_source=open_source)
    other = PairStream(
        open_store(tmp_path / "reversed"), manifest.root, ["test"], 4, seed=0, decode=decode_image, shuffle=False
    )

    def pairs(batches: Iterable[PairBatch]) -> dict[str, bytes]:
        return {
            image_id: batch.pixels[place].tobytes() + batch.latents["depth"][place].numpy().tobytes()
            for batch in batches
            for place, image_id in enumerate(batch.image_ids)
        }

    assert pairs(other.epoch_once()) == pairs(stream(splits=["test"]).epoch_once())
    assert sum(ids(other.epoch_once()), ()) == tuple(images_of(reversed_manifest, "test"))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
def test_resuming_at_a_batch_gives_the_tail_of_the_unbroken_stream(
    stream: Callable[..., PairStream], start: int, drop_last: bool
) -> None:
    unbroken = list(islice(stream(drop_last=drop_last).batches(), 13))
    resumed = list(islice(stream(drop_last=drop_last).batches(start), 13 - start))
    for one, two in zip(unbroken[start:], resumed, strict=True):
        assert one.image_ids == two.image_ids
        assert one.epoch == two.epoch
        torch.testing.assert_close(one.latents["depth"], two.latents["depth"], rtol=0, atol=0)


def test_the_order_is_another_one_each_epoch_and_for_each_seed(stream: Callable[..., PairStream]) -> None:
    orders = [tuple(ids(stream(seed=seed).epoch_once(epoch))) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_without_shuffling_images_come_in_row_order(stream: Callable[..., PairStream], manifest: Manifest) -> None:
    assert sum(ids(stream(shuffle=False).epoch_once()), ()) == tuple(images_of(manifest, "train", "test"))


def test_the_last_short_batch_comes_unless_it_is_dropped(stream: Callable[..., PairStream]) -> None:
    assert [len(batch) for batch in ids(stream().epoch_once())] == [4, 4, 4, 3]
    assert [len(batch) for batch in ids(stream(drop_last=True).epoch_once())] == [4, 4, 4]
    assert (len(stream()), len(stream(drop_last=True)), stream().n_images) == (4, 3, 15)


def test_images_alone_need_no_latents(tmp_path: Path, manifest: Manifest) -> None:
    empty = create_store(tmp_path / "empty", RowTable.from_manifest(manifest), [], 5, {})
    (batch,) = PairStream(empty, manifest.root, ["train"], 8, seed=0, decode=decode_image, modalities=()).epoch_once()
    assert batch.latents == {}
    assert [pixels.shape for pixels in batch.pixels] == [(3, 8, 8)] * 8


@pytest.mark.parametrize("keep_decoded_bytes", [0, 5 * 8 * 8 * 3, 2**30])
def test_an_image_is_decoded_once_if_it_fits_and_pixels_are_the_same_anyway(
    stream: Callable[..., PairStream], keep_decoded_bytes: int
) -> None:
    decoded: list[str] = []

    def decode(content: bytes, image_id: str) -> np.ndarray:
        decoded.append(image_id)
        return decode_image(content, image_id)

    watched = stream(decode=decode, keep_decoded_bytes=keep_decoded_bytes)
    decoded.clear()
    for number in range(3 * len(watched)):
        np.testing.assert_array_equal(watched.batch(number).pixels, stream().batch(number).pixels)
    kept = min(15, keep_decoded_bytes // (8 * 8 * 3))
    assert len(decoded) == kept + 3 * (15 - kept)


def test_latents_of_a_batch_are_the_callers_to_change_and_its_pixels_are_read_only(
    stream: Callable[..., PairStream],
) -> None:
    made = stream()
    first = made.batch(0)
    first.latents["depth"].zero_()
    assert made.batch(0).latents["depth"].any()
    with pytest.raises(ValueError, match="read-only"):
        first.pixels[0][:] = 0


def pairs_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pairs")]


def test_closing_early_leaves_no_thread(stream: Callable[..., PairStream]) -> None:
    batches = stream().batches()
    next(batches)
    assert pairs_threads()
    batches.close()
    assert pairs_threads() == []


def test_an_error_reaches_the_reader_and_leaves_no_thread(
    stream: Callable[..., PairStream], manifest: Manifest
) -> None:
    made = stream()
    manifest.path_of("images/image-9.png").write_bytes(b"other")
    with pytest.raises(ImageError, match="`image-9`"):
        list(made.epoch_once())
    assert pairs_threads() == []


@pytest.mark.parametrize("keep_decoded_bytes", [0, 500, 2**30])
def test_images_of_a_batch_keep_their_own_sizes(stream: Callable[..., PairStream], keep_decoded_bytes: int) -> None:
    def decode(content: bytes, image_id: str) -> np.ndarray:
        pixels = decode_image(content, image_id)
        return pixels[:, :4] if image_id == "image-9" else pixels

    made = stream(decode=decode, keep_decoded_bytes=keep_decoded_bytes)
    for epoch in range(2):
        for batch in made.epoch_once(epoch):
            for image_id, pixels in zip(batch.image_ids, batch.pixels, strict=True):
                assert pixels.shape == (3, 4 if image_id == "image-9" else 8, 8)


def test_a_damaged_latent_is_named(stream: Callable[..., PairStream], store: LatentStore) -> None:
    path = store.shard_path("depth", 1)
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    with pytest.raises(CorruptShardError, match=r"shard 1 .*`image-5`"):
        list(stream(splits=["train", "test", "validation"]).epoch_once())


@pytest.mark.parametrize(
    ("changes", "error", "fault"),
    [
        ({"splits": ["holdout"]}, StoreError, "no image of split `holdout`"),
        ({"modalities": ["audio"]}, MissingLatentError, "no modality `audio`"),
        ({"batch_size": 16, "drop_last": True}, StoreError, "15 images make no full batch of 16"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(
    stream: Callable[..., PairStream], changes: dict[str, object], error: type[Exception], fault: str
) -> None:
    with pytest.raises(error, match=fault):
        stream(**changes)


def test_a_store_that_is_not_whole_is_refused(tmp_path: Path, manifest: Manifest, store: LatentStore) -> None:
    empty = create_store(tmp_path / "empty", RowTable.from_manifest(manifest), [], 5, {"depth": store.recipe("depth")})
    with pytest.raises(IncompleteBuildError, match="lacks 5 of 5 shards of `depth`"):
        PairStream(empty, manifest.root, ["train"], 4, seed=0, decode=decode_image)


def test_a_row_table_that_leaves_the_image_folder_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    (image, *_) = RowTable.from_manifest(manifest)
    escaping = create_store(tmp_path / "escaping", RowTable([replace(image, uri="../../secret.png")]), [], 5, {})
    with pytest.raises(ValueError, match="leaves the folder"):
        PairStream(escaping, manifest.root, ["train"], 1, seed=0, decode=decode_image)
