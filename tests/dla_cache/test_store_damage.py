"""Damage: one flipped byte anywhere is noticed, by reading and by verifying, and named."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dla_cache.errors import CorruptShardError, StoreError
from dla_cache.store import open_store
from dla_cache.store.zarr_store import ZarrStore
from dla_cache.verify import verify_store

PAYLOAD_BYTES = 3 * 2 * 2 * 2
STRIDE = PAYLOAD_BYTES + 4


@pytest.fixture
def store(tmp_path: Path, made: SimpleNamespace) -> ZarrStore:
    """Seven images in shards of three, the last shard short."""
    recipe = made.recipe()
    return made.store(tmp_path / "s", recipe, made.latents(recipe, 7), 3)


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def problems(store: ZarrStore) -> str:
    return "\n".join(f"{problem.where}: {problem.what}" for problem in verify_store(open_store(store.path)).problems)


def test_a_flipped_bit_at_any_place_of_a_shard_is_noticed(store: ZarrStore) -> None:
    path = store.shard_path("depth", 1)
    for offset in range(path.stat().st_size):
        flip_bit(path, offset, bit=offset % 8)
        with pytest.raises(CorruptShardError, match="shard 1 of `depth`"):
            open_store(store.path).read("depth", np.arange(7))
        assert "depth, shard 1" in problems(store)
        flip_bit(path, offset, bit=offset % 8)
    assert problems(store) == ""


@pytest.mark.parametrize(("position", "image_id"), [(0, "image-3"), (1, "image-4"), (2, "image-5")])
def test_the_damaged_image_is_named_and_the_others_are_read(store: ZarrStore, position: int, image_id: str) -> None:
    flip_bit(store.shard_path("depth", 1), position * STRIDE + 7)
    with pytest.raises(CorruptShardError, match=f"damaged at `{image_id}`:"):
        store.read("depth", np.arange(7))
    assert f"checksum: `{image_id}`" in problems(store)
    others = np.array([row for row in range(7) if row != 3 + position])
    assert len(store.read("depth", others)) == 6


def test_damage_in_two_shards_names_the_images_of_the_shard_it_names(store: ZarrStore) -> None:
    flip_bit(store.shard_path("depth", 0), 0)
    flip_bit(store.shard_path("depth", 2), 0)
    with pytest.raises(CorruptShardError, match="shard 0 of `depth` is damaged at `image-0`:"):
        store.read("depth", np.array([6, 5, 0]))


@pytest.mark.parametrize("kept_bytes", [0, 1, STRIDE, 3 * STRIDE, -1])
def test_a_truncated_shard_is_noticed(store: ZarrStore, kept_bytes: int) -> None:
    path = store.shard_path("depth", 1)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(CorruptShardError, match=r"shard 1 of `depth`.*`image-3`"):
        store.read("depth", np.array([4]))
    assert "depth, shard 1" in problems(store)


def test_a_lost_shard_is_noticed(store: ZarrStore) -> None:
    store.shard_path("depth", 2).unlink()
    with pytest.raises(CorruptShardError, match=r"shard 2 of `depth`.*`image-6`"):
        store.read("depth", np.array([6]))
    assert "depth, shard 2: [Errno 2]" in problems(store)


def test_a_shard_of_other_latents_is_noticed_by_verify(store: ZarrStore, tmp_path: Path, made: SimpleNamespace) -> None:
    other = made.store(tmp_path / "other", store.recipe("depth"), made.latents(store.recipe("depth"), 7, seed=1), 3)
    store.shard_path("depth", 1).write_bytes(other.shard_path("depth", 1).read_bytes())
    assert "depth, shard 1: the file is whole but not the one that was committed" in problems(store)


def test_two_samples_that_changed_places_are_noticed_by_verify(store: ZarrStore) -> None:
    path = store.shard_path("depth", 1)
    content = path.read_bytes()
    path.write_bytes(content[STRIDE : 2 * STRIDE] + content[:STRIDE] + content[2 * STRIDE :])
    assert "depth, shard 1: its samples are not those that were committed" in problems(store)


def test_a_changed_record_is_noticed_by_verify(store: ZarrStore) -> None:
    record = next((store.path / "commits" / "depth").glob("1-*.json"))
    text = record.read_text()
    mean = store.committed("depth")[1].statistics["train"].mean[0]
    record.write_text(text.replace(str(mean), str(mean + 1)))
    assert problems(store) == "depth, shard 1: its statistics are not those of its samples"


def test_a_damaged_record_is_one_error(store: ZarrStore) -> None:
    record = next((store.path / "commits" / "depth").glob("1-*.json"))
    record.write_bytes(record.read_bytes()[:-20])
    with pytest.raises(StoreError, match=r"1-.*\.json` is damaged"):
        open_store(store.path).read("depth", np.array([0]))


def test_a_damaged_consolidated_record_is_one_error(store: ZarrStore) -> None:
    store.consolidate("depth")
    (record,) = (store.path / "commits" / "depth").iterdir()
    record.write_bytes(record.read_bytes()[:-20])
    with pytest.raises(StoreError, match="is damaged"):
        open_store(store.path).committed("depth")
