"""Batches made ahead: the same by any number of threads, in bounded memory, and without images if so asked for."""

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dla_cache.build import build_cache
from dla_cache.errors import CorruptShardError, StoreError
from dla_cache.images import decode_image
from dla_cache.loading import PairDataset
from dla_cache.manifest import Manifest
from dla_cache.pairs import BATCHES_AHEAD, PairBatch, PairStream
from dla_cache.spec import CacheSpec
from dla_cache.store import LatentStore, open_store

LAYOUTS = ["zarr"]

IMAGE_BYTES = 3 * 8 * 8


@pytest.fixture
def store(tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable) -> LatentStore:
    build_cache(manifest, spec, tmp_path / "s", open_source=open_source)
    return open_store(tmp_path / "s")


@pytest.fixture
def stream(store: LatentStore, manifest: Manifest) -> Callable[..., PairStream]:
    """Streams over all 23 images in batches of 2."""

    def make(**changes: object) -> PairStream:
        settings = {"image_root": manifest.root, "batch_size": 2, "seed": 0, "decode": decode_image, **changes}
        return PairStream(store, splits=None, **settings)

    return make


def contents(batch: PairBatch) -> tuple[object, ...]:
    pixels = b"".join(pixels.tobytes() for pixels in batch.pixels)
    return batch.number, batch.image_ids, pixels, batch.latents["depth"].numpy().tobytes(), batch.labels.tolist()


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_batches_of_several_threads_are_those_of_one_in_the_same_order(
    stream: Callable[..., PairStream], threads: int
) -> None:
    def decode_slowly(content: bytes, image_id: str) -> np.ndarray:
        time.sleep(0.002 if image_id.endswith(("1", "4")) else 0)
        return decode_image(content, image_id)

    alone = [contents(batch) for batch in stream().batches(stop=30)]
    together = stream(decode=decode_slowly, threads=threads, keep_decoded_bytes=7 * IMAGE_BYTES)
    assert [contents(batch) for batch in together.batches(stop=30)] == alone


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_no_more_batches_exist_at_a_time_than_the_guide_says(stream: Callable[..., PairStream], threads: int) -> None:
    ahead = max(BATCHES_AHEAD, threads)
    decoded: list[str] = []

    def decode(content: bytes, image_id: str) -> np.ndarray:
        decoded.append(image_id)
        return decode_image(content, image_id)

    watched = stream(decode=decode, threads=threads, keep_decoded_bytes=0, shuffle=False)
    decoded.clear()
    batches = watched.batches(stop=11)
    for number in range(3):
        batch = next(batches)  # noqa: F841  # as a caller holds on to it
        while len(decoded) < 2 * (number + 1 + ahead):
            time.sleep(0.001)
        time.sleep(0.02)  # time enough to make another
        assert len(decoded) == 2 * (number + 1 + ahead)
        # While the next is asked for, the one behind all these is begun: two more than are ahead.
        assert sum(type(thing) is PairBatch for thing in gc.get_objects()) == 1 + ahead
    batches.close()


def test_pixels_that_two_threads_decode_at_once_count_once_against_the_memory(
    stream: Callable[..., PairStream],
) -> None:
    decoded: list[str] = []
    together = threading.Barrier(2)

    def decode(content: bytes, image_id: str) -> np.ndarray:
        decoded.append(image_id)
        if threading.current_thread() is not threading.main_thread() and len(decoded) <= 46:
            together.wait(5)
        return decode_image(content, image_id)

    # Two epochs of one batch each, in one order: both threads decode each image at the same moment.
    watched = stream(batch_size=23, shuffle=False, decode=decode, threads=2, keep_decoded_bytes=5 * IMAGE_BYTES)
    decoded.clear()
    assert len(list(watched.batches(stop=2))) == 2
    decoded.clear()
    watched.batch(2)
    assert len(decoded) == 23 - 5


@pytest.mark.parametrize("threads", [1, 4])
def test_batches_before_a_damaged_one_come_and_no_thread_is_left(
    stream: Callable[..., PairStream], store: LatentStore, threads: int
) -> None:
    path = store.shard_path("depth", 2)
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    batches = stream(threads=threads, shuffle=False).epoch_once()
    assert [next(batches).image_ids for _ in range(5)] == [
        (f"image-{row}", f"image-{row + 1}") for row in range(0, 10, 2)
    ]
    with pytest.raises(CorruptShardError, match=r"shard 2 of `depth` is damaged at `image-10`"):
        next(batches)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("pairs")] == []


def test_a_stream_without_images_gives_latents_and_labels_and_needs_none(
    stream: Callable[..., PairStream], manifest: Manifest
) -> None:
    whole = list(stream().epoch_once())
    for row in manifest.rows():
        manifest.path_of(row.uri).unlink()
    bare = list(stream(image_root=None, decode=None, images=False).epoch_once())
    for one, other in zip(whole, bare, strict=True):
        assert (other.pixels, other.images) == ((), ())
        assert (other.image_ids, other.labels.tolist()) == (one.image_ids, one.labels.tolist())
        assert torch.equal(other.latents["depth"], one.latents["depth"])
    with pytest.raises(StoreError, match="nothing to decode without images"):
        stream(images=False)


def test_memory_is_pinned_where_there_is_a_cuda_device_and_refused_where_not(
    stream: Callable[..., PairStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StoreError, match=r"memory cannot be pinned: torch finds no CUDA device\nhint: "):
        stream(pin_memory=True)
    pinned: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (copy := tensor.clone(), pinned.append(id(copy)))[0])
    made = stream(pin_memory=True)
    batch = made.batch(0)
    assert {id(tensor) for tensor in (batch.latents["depth"], batch.present["depth"], batch.labels)} == set(pinned)
    assert contents(batch) == contents(stream().batch(0))
    with pytest.raises(StoreError, match=r"a worker process cannot pin memory[\s\S]*`pin_memory=True` to the loader"):
        next(iter(DataLoader(PairDataset(made), batch_size=None, num_workers=1)))
