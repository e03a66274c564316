"""One pass: a device that others do not keep waiting, fed with batches of one size, several sources, several draws."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dla_cache.batches
from dla_cache.batches import batches_of
from dla_cache.build import build_cache
from dla_cache.errors import LatentShapeError, SourceError
from dla_cache.manifest import Manifest
from dla_cache.memory import batches_ahead
from dla_cache.pipeline import SLOTS, TASK_IMAGES
from dla_cache.shards import ShardPlan
from dla_cache.sources import Encoded, SeveralDraws
from dla_cache.sources.seeding import sample_seed
from dla_cache.spec import CacheSpec, LatentSpec, Modality
from dla_cache.store import open_store
from dla_cache.store.rows import RowTable, StoredImage

LAYOUTS = ["zarr"]
WAIT_S = 20.0
"""Until a test says that something does not come."""


@pytest.fixture
def build(tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable) -> Callable:
    """Builds a store in batches of 4, again and again."""

    def run(name: str = "s", spec: CacheSpec = spec, **options: object) -> object:
        return build_cache(manifest, spec, tmp_path / name, **{"open_source": open_source, "batch_size": 4, **options})

    return run


def of_modalities(spec: CacheSpec, *names: str, **fields: object) -> CacheSpec:
    latents = tuple(LatentSpec(modality=Modality(name), source="pixels") for name in names)
    return spec.model_copy(update={"latents": latents, **fields})


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The IDs of images that were read, as it goes on."""
    seen: list[str] = []
    read = dla_cache.batches.read_image_bytes

    def watch(path: Path, row: StoredImage) -> bytes:
        seen.append(row.image_id)
        return read(path, row)

    monkeypatch.setattr(dla_cache.batches, "read_image_bytes", watch)
    return seen


