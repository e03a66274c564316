"""Merging: one store holds what several did, whatever was where, whenever it was stopped; no damage passes."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dla_cache
from dla_cache.adopt import adopt_source
from dla_cache.build import build_cache
from dla_cache.describe import describe_rounding
from dla_cache.errors import CorruptShardError, StoreError, WorkInterrupted
from dla_cache.manifest import Manifest, write_manifest
from dla_cache.merge import MergeReport, merge_stores
from dla_cache.merge_plan import plan_merge
from dla_cache.spec import CacheSpec, Modality
from dla_cache.store import LatentStore, open_store
from dla_cache.store.exchange import convert_store
from dla_cache.store.rows import RowTable
from dla_cache.store.statistics import merge_errors
from dla_cache.takedown import take_down
from dla_cache.verify import verify_store

N = 8
OTHER = {"zarr": "webdataset", "webdataset": "zarr"}

Make = Callable[..., LatentStore]


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is played here, and there are many stores."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, made: SimpleNamespace) -> Make:
    """Stores of some of eight images, in a given order, that lose something by rounding to float16."""

    def make_store(numbers: list[int], modalities: str | list[str] = "depth", shard_size: int = 3) -> LatentStore:
        names = sorted([modalities] if isinstance(modalities, str) else modalities)
        recipes = {name: made.recipe(modality=Modality(name)) for name in names}
        images = [replace(made.rows(N)[number], row=row) for row, number in enumerate(numbers)]
        path = tmp_path_factory.mktemp("merge") / "s"
        store = made.create(path, RowTable(images), ["a", "b"], shard_size, recipes)
        for name in names:
            latents = np.random.default_rng(len(name)).normal(3, 2, (N, 3, 2, 2)).astype(np.float32)
            for shard in store.shards:
                chosen = latents[numbers[shard.start : shard.stop]]
                store.write_shard(name, shard, chosen, seconds=0.1 * len(shard), device="cpu")
        return store

    return make_store


def merge(stores: list[LatentStore], target: Path, **options: object) -> MergeReport:
    steps = {name: options.pop(name) for name in ("on_progress", "should_stop") if name in options}
    return merge_stores(plan_merge(stores, target, **options), target, **steps)


def files_of(store: Path) -> dict[str, bytes]:
    paths = sorted(path for path in store.rglob("*") if path.is_file())
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in paths}


HELD = st.tuples(
    st.lists(st.integers(0, N - 1), min_size=1, unique=True),
    st.lists(st.sampled_from(["audio", "depth"]), min_size=1, unique=True),
    st.integers(1, 4),
)


@given(st.lists(HELD, min_size=1, max_size=3), st.integers(1, 5), st.booleans())
@settings(max_examples=10, deadline=None)
def test_a_merged_store_reads_as_its_sources_whatever_was_where(
    tmp_path_factory: pytest.TempPathFactory, make: Make, held: list, shard_size: int, is_other_layout: bool
) -> None:
    stores = [make(*one) for one in held]
    names = {name for _, modalities, _ in held for name in modalities}
    having = {name: {n for numbers, modalities, _ in held if name in modalities for n in numbers} for name in names}
    order = list(dict.fromkeys(number for numbers, _, _ in held for number in numbers))
    whole = [number for number in order if all(number in found for found in having.values())]
    target = tmp_path_factory.mktemp("merged") / "t"
    layout = OTHER[stores[0].layout_name] if is_other_layout else None
    options = {"layout": layout, "shard_size": shard_size, "missing": "skip"}
    if not whole:
        with pytest.raises(StoreError, match="no image has every modality"):
            merge(stores, target, **options)
        return
    report = merge(stores, target, **options)
    merged = open_store(target)
    assert merged.rows.image_ids == tuple(f"image-{number}" for number in whole)
    assert verify_store(merged).problems == ()
    for store in stores:
        rows = {merged.rows.row_of(image_id): row for row, image_id in enumerate(store.rows.image_ids)
                if image_id in merged.rows.image_ids}  # fmt: skip
        for name in store.modalities:
            here, there = merged.read(name, np.array([*rows], int)), store.read(name, np.array([*rows.values()], int))
            np.testing.assert_array_equal(here, there)
    assert report.content_hash == make(whole, list(names)).content_hash()


@pytest.fixture
def build(spec: CacheSpec, tmp_path: Path, open_source: Callable) -> Callable[..., LatentStore]:
    def run(name: str, manifest: Manifest, **options: object) -> LatentStore:
        chosen = spec.model_copy(update={"images": options.pop("images", "original")})
        build_cache(manifest, chosen, tmp_path / name, open_source=open_source, batch_size=5, **options)
        return open_store(tmp_path / name)

    return run


def part_of(manifest: Manifest, numbers: range) -> Manifest:
    rows = list(manifest.rows())
    return write_manifest(
        manifest.root / f"{numbers}.parquet", [rows[number] for number in numbers], manifest.class_names
    )


def test_parts_of_a_manifest_merge_to_what_one_build_of_it_is(
    tmp_path: Path, manifest: Manifest, build: Callable
) -> None:
    parts = [build(f"part-{n}", part_of(manifest, range(n, n + 8 if n else 8))) for n in (0, 8)]
    rest = build("rest", part_of(manifest, range(16, 23)))
    report = merge([*parts, rest], tmp_path / "t", with_images=True)
    once = build("once", manifest)
    merged = open_store(tmp_path / "t")
    assert report.content_hash == once.content_hash() == merged.content_hash()
    assert merged.read_images(np.arange(23)) == once.read_images(np.arange(23))
    assert verify_store(merged, manifest).problems == ()
    for series in once.series:
        for index, record in once.committed(series).items():
            attempt = {"seconds", "error"}
            assert merged.committed(series)[index].model_dump(exclude=attempt) == record.model_dump(exclude=attempt)


def test_a_store_alone_is_made_without_gaps_and_removed_rows_and_keeps_its_content_hash(
    tmp_path: Path, manifest: Manifest, build: Callable
) -> None:
    build("s", part_of(manifest, range(12)))
    appended = build("s", manifest, append=True)
    assert merge([appended], tmp_path / "t").content_hash == appended.content_hash()
    assert open_store(tmp_path / "t").rows.spans == [(0, 23)]
    take_down([tmp_path / "s"], ["image-3", "image-13"])
    store = open_store(tmp_path / "s")
    report = merge([store], tmp_path / "u", shard_size=4)
    compact = open_store(tmp_path / "u")
    assert report.plan.left_out == ("2 images removed from a store",)
    assert (compact.rows.spans, len(compact.shards), compact.rows.removed_ids) == ([(0, 21)], 6, frozenset())
    assert report.content_hash == store.content_hash()
    assert verify_store(compact).problems == ()


def test_what_was_adopted_of_the_sources_holds_for_the_merged_store(
    tmp_path: Path, manifest: Manifest, spec: CacheSpec, build: Callable, open_source: Callable
) -> None:
    stores = [build("a", part_of(manifest, range(12)), images="none"), build("b", part_of(manifest, range(12, 23)))]
    renamed = spec.model_copy(update={"latents": (spec.latents[0].model_copy(update={"source": "renamed"}),)})
    adopt_source(stores[1], open_source(renamed.latents[0], "cpu"), manifest.root, n_images=2, why="it is", who="me")
    for _ in range(2):
        merge(stores, tmp_path / "t")
    assert build_cache(manifest, renamed, tmp_path / "t", open_source=open_source).images_encoded == 0
    assert [adoption.why for adoption in verify_store(open_store(tmp_path / "t"), manifest).adopted] == ["it is"]


def test_a_store_that_has_nothing_to_make_compact_comes_out_byte_for_byte(tmp_path: Path, make: Make) -> None:
    source = make([3, 1, 4, 0, 5], ["audio", "depth"])
    for modality in source.modalities:
        source.consolidate(modality)
    merge([source], tmp_path / "t")
    assert files_of(source.path) == {
        name: content for name, content in files_of(tmp_path / "t").items() if name != "README.md"
    }


def test_what_was_lost_by_rounding_is_carried_on(tmp_path: Path, make: Make) -> None:
    stores = [make([0, 1, 2, 3, 4]), make([5, 6, 7], shard_size=2)]
    merge(stores, tmp_path / "t", shard_size=4)
    merged = open_store(tmp_path / "t")
    before = [
        (record.n_rows, record.error) for store in stores for _, record in sorted(store.committed("depth").items())
    ]
    assert all(error is not None for _, error in before)
    whole = merge_errors(before)
    after = merge_errors([(record.n_rows, record.error) for record in merged.committed("depth").values()])
    assert (after.count, after.max_abs) == (8, whole.max_abs)
    np.testing.assert_allclose(after.rms, whole.rms, rtol=1e-12)
    # Rows 0 to 3: the first shard of 3, and one image of the second, of 2.
    mixed = merge_errors([(3, before[0][1]), (1, before[1][1].model_copy(update={"count": 1}))])
    assert merged.committed("depth")[0].error == mixed
    assert describe_rounding(merged, "depth").share_of_std > 0
    assert sum(record.seconds for record in merged.committed("depth").values()) == pytest.approx(0.8)


def test_what_two_stores_hold_counts_once_and_is_that_of_the_first(tmp_path: Path, make: Make) -> None:
    stores = [make([0, 1, 2]), make([2, 3, 4])]
    merge(stores, tmp_path / "t", shard_size=6)
    record = open_store(tmp_path / "t").committed("depth")[0]
    first, second = (store.committed("depth")[0].error for store in stores)
    assert record.error == merge_errors([(3, first), (2, second.model_copy(update={"count": 2}))])
    assert record.seconds == pytest.approx(0.5)


def test_a_removed_image_is_left_out_wherever_else_it_lies(tmp_path: Path, make: Make) -> None:
    stores = [make([0, 1, 2]), make([2, 1, 0], "audio")]
    take_down([stores[1].path], ["image-1"])
    report = merge([stores[0], open_store(stores[1].path)], tmp_path / "t")
    assert open_store(tmp_path / "t").rows.image_ids == ("image-0", "image-2")
    assert report.plan.left_out == ("1 image removed from a store",)


def test_images_go_along_where_every_image_is_held_and_else_the_plan_says_why_not(
    tmp_path: Path, manifest: Manifest, build: Callable, make: Make
) -> None:
    first, second = part_of(manifest, range(5)), part_of(manifest, range(5, 9))
    held = [build("first", first), build("second", second)]
    smaller = build("smaller", second, images="jpeg")
    bare = build("bare", second, images="none")
    assert plan_merge(held, tmp_path / "t").metadata.images == held[0].metadata.images
    assert plan_merge([*held, bare], tmp_path / "t").metadata.images == held[0].metadata.images
    for other, why in ((smaller, "second.* as jpeg, size 256"), (bare, "no store holds those of 4 images: `image-5`")):
        plan = plan_merge([held[0], other], tmp_path / "t")
        assert plan.metadata.images is None
        assert plan.left_out[0].startswith("the images' own bytes: ")
        with pytest.raises(StoreError, match=f"the images cannot be merged: .*{why.removeprefix('second.*')}"):
            plan_merge([held[0], other], tmp_path / "t", with_images=True)
    assert merge([held[0], bare], tmp_path / "t").plan.metadata.series.keys() == {"depth"}
    assert not (tmp_path / "t" / "images").exists()


def test_a_merge_that_was_stopped_goes_on_where_it_stopped(tmp_path: Path, make: Make) -> None:
    stores = [make([0, 1, 2, 3]), make([4, 5, 6])]
    seen: list[tuple[int, int]] = []
    stop = {"on_progress": lambda *at: seen.append(at), "should_stop": lambda: len(seen) == 2}
    with pytest.raises(WorkInterrupted, match="2 of 3 shards"):
        merge(stores, tmp_path / "t", **stop)
    assert plan_merge(stores, tmp_path / "t").shards_missing == 1
    assert [merge(stores, tmp_path / "t").shards_written for _ in range(2)] == [1, 0]
    merge(stores, tmp_path / "unbroken")
    assert files_of(tmp_path / "t") == files_of(tmp_path / "unbroken")


MERGE = """\
import sys, time
from pathlib import Path
from dla_cache.merge import merge_stores
from dla_cache.merge_plan import plan_merge
from dla_cache.store import open_store

