"""The Zarr layout: stock Zarr reads what is written, and our bytes are what its specification says."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zarr

from dla_cache.errors import CorruptShardError
from dla_cache.spec import ORIGINAL_IMAGES
from dla_cache.store import open_store

LAYOUTS = ["zarr"]

FORMATS = [((3, 2, 2), "float16"), ((4,), "float32"), ((2, 5), "int16"), ((3, 7), "uint8"), ((1, 1, 1), "int32")]


def flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x40
    path.write_bytes(content)


@pytest.mark.parametrize(("shape", "dtype"), FORMATS)
@pytest.mark.parametrize("shard_size", [3, 7, 20])
def test_stock_zarr_reads_the_same_values(
    tmp_path: Path, made: SimpleNamespace, shape: tuple[int, ...], dtype: str, shard_size: int
) -> None:
    recipe = made.recipe(shape, dtype)
    latents = made.latents(recipe, 7)
    made.store(tmp_path / "s", recipe, latents, shard_size)
    array = zarr.open_group(tmp_path / "s", mode="r")["latents/depth"]
    assert array.dtype == latents.dtype
    np.testing.assert_array_equal(array[:], latents)


def test_stock_zarr_shows_recipe_and_class_map(tmp_path: Path, made: SimpleNamespace) -> None:
    recipe = made.recipe()
    made.create(tmp_path / "s", made.rows(7), ["cat", "dog"], 3, {"depth": recipe})
    group = zarr.open_group(tmp_path / "s", mode="r")
    told = group.attrs["dla"]
    assert {name: told[name] for name in ("format", "shard_size", "class_names", "recipes")} == {
        "format": "v1",
        "shard_size": 3,
        "class_names": ["cat", "dog"],
        "recipes": {"depth": recipe.hash},
    }
    array = group["latents/depth"]
    told = {"recipe": recipe.model_dump(mode="json"), "recipe_hash": recipe.hash, "numbers": "as they are"}
    assert array.attrs["dla"] == told
    assert array.metadata.dimension_names == ("image", "channel", "height", "width")
    assert list(group["latents"].array_keys()) == ["depth"]


def test_stock_zarr_notices_a_flipped_byte_through_our_checksums(tmp_path: Path, made: SimpleNamespace) -> None:
    store = made.store(tmp_path / "s", recipe := made.recipe(), made.latents(recipe, 3), 3)
    flip_byte(store.shard_path("depth", 0), 5)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_group(tmp_path / "s", mode="r")["latents/depth"][0]


def test_the_index_of_a_short_tail_marks_what_is_not_there(tmp_path: Path, made: SimpleNamespace) -> None:
    store = made.store(tmp_path / "s", recipe := made.recipe(), made.latents(recipe, 4), 3)
    content = store.shard_path("depth", 1).read_bytes()
    index = np.frombuffer(content[-(3 * 16 + 4) : -4], "<u8").reshape(3, 2)
    stride = 3 * 2 * 2 * 2 + 4
    # Sharding codec of Zarr: offset and size, 2**64 - 1 for a chunk that is absent.
    assert index.tolist() == [[0, stride], [2**64 - 1] * 2, [2**64 - 1] * 2]


def test_a_flipped_bit_at_any_place_is_noticed_by_reading(tmp_path: Path, made: SimpleNamespace) -> None:
    store = made.store(tmp_path / "s", recipe := made.recipe(), made.latents(recipe, 7), 3)
    path = store.shard_path("depth", 1)
    for offset in range(path.stat().st_size):
        flip_byte(path, offset)
        with pytest.raises(CorruptShardError, match="shard 1 of `depth`"):
            open_store(store.path).read("depth", np.arange(7))
        flip_byte(path, offset)
    open_store(store.path).read("depth", np.arange(7))


def test_image_bytes_beside_the_arrays_do_not_disturb_stock_zarr(tmp_path: Path, made: SimpleNamespace) -> None:
    recipe = made.recipe()
    store = made.create(tmp_path / "s", made.rows(3), [], 3, {"depth": recipe}, images=ORIGINAL_IMAGES)
    latents = made.latents(recipe, 3)
    store.write_shard("depth", store.shards[0], latents, seconds=0, device="cpu")
    group = zarr.open_group(tmp_path / "s", mode="r")
    assert group.attrs["dla"]["images"] == {"encoding": "original"}
    np.testing.assert_array_equal(group["latents/depth"][:], latents)


def test_lost_metadata_of_the_group_of_arrays_is_written_again(tmp_path: Path, made: SimpleNamespace) -> None:
    recipe = made.recipe()
    store = made.store(tmp_path / "s", recipe, made.latents(recipe, 3), 3)
    whole = (store.path / "latents/zarr.json").read_bytes()
    (store.path / "latents/zarr.json").unlink()
    made.create(store.path, made.rows(3), [], 3, {"depth": recipe})
    assert (store.path / "latents/zarr.json").read_bytes() == whole