@given(
    spans=st.lists(st.integers(1, 17), min_size=1, max_size=3),
    shard_size=st.integers(1, 9),
    batch_size=st.integers(1, 20),
    removed=st.sets(st.integers(0, 60)),
    lacking=st.integers(0, 99),
)
def test_every_image_is_in_one_batch_in_order_and_all_batches_are_full_but_the_last_of_their_series(
    spans: list[int], shard_size: int, batch_size: int, removed: set[int], lacking: int
) -> None:
    images, first = [], 0
    for n_rows in spans:
        images += [StoredImage(row, f"i{row}", "0" * 64, "a", None, "u") for row in range(first, first + n_rows)]
        first = -(-(first + n_rows) // shard_size) * shard_size
    rows = RowTable(images).without([f"i{row}" for row in removed])
    shards = ShardPlan(rows.spans, shard_size)
    series = {shard: (("a", "b"), ("b",))[(lacking >> shard.index) & 1] for shard in shards}
    batches = list(batches_of(((shard, series[shard]) for shard in shards), rows, batch_size))
    for wanted in (("a", "b"), ("b",)):
        mine = [batch for batch in batches if batch.series == wanted]
        assert all(len(batch.images) == batch_size for batch in mine[:-1])
        ids = [image.image_id for batch in mine for image in batch.images]
        assert ids == [f"i{row}" for shard in shards if series[shard] == wanted for row in rows.kept_rows_of(shard)]
        ends = [segment.shard for batch in mine for segment in batch.segments if segment.is_last]
        assert ends == [shard for shard in shards if series[shard] == wanted]


def test_images_are_read_and_shards_committed_while_the_device_works(
    tmp_path: Path, build: Callable, open_source: Callable, reads: list[str]
) -> None:
    waited = []

    class Waiting(open_source):
        calls = 0

        def encode(self, pixels: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
            self.calls += 1
            if self.calls == 3:  # the first shard has ended with the batch before; images to come are 12 to 22
                event = threading.Event()
                for _ in range(int(WAIT_S / 0.01)):
                    if len(open_store(tmp_path / "s").committed("depth")) == 1 and len(reads) == 23:
                        waited.append(True)
                        break
                    event.wait(0.01)
            return super().encode(pixels, seeds)

    build(open_source=Waiting)
    assert waited == [True]


def test_no_more_images_are_read_ahead_than_there_are_slots_for(
    made: SimpleNamespace, tmp_path: Path, spec: CacheSpec, open_source: Callable, reads: list[str]
) -> None:
    ahead = []

    class Slow(open_source):
        calls = 0

        def encode(self, pixels: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
            threading.Event().wait(0.02)  # long enough for whoever would read on
            ahead.append(len(reads) - 2 * self.calls)
            self.calls += 1
            return super().encode(pixels, seeds)

    manifest = made.manifest(tmp_path / "many", 40)
    build_cache(manifest, spec, tmp_path / "s", open_source=Slow, batch_size=2)
    assert max(ahead) == 2 * SLOTS
    assert batches_ahead(5, 2) * 2 < 40
    assert TASK_IMAGES > 2  # a task ends with its batch


def test_an_image_is_read_once_for_all_modalities_and_the_images_of_the_store(
    tmp_path: Path, manifest: Manifest, build: Callable, spec: CacheSpec, open_source: Callable, reads: list[str]
) -> None:
    turns = []

    class Watched(open_source):
        def encode(self, pixels: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
            turns.append(self.recipe.modality.value)
            return super().encode(pixels, seeds)

    both = of_modalities(spec, "depth", "audio", images="original")
    report = build("both", both, open_source=Watched)
    assert sorted(reads) == sorted(manifest.image_ids)
    assert turns == ["depth", "audio"] * 6
    assert (report.images_encoded, report.images_stored) == (46, 23)
    store = open_store(tmp_path / "both")
    for name in ("depth", "audio"):
        build(name, of_modalities(spec, name))
        alone = open_store(tmp_path / name).read(name, np.arange(23))
        np.testing.assert_array_equal(store.read(name, np.arange(23)), alone)


def test_sources_of_several_view_sizes_each_see_their_own(
    tmp_path: Path, build: Callable, spec: CacheSpec, open_source: Callable
) -> None:
    sides = {"depth": 8, "audio": 4}
    seen = set()

    class Sized(open_source):
        def __init__(self, entry: LatentSpec, device: str) -> None:
            super().__init__(entry, device)
            self.recipe = self.recipe.model_copy(update={"source_view_size": sides[entry.modality.value]})

        def encode(self, pixels: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
            seen.add((self.recipe.modality.value, pixels.shape))
            return np.zeros((len(pixels), 3, 2, 2), np.float16)

    build("s", of_modalities(spec, "depth", "audio"), open_source=Sized)
    assert seen == {("depth", (4, 3, 8, 8)), ("audio", (4, 3, 4, 4))}


def test_a_modality_that_is_added_later_and_a_resume_touch_only_what_is_missing(
    tmp_path: Path, build: Callable, spec: CacheSpec, open_source: Callable
) -> None:
    encoded = []

    class Watched(open_source):
        def encode(self, pixels: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
            encoded.append(self.recipe.modality.value)
            return super().encode(pixels, seeds)

    build()
    before = dict(open_store(tmp_path / "s").committed("depth"))
    both = of_modalities(spec, "depth", "audio")
    build(spec=both, open_source=Watched)
    assert set(encoded) == {"audio"}
    assert dict(open_store(tmp_path / "s").committed("depth")) == before
    store = open_store(tmp_path / "s")
    store.withdraw("depth", {1: before[1]})
    encoded.clear()
    report = build(spec=both, open_source=Watched)
    assert (encoded, report.images_encoded) == (["depth"] * 2, 5)


def test_draws_are_stacked_each_of_its_own_seed_and_the_first_is_that_of_a_store_with_one(
    tmp_path: Path, manifest: Manifest, build: Callable, spec: CacheSpec, open_source: Callable
) -> None:
    seeds_of = []

    def several(entry: LatentSpec, device: str) -> SeveralDraws:
        class Watched(open_source):
            def encode(self, pixels: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
                seeds_of.append(list(seeds))
                return super().encode(pixels, seeds)

        return SeveralDraws(Watched(entry, device), entry.draws)

    latents = (spec.latents[0].model_copy(update={"draws": 3}),)
    build("several", spec.model_copy(update={"latents": latents}), open_source=several)
    build("one")
    store = open_store(tmp_path / "several")
    found = store.read("depth", np.arange(23))
    assert found.shape == (23, 3, 3, 2, 2)
    np.testing.assert_array_equal(found[:, 0], open_store(tmp_path / "one").read("depth", np.arange(23)))
    assert len(np.unique(found[0, :, 0, 0, 0])) == 3
    assert seeds_of[:3] == [
        [sample_seed(0, "depth", image_id, draw) for image_id in manifest.image_ids[:4]] for draw in range(3)
    ]


@pytest.mark.parametrize(("capacity", "used"), [(3, 2), (1, 1)])
def test_where_the_memory_runs_out_the_same_images_are_tried_in_halves_for_the_rest_of_the_run(
    tmp_path: Path, build: Callable, open_source: Callable, capacity: int, used: int
) -> None:
    sizes = []

    class Small(open_source):
        def encode(self, pixels: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
            sizes.append(len(pixels))
            if len(pixels) > capacity:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().encode(pixels, seeds)

    report = build(open_source=Small, batch_size=5)  # 5, and then 2 and 2 and the last one twice
    assert report.batch_sizes == {"depth": used}
    assert sorted(set(sizes)) == sorted({5, 2, used})
    assert sizes[-8:] == [used] * 8
    assert report.content_hash == build("roomy").content_hash
    for record in open_store(tmp_path / "s").committed("depth").values():
        assert record.made_with["batch_size"] == used
        assert record.made_with["out_of_memory"] == sizes.count(5) + (used < 2)
        assert record.made_with["torch"] == torch.__version__


def test_a_device_that_cannot_hold_one_image_is_one_error(build: Callable, open_source: Callable) -> None:
    class Full(open_source):
        def encode(self, pixels: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SourceError, match=r"(?s)not enough memory for one image of `depth`: `image-0`.*hint: "):
        build(open_source=Full)


def test_what_a_source_says_of_itself_stands_in_the_records_and_in_no_recipe(
    tmp_path: Path, build: Callable, open_source: Callable
) -> None:
    class Told(open_source):
        made_with = MappingProxyType({"attention": "sdpa", "commit": "0123abc"})

    told = build(open_source=Told)
    record = open_store(tmp_path / "s").committed("depth")[0]
    assert {**Told.made_with, "batch_size": 4}.items() <= record.made_with.items()
    assert told.content_hash == build("untold").content_hash


def test_a_source_that_fails_is_one_error_with_its_images_and_no_thread_is_left(
    tmp_path: Path, build: Callable, open_source: Callable
) -> None:
    class Fails(open_source):
        calls = 0

        def encode(self, pixels: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
            self.calls += 1
            if self.calls == 4:
                raise ValueError("no such block")
            return super().encode(pixels, seeds)

    before = threading.active_count()
    with pytest.raises(SourceError, match=r"`pixels` failed for `image-12`, `image-13`.*no such block"):
        build(open_source=Fails)
    assert threading.active_count() == before
    assert open_store(tmp_path / "s").missing("depth") == [2, 3, 4]


def test_encoded_latents_of_the_wrong_number_are_refused(build: Callable, open_source: Callable) -> None:
    class Short(open_source):
        def encode(self, pixels: np.ndarray, seeds: Sequence[int]) -> Encoded:
            return Encoded(super().encode(pixels, seeds)[:-1])

    with pytest.raises(LatentShapeError, match=r"\[3, 3, 2, 2\].*\[4, 3, 2, 2\]"):
        build(open_source=Short)


def test_captions_that_name_a_class_are_counted_in_the_record_of_their_shard(
    tmp_path: Path, build: Callable, open_source: Callable
) -> None:
    class Captioned(open_source):
        def encode(self, pixels: np.ndarray, seeds: Sequence[int]) -> Encoded:
            captions = ["an odd image", "nothing", "a strange image", "nothing"][: len(seeds)]
            return Encoded(super().encode(pixels, seeds), captions=captions)

    build(open_source=Captioned, synonyms={"odd": ["strange"]})
    audits = [record.audit for record in open_store(tmp_path / "s").committed("depth").values()]
    # Of 23 images in batches of four; the first and the third of each have a caption with a name.
    assert sum(audit["captions"] for audit in audits) == 23
    assert sum(audit["named"] for audit in audits) == 12
