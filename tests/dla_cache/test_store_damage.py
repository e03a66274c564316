"""Damage: one flipped byte anywhere is noticed, by reading and by verifying, and named."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dla_cache.errors import CorruptShardError, StoreError
from dla_cache.store import LatentStore, open_store
from dla_cache.store.commits import CommitLog
from dla_cache.verify import shard_problems, verify_store


@pytest.fixture
def store(tmp_path: Path, made: SimpleNamespace) -> LatentStore:
    """Seven images in shards of three, the last shard short."""
    recipe = made.recipe()
    return made.store(tmp_path / "s", recipe, made.latents(recipe, 7), 3)


def payload_place(store: LatentStore, row: int) -> int:
    """The byte at which a payload begins in its shard's file."""
    payload = store.read("depth", np.array([row])).tobytes()
    return store.shard_path("depth", row // 3).read_bytes().index(payload)


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def problems(store: LatentStore) -> str:
    return "\n".join(f"{problem.where}: {problem.what}" for problem in verify_store(open_store(store.path)).problems)


def test_a_flipped_bit_at_any_place_of_a_shard_is_noticed_and_never_read_as_a_latent(store: LatentStore) -> None:
    latents = store.read("depth", np.arange(7))
    record = store.committed("depth")[1]
    refused = []
    for path in store.shard_files("depth", 1):
        # Of what lies between payloads, as a tar has it, each 41st byte is enough.
        content = path.read_bytes()
        for offset in range(0, len(content), 1 if path.suffix != ".tar" else 41):
            flip_bit(path, offset, bit=offset % 8)
            try:
                np.testing.assert_array_equal(open_store(store.path).read("depth", np.arange(7)), latents)
            except CorruptShardError as error:
                refused.append(error.message)
            (problem,) = shard_problems(store, "depth", store.shards[1], record)
            assert problem.where == "depth, shard 1"
            path.write_bytes(content)
    assert {message.partition(" is damaged")[0] for message in refused} == {"shard 1 of `depth`"}
    assert problems(store) == ""


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_flipped_bit_at_any_place_of_a_payload_is_noticed_by_reading(store: LatentStore, position: int) -> None:
    path, start = store.shard_path("depth", 1), payload_place(store, 3 + position)
    for offset in range(start, start + 24):
        flip_bit(path, offset, bit=offset % 8)
        with pytest.raises(CorruptShardError, match=f"shard 1 of `depth` is damaged at `image-{3 + position}`"):
            open_store(store.path).read("depth", np.arange(7))
        flip_bit(path, offset, bit=offset % 8)


@pytest.mark.parametrize(("position", "image_id"), [(0, "image-3"), (1, "image-4"), (2, "image-5")])
def test_the_damaged_image_is_named_and_the_others_are_read(store: LatentStore, position: int, image_id: str) -> None:
    flip_bit(store.shard_path("depth", 1), payload_place(store, 3 + position) + 7)
    with pytest.raises(CorruptShardError, match=f"damaged at `{image_id}`:"):
        store.read("depth", np.arange(7))
    assert f"checksum: `{image_id}`" in problems(store)
    others = np.array([row for row in range(7) if row != 3 + position])
    assert len(store.read("depth", others)) == 6


def test_damage_in_two_shards_names_the_images_of_the_shard_it_names(store: LatentStore) -> None:
    for row in (0, 6):
        flip_bit(store.shard_path("depth", row // 3), payload_place(store, row))
    with pytest.raises(CorruptShardError, match="shard 0 of `depth` is damaged at `image-0`:"):
        store.read("depth", np.array([6, 5, 0]))


@pytest.mark.parametrize("file", [0, -1])
@pytest.mark.parametrize("kept_bytes", [0, 1, 28, 60, -1])
def test_a_truncated_shard_is_noticed(store: LatentStore, kept_bytes: int, file: int) -> None:
    path = store.shard_files("depth", 1)[file]
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(CorruptShardError, match=r"shard 1 of `depth`.*`image-3`"):
        store.read("depth", np.array([4]))
    assert "depth, shard 1" in problems(store)


@pytest.mark.parametrize("file", [0, -1])
def test_a_lost_shard_is_noticed(store: LatentStore, file: int) -> None:
    store.shard_files("depth", 2)[file].unlink()
    with pytest.raises(CorruptShardError, match=r"shard 2 of `depth`.*`image-6`"):
        store.read("depth", np.array([6]))
    assert "depth, shard 2: [Errno 2]" in problems(store)


def test_a_shard_of_other_latents_is_noticed_by_verify(
    store: LatentStore, tmp_path: Path, made: SimpleNamespace
) -> None:
    other = made.store(tmp_path / "other", store.recipe("depth"), made.latents(store.recipe("depth"), 7, seed=1), 3)
    for old, new in zip(store.shard_files("depth", 1), other.shard_files("depth", 1), strict=True):
        old.write_bytes(new.read_bytes())
    assert "depth, shard 1: the file is whole but not the one that was committed" in problems(store)


def test_a_shard_of_fewer_images_with_a_record_of_its_own_is_one_error(
    store: LatentStore, tmp_path: Path, made: SimpleNamespace
) -> None:
    recipe = store.recipe("depth")
    few = made.store(tmp_path / "few", recipe, made.latents(recipe, 4), 3)
    for old, new in zip(store.shard_files("depth", 1), few.shard_files("depth", 1), strict=True):
        old.write_bytes(new.read_bytes())
    records = [next((path / "commits" / "depth").glob("1-*.json")) for path in (store.path, few.path)]
    records[0].with_name(records[1].name).write_bytes(records[1].read_bytes())
    records[0].unlink()
    with pytest.raises(CorruptShardError, match="its record is of 1 images, 3 are planned"):
        open_store(store.path).read("depth", np.array([5]))


def test_two_samples_that_changed_places_are_noticed_by_verify(store: LatentStore) -> None:
    layout = store.layout_of("depth")
    payloads = [sample.tobytes() for sample in store.read("depth", np.array([4, 3, 5]))]
    for path, content in zip(
        store.shard_files("depth", 1), layout.encode(["image-3", "image-4", "image-5"], payloads), strict=True
    ):
        path.write_bytes(content)
    assert "depth, shard 1: its samples are not those that were committed" in problems(store)


def test_a_changed_record_is_noticed_by_verify(store: LatentStore) -> None:
    record = next((store.path / "commits" / "depth").glob("1-*.json"))
    text = record.read_text()
    mean = store.committed("depth")[1].statistics["train"].mean[0]
    changed = text.replace(str(mean), str(mean + 1))
    record.unlink()
    name = hashlib.sha256(changed.encode()).hexdigest()[:16]
    record.with_name(f"1-{name}.json").write_text(changed)
    assert problems(store) == "depth, shard 1: its statistics are not those of its samples"


def test_a_damaged_record_is_one_error(store: LatentStore) -> None:
    record = next((store.path / "commits" / "depth").glob("1-*.json"))
    record.write_bytes(record.read_bytes()[:-20])
    with pytest.raises(StoreError, match=r"1-.*\.json` is damaged"):
        open_store(store.path).read("depth", np.array([0]))


def test_a_damaged_consolidated_record_is_one_error(store: LatentStore) -> None:
    store.consolidate("depth")
    (record,) = (store.path / "commits" / "depth").iterdir()
    record.write_bytes(record.read_bytes()[:-20])
    with pytest.raises(StoreError, match="is damaged"):
        open_store(store.path).committed("depth")


def test_the_whole_files_of_another_shard_are_not_read_for_its_own(store: LatentStore) -> None:
    files = [store.shard_files("depth", shard) for shard in (0, 1)]
    contents = [[path.read_bytes() for path in shard] for shard in files]
    for shard, others in zip(files, reversed(contents), strict=True):
        for path, content in zip(shard, others, strict=True):
            path.write_bytes(content)
    said = r"damaged at `image-\d`, `image-\d`: its checksum is not the one that was committed"
    for row in (0, 5):
        with pytest.raises(CorruptShardError, match=said):
            open_store(store.path).read("depth", np.array([row]))


@pytest.mark.parametrize("change", [{"modality": "audio"}, {"recipe_hash": "0" * 64}])
def test_a_record_of_another_series_or_recipe_vouches_for_nothing(store: LatentStore, change: dict[str, str]) -> None:
    log = CommitLog(store.path / "commits" / "depth")
    record = log.read()[0]
    log.withdraw({0: record})
    log.commit_once(0, lambda: record.model_copy(update=change))
    with pytest.raises(CorruptShardError, match=r"its record is of `"):
        open_store(store.path).read("depth", np.arange(3))
    assert open_store(store.path).read("depth", np.arange(3, 7)).shape[0] == 4
