"""Repair: what is damaged is noticed and made again, what is intact stays, whenever the process dies."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dla_cache.build import BuildReport, build_cache
from dla_cache.errors import CorruptShardError, WorkInterrupted
from dla_cache.manifest import Manifest
from dla_cache.spec import CacheSpec
from dla_cache.store import open_store
from dla_cache.store.commits import CommitLog
from dla_cache.verify import verify_store

Build = Callable[..., BuildReport]


@pytest.fixture
def build(tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable) -> Build:
    """Builds the same store of 23 images in five shards, again and again."""

    def run(**options: object) -> BuildReport:
        options = {"open_source": open_source, **options}
        return build_cache(manifest, spec, tmp_path / "s", **options)

    return run


def test_a_record_of_a_shard_that_is_not_planned_goes_with_a_repair(tmp_path: Path, build: Build) -> None:
    build()
    store = open_store(tmp_path / "s")
    record = store.committed("depth")[2].model_copy(update={"shard": 77})
    assert CommitLog(tmp_path / "s" / "commits" / "depth").commit_once(77, lambda: record)
    assert [problem.where for problem in verify_store(store).problems] == ["depth, shard 77"]
    report = build(repair=True)
    assert (report.shards_repaired, report.content_hash) == (0, store.content_hash())
    assert verify_store(open_store(tmp_path / "s")).problems == ()


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


def shard_path(store: Path, shard: int) -> Path:
    return open_store(store).shard_path("depth", shard)


@pytest.mark.parametrize(
    "loss",
    [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: (path.unlink(), path.mkdir())],
    ids=["gone", "truncated", "a folder"],
)
def test_a_build_notices_a_committed_shard_without_its_file(tmp_path: Path, build: Build, loss: Callable) -> None:
    build()
    path = shard_path(tmp_path / "s", 3)
    loss(path)
    with pytest.raises(CorruptShardError, match=rf"1 committed shards of `depth`.*`3` \(`{path}`\)\nhint: .*--repair"):
        build()


def test_a_build_looks_at_the_shards_of_its_own_rank_only(tmp_path: Path, build: Build) -> None:
    build()
    shard_path(tmp_path / "s", 3).unlink()
    assert build(rank=0, world_size=2).images_encoded == 0
    with pytest.raises(CorruptShardError):
        build(rank=1, world_size=2)


def test_a_build_reads_no_shard_unless_it_repairs(tmp_path: Path, build: Build) -> None:
    content_hash = build().content_hash
    flip_byte(shard_path(tmp_path / "s", 3))
    assert build().content_hash == content_hash
    assert build(repair=True).shards_repaired == 1


@pytest.mark.parametrize("damage", [flip_byte, Path.unlink, lambda path: path.write_bytes(b"")])
def test_what_is_damaged_is_made_again_and_nothing_else(
    tmp_path: Path, manifest: Manifest, build: Build, damage: Callable
) -> None:
    content_hash = build().content_hash
    for shard in (1, 3):
        damage(shard_path(tmp_path / "s", shard))
    intact = [shard_path(tmp_path / "s", shard) for shard in (0, 2, 4)]
    before = {path: path.stat().st_mtime_ns for path in intact}
    report = build(repair=True)
    assert (report.shards_repaired, report.shards_changed) == (2, ())
    assert (report.images_encoded, report.shards_committed) == (10, 2)
    assert report.content_hash == content_hash
    assert before == {path: path.stat().st_mtime_ns for path in intact}
    assert verify_store(open_store(tmp_path / "s"), manifest).problems == ()
    assert build(repair=True).shards_repaired == 0


def test_a_rank_repairs_its_own_shards(tmp_path: Path, build: Build) -> None:
    build()
    for shard in (1, 2):
        flip_byte(shard_path(tmp_path / "s", shard))
    assert build(repair=True, rank=0, world_size=2).images_encoded == 5
    assert {problem.where for problem in verify_store(open_store(tmp_path / "s")).problems} == {"depth, shard 1"}


def test_a_record_that_is_not_of_its_shard_is_noticed_and_made_again(tmp_path: Path, build: Build) -> None:
    content_hash = build().content_hash
    (path,) = (tmp_path / "s" / "commits" / "depth").iterdir()
    records = open_store(tmp_path / "s").committed("depth")
    path.unlink()
    for record in records.values():
        changes = {"recipe_hash": "1" * 64} if record.shard == 3 else {}
        text = record.model_copy(update=changes).model_dump_json()
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        (path.parent / f"{record.shard}-{name}.json").write_text(text)
    with pytest.raises(CorruptShardError, match="`3`"):
        build()
    report = build(repair=True)
    assert (report.shards_repaired, report.content_hash) == (1, content_hash)


def test_latents_that_are_others_when_made_again_are_named(tmp_path: Path, build: Build, open_source: Callable) -> None:
    class Shifted(open_source):
        """Another version of a library: the same recipe, other numbers."""

        def encode(self, pixels: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
            return super().encode(pixels, seeds) + 1

    content_hash = build().content_hash
    flip_byte(shard_path(tmp_path / "s", 3))
    report = build(repair=True, open_source=Shifted)
    assert (report.shards_repaired, report.shards_changed) == (1, ("depth, shard 3",))
    assert report.content_hash not in (None, content_hash)


def test_a_repair_can_be_asked_to_stop_while_it_reads(tmp_path: Path, build: Build) -> None:
    build()
    flip_byte(shard_path(tmp_path / "s", 3))
    with pytest.raises(WorkInterrupted, match="5 of 5 shards"):
        build(repair=True, should_stop=lambda: True)
    assert build(repair=True).shards_repaired == 1


def test_death_at_any_step_of_a_repair_loses_nothing_intact_and_ends_whole(
    tmp_path: Path, made: SimpleNamespace, spec: CacheSpec, open_source: Callable, dies_before: Callable
) -> None:
    manifest = made.manifest(tmp_path / "few", 12)
    deaths = 0
    while True:
        path = tmp_path / f"killed-at-{deaths}"
        # The first shard in a consolidated file, the others in loose ones.
        whole = build_cache(manifest, spec, path, open_source=open_source)
        store = open_store(path)
        latents = store.read("depth", np.arange(12))
        store.withdraw("depth", {shard: store.committed("depth")[shard] for shard in (1, 2)})
        for shard in store.shards[1:]:
            store.write_shard("depth", shard, latents[shard.start : shard.stop], seconds=0, device="cpu")
        damaged = store.committed("depth")[1]
        flip_byte(store.shard_path("depth", 1))
        repair = functools.partial(build_cache, manifest, spec, path, open_source=open_source, repair=True)
        if not dies_before(deaths, repair):
            break
        deaths += 1
        after = open_store(path)
        left = after.committed("depth")
        assert {0, 2} <= left.keys()
        after.read("depth", np.array([0, 1, 2, 3, 4, 10, 11]))
        if left.get(1) != damaged and 1 in left:
            assert verify_store(after).problems == (), "a new record vouches for bad bytes"
        assert repair().content_hash == whole.content_hash
        assert list(path.rglob(".*")) == []
        assert verify_store(open_store(path), manifest).problems == ()
    assert deaths > 12, "the steps of a repair were not watched"
