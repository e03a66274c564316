"""Latents made again are the stored ones, and where they are not it is said by how much and of which image."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dla_cache.build import build_cache
from dla_cache.errors import ImageError, MissingLatentError, RecipeMismatchError, SourceError
from dla_cache.manifest import Manifest
from dla_cache.recompute import Recomputed, differences, draw_rows, recompute
from dla_cache.sources.seeding import sample_seed
from dla_cache.spec import CacheSpec, LatentFormat, LatentSpec
from dla_cache.store import LatentStore, open_store
from dla_cache.store.exchange import convert_store
from dla_cache.takedown import take_down


@pytest.fixture
def store(tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable) -> LatentStore:
    build_cache(manifest, spec, tmp_path / "s", open_source=open_source, batch_size=3)
    return open_store(tmp_path / "s")


def test_a_deterministic_source_makes_the_stored_bytes_again(
    store: LatentStore, manifest: Manifest, open_source: Callable
) -> None:
    told = []
    (one,) = recompute(
        store, manifest.root, 9, open_source=open_source, on_progress=lambda done, total: told.append((done, total))
    )
    assert one == Recomputed("depth", 9, 9, 0.0, None)
    assert told[-1] == (9, 9)
    (all_of_them,) = recompute(store, manifest.root, 1000, open_source=open_source)
    assert all_of_them.n_equal == 23


def test_the_images_of_a_store_that_holds_them_are_enough(
    tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable
) -> None:
    whole = spec.model_copy(update={"images": "original"})
    build_cache(manifest, whole, tmp_path / "s", open_source=open_source)
    for path in (manifest.root / "images").iterdir():
        path.unlink()
    (one,) = recompute(open_store(tmp_path / "s"), None, 5, open_source=open_source)
    assert one.n_equal == 5


def test_a_source_that_drifts_is_measured_in_standard_deviations(
    store: LatentStore, manifest: Manifest, open_source: Callable
) -> None:
    doomed = manifest.image_ids[7]

    class Drifting(open_source):
        def encode(self, pixels: np.ndarray, seeds: list[int]) -> np.ndarray:
            latents = super().encode(pixels, seeds)
            if self.seed_of(doomed) in seeds:
                latents[list(seeds).index(self.seed_of(doomed)), 1, 0, 0] += 3
            return latents

        def seed_of(self, image_id: str) -> int:
            return sample_seed(0, "depth", image_id)

    (one,) = recompute(store, manifest.root, 23, open_source=Drifting)
    stored = store.read("depth", np.arange(23)).astype(np.float64)
    assert (one.n_equal, one.worst) == (22, doomed)
    assert one.largest_difference == pytest.approx(3 / stored[:, 1].std(), rel=0.01)  # float16


def test_images_are_drawn_from_what_is_committed_and_not_removed(
    tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable
) -> None:
    build_cache(manifest, spec, tmp_path / "s", open_source=open_source, rank=1, world_size=2)
    take_down([tmp_path / "s"], [manifest.image_ids[6]])
    store = open_store(tmp_path / "s")
    committed = {5, 7, 8, 9, 15, 16, 17, 18, 19}
    assert set(draw_rows(store, "depth", 99, 0).tolist()) == committed
    some = draw_rows(store, "depth", 4, 1).tolist()
    assert len(set(some) & committed) == 4
    assert some == draw_rows(store, "depth", 4, 1).tolist() == sorted(some)
    assert len({tuple(draw_rows(store, "depth", 4, seed).tolist()) for seed in range(8)}) > 1
    store.withdraw("depth", store.committed("depth"))
    with pytest.raises(MissingLatentError, match="no latent of `depth` is committed"):
        draw_rows(store, "depth", 4, 0)


def test_another_source_a_lost_image_and_a_source_that_is_gone_are_named(
    store: LatentStore, manifest: Manifest, open_source: Callable
) -> None:
    class Other(open_source):
        def __init__(self, spec: object, device: str) -> None:
            super().__init__(spec, device)
            self.recipe = self.recipe.model_copy(update={"weights_sha256": "f" * 64})

    def gone(spec: object, device: str) -> None:
        raise SourceError("there is no source `pixels`", hint="known sources: none")

    with pytest.raises(RecipeMismatchError, match=f"`weights_sha256` `` → `{'f' * 64}`"):
        recompute(store, manifest.root, 3, open_source=Other)
    with pytest.raises(SourceError, match=r"`depth` cannot be computed again: there is no source `pixels`"):
        recompute(store, manifest.root, 3, open_source=gone)
    manifest.path_of(next(manifest.rows()).uri).unlink()
    with pytest.raises(ImageError):
        recompute(store, manifest.root, 23, open_source=open_source)


def test_codes_differ_by_their_share_and_zeros_by_their_sign() -> None:
    codes = LatentFormat(kind="codes", shape=(1, 4), axes=("codebook", "step"), dtype="int16", vocabulary=9)
    stored, live = np.array([[[1, 2, 3, 4]], [[1, 2, 3, 4]]]), np.array([[[1, 2, 3, 5]], [[1, 2, 3, 4]]])
    assert differences(stored, live, codes).tolist() == [0.25, 0.0]
    values = LatentFormat(kind="continuous", shape=(1, 2), axes=("channel", "step"), dtype="float32")
    zeros = np.array([[[0.0, 1.0]]], np.float32)
    (tiny,) = differences(zeros, np.array([[[-0.0, 1.0]]], np.float32), values)
    assert 0 < tiny < 1e-30


def test_latents_that_lie_there_in_fewer_bits_are_rounded_as_often_before_they_are_compared(
    tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable, layout: str
) -> None:
    wide = spec.model_copy(update={"latents": (spec.latents[0].model_copy(update={"dtype": "float32"}),)})
    build_cache(manifest, wide, tmp_path / "float32", open_source=open_source)
    for before, after in (("float32", "bfloat16"), ("float32", "float16"), ("float16", "int8")):
        convert_store(open_store(tmp_path / before), tmp_path / after, layout, dtypes={"depth": after})
    for dtype in ("bfloat16", "int8"):
        (one,) = recompute(open_store(tmp_path / dtype), manifest.root, 23, open_source=open_source)
        assert (one.n_equal, one.largest_difference) == (23, 0)


def test_what_a_source_says_of_its_batches_is_allowed_and_not_more(
    store: LatentStore, manifest: Manifest, open_source: Callable
) -> None:
    class Wavering(open_source):
        tolerance, by = 1e-3, 5e-4

        def encode(self, pixels: object, seeds: Sequence[int]) -> NDArray[np.generic]:
            return super().encode(pixels, seeds) + np.float32(self.by)

    (one,) = recompute(store, manifest.root, 23, open_source=Wavering)
    assert one.largest_difference > 0
    assert one.is_within
    Wavering.by = 0.02
    (one,) = recompute(store, manifest.root, 23, open_source=Wavering)
    assert not one.is_within
    Wavering.by, Wavering.tolerance = 5e-4, 0.0
    (one,) = recompute(store, manifest.root, 23, open_source=Wavering)
    assert not one.is_within


def test_weights_are_looked_for_where_the_records_say_or_as_a_spec_says(
    store: LatentStore, manifest: Manifest, spec: CacheSpec, open_source: Callable
) -> None:
    asked = []

    def open_and_note(entry: LatentSpec, device: str) -> object:
        asked.append(entry.parameters)
        return open_source(entry.model_copy(update={"parameters": {}}), device)

    log = store.committed("depth")
    store.withdraw("depth", dict(log))
    told = {"model": "owner/name", "model_commit": "c0ffee", "captioner": "a folder", "torch": "2"}
    for shard in store.shards:
        latents = np.zeros((len(store.kept_rows(shard)), *store.recipe("depth").format.shape))
        store.write_shard("depth", shard, latents, seconds=0.0, device="cpu", made_with=told)
    recompute(store, manifest.root, 1, open_source=open_and_note)
    named = spec.model_copy(update={"latents": (spec.latents[0].model_copy(update={"parameters": {"model": "m"}}),)})
    recompute(store, manifest.root, 1, open_source=open_and_note, spec=named)
    assert asked == [{"model": "owner/name", "revision": "c0ffee"}, {"model": "m"}]