def told(done, total):
    print(done, flush=True)
    time.sleep(60 if done == 2 else 0)

*sources, target = map(Path, sys.argv[1:])
merge_stores(plan_merge([open_store(path) for path in sources], target), target, on_progress=told)
"""


def test_a_merge_that_was_killed_and_run_again_has_the_bytes_of_an_unbroken_one(tmp_path: Path, make: Make) -> None:
    stores = [make([0, 1, 2, 3], ["audio", "depth"]), make([4, 5, 6], ["audio", "depth"])]
    process = subprocess.Popen(
        [sys.executable, "-c", MERGE, *(store.path for store in stores), tmp_path / "t"],
        env={**os.environ, "PYTHONPATH": str(Path(dla_cache.__file__).parents[1])},
        stdout=subprocess.PIPE,
    )
    assert [process.stdout.readline() for _ in range(2)] == [b"1\n", b"2\n"]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert merge(stores, tmp_path / "t").shards_written == 4
    merge(stores, tmp_path / "unbroken")
    assert files_of(tmp_path / "t") == files_of(tmp_path / "unbroken")


def test_death_before_any_step_to_disk_changes_nothing_of_the_end(
    tmp_path: Path, make: Make, dies_before: Callable
) -> None:
    stores = [make([0, 1]), make([2, 3])]
    merge(stores, tmp_path / "unbroken")
    step, unbroken = 0, files_of(tmp_path / "unbroken")
    while dies_before(step, lambda target=tmp_path / f"t{step}": merge(stores, target)):
        merge(stores, tmp_path / f"t{step}")
        assert files_of(tmp_path / f"t{step}") == unbroken
        step += 3
    assert step > 20


def test_a_target_with_shards_of_another_build_is_refused(tmp_path: Path, make: Make, layout: str) -> None:
    stores = [make([0, 1, 2]), make([3, 4])]
    with pytest.raises(WorkInterrupted):
        merge(stores, tmp_path / "t", should_stop=lambda: True)
    begun = open_store(tmp_path / "t")
    begun.withdraw("depth", {0: begun.committed("depth")[0]})
    begun.write_shard("depth", begun.shards[0], stores[0].read("depth", np.array([2, 1, 0])), seconds=0, device="cuda")
    with pytest.raises(CorruptShardError, match=r"`depth` in .*t` is not what the merged stores hold"):
        merge(stores, tmp_path / "t")


def test_damage_is_refused_before_anything_is_taken_from_its_shard(tmp_path: Path, make: Make) -> None:
    stores = [make([0, 1, 2, 3]), make([4, 5, 6])]
    path = stores[1].shard_path("depth", 0)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptShardError, match=f"depth, shard 0 of `{stores[1].path}` is damaged"):
        merge([stores[0], open_store(stores[1].path)], tmp_path / "t", shard_size=4)
    assert [*open_store(tmp_path / "t").committed("depth")] == [0]


def test_a_removal_during_a_merge_is_told(tmp_path: Path, make: Make) -> None:
    stores = [make([0, 1, 2]), make([3, 4])]
    removed: list[str] = []

    def remove(done: int, total: int) -> None:
        if done == total:
            take_down([stores[0].path], ["image-1"])
            removed.append("image-1")

    with pytest.raises(StoreError, match="images were removed from"):
        merge(stores, tmp_path / "t", on_progress=remove)
    assert removed
    take_down([tmp_path / "t"], removed)
    stores[0] = open_store(stores[0].path)
    assert merge(stores, tmp_path / "t").content_hash == merge(stores, tmp_path / "u").content_hash


def test_a_conversion_to_fewer_bits_merges_with_its_like_only(tmp_path: Path, make: Make, layout: str) -> None:
    stores = [make([0, 1, 2]), make([3, 4])]
    for number, store in enumerate(stores):
        convert_store(store, tmp_path / f"{number}", layout, dtypes={"depth": "int8"})
    small = [open_store(tmp_path / f"{number}") for number in range(2)]
    with pytest.raises(StoreError, match="`depth` of another recipe"):
        plan_merge([small[0], stores[1]], tmp_path / "t")
    report = merge([small[0]], tmp_path / "t", shard_size=2)
    assert report.content_hash == small[0].content_hash()
