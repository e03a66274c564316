"""Converting: the other layout holds the same, fewer bits nearly so, whenever it was stopped; no damage passes."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dla_cache.build import build_cache
from dla_cache.errors import (
    CorruptShardError,
    IncompleteBuildError,
    RecipeMismatchError,
    SpecError,
    StoreError,
    WorkInterrupted,
)
from dla_cache.manifest import Manifest
from dla_cache.spec import CacheSpec
from dla_cache.store import LatentStore, open_store
from dla_cache.store.exchange import convert_store
from dla_cache.store.parts import CARD
from dla_cache.verify import verify_store

OTHER = {"zarr": "webdataset", "webdataset": "zarr"}


@pytest.fixture
def store(tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable) -> LatentStore:
    with_images = spec.model_copy(update={"images": "original"})
    build_cache(manifest, with_images, tmp_path / "s", open_source=open_source)
    return open_store(tmp_path / "s")


def test_there_and_back_every_byte_and_record_is_the_same(
    tmp_path: Path, manifest: Manifest, store: LatentStore, layout: str
) -> None:
    report = convert_store(store, tmp_path / "other", OTHER[layout])
    assert (report.content_hash, report.shards_written) == (store.content_hash(), 10)
    other = open_store(tmp_path / "other")
    assert (other.layout_name, other.series) == (OTHER[layout], store.series)
    np.testing.assert_array_equal(other.read("depth", np.arange(23)), store.read("depth", np.arange(23)))
    assert other.read_images(np.arange(23)) == store.read_images(np.arange(23))
    assert verify_store(other, manifest).problems == ()
    for series in store.series:
        for shard, before in store.committed(series).items():
            files = {"size_bytes", "file_sha256", "edge_crc32c"}
            after = other.committed(series)[shard]
            assert after.model_dump(exclude=files) == before.model_dump(exclude=files)
    convert_store(other, tmp_path / "back", layout)
    for path in store.path.rglob("*"):
        if path.is_file() and path.name != CARD:
            assert (tmp_path / "back" / path.relative_to(store.path)).read_bytes() == path.read_bytes()


def test_a_conversion_that_was_stopped_goes_on_where_it_stopped(
    tmp_path: Path, store: LatentStore, layout: str
) -> None:
    seen: list[tuple[int, int]] = []
    with pytest.raises(WorkInterrupted, match="3 of 10 shards"):
        convert_store(
            store,
            tmp_path / "other",
            OTHER[layout],
            on_progress=lambda *at: seen.append(at),
            should_stop=lambda: len(seen) == 3,
        )
    assert convert_store(store, tmp_path / "other", OTHER[layout]).shards_written == 7
    assert convert_store(store, tmp_path / "other", OTHER[layout]).shards_written == 0
    assert verify_store(open_store(tmp_path / "other")).problems == ()


def test_an_incomplete_store_is_refused(tmp_path: Path, store: LatentStore, layout: str) -> None:
    store.withdraw("images", {2: store.committed("images")[2]})
    with pytest.raises(IncompleteBuildError, match="lacks 1 of 5 shards of `images`: `2`"):
        convert_store(store, tmp_path / "other", OTHER[layout])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("series", ["depth", "images"])
def test_damage_is_refused_before_it_is_copied(tmp_path: Path, store: LatentStore, layout: str, series: str) -> None:
    path = store.shard_path(series, 2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptShardError, match=f"{series}, shard 2 of .* is damaged"):
        convert_store(open_store(store.path), tmp_path / "other", OTHER[layout])
    assert 2 not in open_store(tmp_path / "other").committed(series)


def test_a_target_that_holds_something_else_is_refused(
    tmp_path: Path, store: LatentStore, layout: str, made: SimpleNamespace
) -> None:
    with pytest.raises(StoreError, match=r"is the store to read\nhint: "):
        convert_store(store, tmp_path / "." / "s", OTHER[layout])
    made.create(tmp_path / "other", made.rows(7), [], 5, {}, layout=OTHER[layout])
    with pytest.raises(RecipeMismatchError, match="row table"):
        convert_store(store, tmp_path / "other", OTHER[layout])


def test_a_target_with_shards_of_another_build_is_refused(tmp_path: Path, store: LatentStore, layout: str) -> None:
    other = tmp_path / "other"
    with pytest.raises(WorkInterrupted):
        convert_store(store, other, OTHER[layout], should_stop=lambda: True)
    begun = open_store(other)
    begun.withdraw("depth", {0: begun.committed("depth")[0]})
    latents = store.read("depth", np.arange(5)) + np.float16(1)
    begun.write_shard("depth", store.shards[0], latents, seconds=0, device="cuda")
    with pytest.raises(CorruptShardError, match=r"shard 0 of `depth` in .*other[\s\S]*another build"):
        convert_store(store, other, OTHER[layout])


@pytest.mark.parametrize(("dtype", "share"), [("int8", 1 / 254), ("bfloat16", 2.0**-8)])
def test_fewer_bits_are_near_the_source_another_recipe_and_the_loss_is_on_record(
    tmp_path: Path, made: SimpleNamespace, layout: str, dtype: str, share: float
) -> None:
    latents = np.random.default_rng(0).normal(3, 2, (7, 3, 2, 2)).astype(np.float32)
    source = made.store(tmp_path / "s", made.recipe(dtype="float32"), latents, 3)
    report = convert_store(source, tmp_path / "other", OTHER[layout], dtypes={"depth": dtype})
    other = open_store(tmp_path / "other")
    assert report.rounded == {"depth": ("float32", dtype)}
    assert (report.content_hash, report.source_content_hash) == (other.content_hash(), source.content_hash())
    assert report.content_hash != report.source_content_hash
    assert verify_store(other).problems == ()
    before, after = latents.astype(np.float64), other.read("depth", np.arange(7)).astype(np.float64)
    extent = np.ptp(before, axis=(0, 2, 3)) if dtype == "int8" else np.abs(before).max((0, 2, 3))
    assert (np.abs(after - before).max((0, 2, 3)) <= 0.51 * share * extent * (1 if dtype == "int8" else 2)).all()
    for shard in other.shards:
        lost = (after - before)[shard.start : shard.stop]
        error = other.committed("depth")[shard.index].error
        np.testing.assert_allclose(error.rms, np.sqrt((lost**2).mean((0, 2, 3))), rtol=1e-9)
    latent = other.recipe("depth").format
    assert (latent.dtype, latent.rounded_from, latent.built_dtype) == (dtype, ("float32",), "float32")
    assert other.recipe("depth").as_built == source.recipe("depth")
    convert_store(other, tmp_path / "back", layout)
    back = open_store(tmp_path / "back")
    assert (back.content_hash(), back.committed("depth")[0].error) == (
        report.content_hash,
        other.committed("depth")[0].error,
    )


def test_images_and_modalities_that_are_not_named_stay_as_they_are(
    tmp_path: Path, store: LatentStore, layout: str
) -> None:
    report = convert_store(store, tmp_path / "other", layout, dtypes={"depth": "float16"})
    assert (report.rounded, report.content_hash) == ({}, store.content_hash())
    convert_store(store, tmp_path / "small", layout, dtypes={"depth": "int8"})
    small = open_store(tmp_path / "small")
    assert small.read_images(np.arange(23)) == store.read_images(np.arange(23))


def test_a_rounding_that_was_stopped_goes_on_and_is_that_of_an_unbroken_run(
    tmp_path: Path, store: LatentStore, layout: str
) -> None:
    with pytest.raises(WorkInterrupted, match="1 of 10 shards"):
        convert_store(store, tmp_path / "one", layout, dtypes={"depth": "int8"}, should_stop=lambda: True)
    report = convert_store(store, tmp_path / "one", layout, dtypes={"depth": "int8"})
    unbroken = convert_store(store, tmp_path / "two", layout, dtypes={"depth": "int8"})
    assert (report.shards_written, report.content_hash) == (9, unbroken.content_hash)


def test_a_rounding_does_not_go_on_with_shards_of_another_build(
    tmp_path: Path, store: LatentStore, layout: str
) -> None:
    other = tmp_path / "other"
    with pytest.raises(WorkInterrupted):
        convert_store(store, other, layout, dtypes={"depth": "int8"}, should_stop=lambda: True)
    begun = open_store(other)
    begun.withdraw("depth", {0: begun.committed("depth")[0]})
    begun.write_shard("depth", store.shards[0], store.read("depth", np.arange(5, 10)), seconds=0, device="cuda")
    with pytest.raises(CorruptShardError, match=r"shard 0 of `depth` in .*other[\s\S]*another build"):
        convert_store(store, other, layout, dtypes={"depth": "int8"})


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("float16", "float32"), ("float16", "bfloat16"), ("bfloat16", "float16"), ("int16", "int8"), ("int8", "float16")],
)
def test_what_saves_nothing_is_refused(
    tmp_path: Path, made: SimpleNamespace, layout: str, stored: str, wanted: str
) -> None:
    built = {"int8": "float32", "bfloat16": "float32"}.get(stored, stored)
    recipe = made.recipe(dtype=built)
    source = made.store(tmp_path / "s", recipe, made.latents(recipe, 4), 3)
    if built != stored:
        convert_store(source, tmp_path / "t", layout, dtypes={"depth": stored})
        source = open_store(tmp_path / "t")
    with pytest.raises(SpecError, match="holds codes" if stored == "int16" else f"`{wanted}` would save nothing"):
        convert_store(source, tmp_path / "u", layout, dtypes={"depth": wanted})
    assert not (tmp_path / "u").exists()


def test_int8_spans_the_range_of_all_images(tmp_path: Path, made: SimpleNamespace, layout: str) -> None:
    latents = np.zeros((7, 3, 2, 2), np.float16)
    latents[2], latents[5] = 4, 6
    source = made.store(tmp_path / "s", made.recipe(), latents, 3)
    convert_store(source, tmp_path / "t", layout, dtypes={"depth": "int8"})
    quantisation = open_store(tmp_path / "t").recipe("depth").format.quantisation
    assert quantisation.offset == (3, 3, 3)
    np.testing.assert_allclose(quantisation.scale, 6 / 254, rtol=2.0**-14)
