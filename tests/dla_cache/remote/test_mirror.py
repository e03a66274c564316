"""The mirror of a store that lies elsewhere: in another folder here, which fails at no time and asks no server."""

import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import pytest

from dla_cache.build import BuildProgress, build_cache
from dla_cache.errors import CorruptShardError, RecipeMismatchError, SpecError, StoreError, WorkInterrupted
from dla_cache.housekeeping import measure_usage, prune_store
from dla_cache.manifest import Manifest
from dla_cache.remote import FolderObjects, ObjectStat
from dla_cache.spec import CacheSpec, Modality
from dla_cache.store import LatentStore, create_store, mirror, open_store, turns
from dla_cache.store.claims import Claims
from dla_cache.verify import verify_store

LAYOUTS = ["zarr"]
URL = "s3://bucket/store"


class Death(BaseException):
    """Ends the process as far as our code can see: no handler of ours catches it."""


class Elsewhere(FolderObjects):
    """A folder under the name of a prefix; `meanwhile` is called once, before what begins with `before` is written."""

    url = URL

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.before = "zarr.json"
        self.meanwhile: Callable[[], object] = lambda: None
        self.down = "nothing"
        """No object whose name begins so can be read."""
        self.changes_left = sys.maxsize
        """After so many changes the process is dead."""

    def create(self, name: str, content: bytes) -> bool:
        self._step(name)
        return super().create(name, content)

    def replace(self, name: str, content: bytes, etag: str) -> bool:
        self._step(name)
        return super().replace(name, content, etag)

    def write(self, name: str, content: bytes) -> None:
        self._step(name)
        super().write(name, content)

    def delete(self, name: str) -> None:
        self._step(name)
        super().delete(name)

    def read(self, name: str) -> bytes:
        if name.startswith(self.down):
            raise StoreError("the server does not answer", hint="wait")
        return super().read(name)

    def read_into(self, name: str, file: BinaryIO, stat: ObjectStat) -> None:
        file.write(self.read(name))

    def _step(self, name: str) -> None:
        if not self.changes_left:
            raise Death
        self.changes_left -= 1
        if name.startswith(self.before):
            meanwhile, self.meanwhile = self.meanwhile, lambda: None
            meanwhile()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    """What `s3://bucket/store` leads to."""
    made = Elsewhere(tmp_path / "elsewhere")
    monkeypatch.setattr(mirror, "open_objects", lambda _: made)
    monkeypatch.setattr(mirror, "POLL_S", 0.01)
    monkeypatch.setattr(turns, "POLL_S", 0.01)
    monkeypatch.setenv("DLA_CACHE_DIR", str(tmp_path / "cache"))
    return made


@pytest.fixture
def on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """Stores that are opened in such a block have a mirror of their own."""

    @contextmanager
    def patched() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setenv("DLA_CACHE_DIR", str(tmp_path / "other-cache"))
            yield

    return patched


@pytest.fixture
def store(elsewhere: Elsewhere, made: SimpleNamespace) -> LatentStore:
    """A whole store of 12 images in shards of 4."""
    recipe = made.recipe()
    return made.store(URL, recipe, made.latents(recipe, 12), 4)


def names_of(elsewhere: Elsewhere, beginning: str = "") -> set[str]:
    return set(elsewhere.names(beginning))


def test_what_is_there_is_what_a_store_in_a_folder_has(
    store: LatentStore, elsewhere: Elsewhere, made: SimpleNamespace, tmp_path: Path
) -> None:
    store.consolidate("depth")
    local = made.store(tmp_path / "local", made.recipe(), made.latents(made.recipe(), 12), 4)
    local.consolidate("depth")
    assert names_of(elsewhere) == {
        path.relative_to(local.path).as_posix() for path in local.path.rglob("*") if path.is_file()
    }
    assert open_store(elsewhere.folder).content_hash() == store.content_hash() == local.content_hash()


def test_two_who_add_a_modality_at_once_both_have_theirs(
    store: LatentStore, elsewhere: Elsewhere, made: SimpleNamespace, on_another_machine: Callable
) -> None:
    def add(modality: Modality) -> LatentStore:
        recipe = made.recipe(modality=modality)
        return create_store(URL, made.rows(12), [], 4, {modality.value: recipe})

    def meanwhile() -> None:
        with on_another_machine():
            add(Modality.SHAPE)

    elsewhere.meanwhile = meanwhile
    assert add(Modality.AUDIO).modalities == ("audio", "depth", "shape") == open_store(URL).modalities


def test_of_two_who_begin_a_store_with_other_specs_at_once_the_later_is_refused(
    elsewhere: Elsewhere, made: SimpleNamespace, on_another_machine: Callable
) -> None:
    def begin(seed: int) -> LatentStore:
        return create_store(URL, made.rows(12), [], 4, {"depth": made.recipe(seed=seed)})

    def meanwhile() -> None:
        with on_another_machine():
            begin(1)

    elsewhere.meanwhile = meanwhile
    with pytest.raises(RecipeMismatchError, match=r"`s3://bucket/store` was built from another spec.*`1` → `2`"):
        begin(2)
    assert begin(1).recipe("depth").seed == 1


@pytest.mark.parametrize("name", ["holiday.jpg", "latents/audio/c.0.0", "commits/depth/0-0123456789abcdef.json"])
def test_a_prefix_with_other_things_is_no_place_for_a_new_store(
    elsewhere: Elsewhere, made: SimpleNamespace, name: str
) -> None:
    elsewhere.write(name, b"x")
    with pytest.raises(StoreError, match=rf"(?s)`s3://bucket/store` holds other things, such as `{name}`.*hint: "):
        create_store(URL, made.rows(12), [], 4, {"depth": made.recipe()})
    assert names_of(elsewhere) == {name}


def test_a_modality_is_not_added_where_other_things_lie(
    store: LatentStore, elsewhere: Elsewhere, made: SimpleNamespace
) -> None:
    elsewhere.write("latents/audio/notes.txt", b"x")
    with pytest.raises(StoreError, match=r"holds other things, such as `latents/audio/notes\.txt`"):
        create_store(URL, made.rows(12), [], 4, {"audio": made.recipe(modality=Modality.AUDIO)})


def test_a_store_that_is_gone_is_gone_from_the_mirror_and_another_may_begin(
    store: LatentStore, elsewhere: Elsewhere, made: SimpleNamespace
) -> None:
    shutil.rmtree(elsewhere.folder)
    with pytest.raises(StoreError, match="`s3://bucket/store` is no store"):
        open_store(URL)
    recipe = made.recipe(seed=5)
    assert made.store(URL, recipe, made.latents(recipe, 7), 3).missing("depth") == []


def test_an_open_store_sees_what_others_commit_and_withdraw(
    elsewhere: Elsewhere, made: SimpleNamespace, on_another_machine: Callable
) -> None:
    recipe = made.recipe()
    latents = made.latents(recipe, 12)
    reader = create_store(URL, made.rows(12), [], 4, {"depth": recipe})
    with on_another_machine():
        writer = open_store(URL)
    for shard in writer.shards:
        writer.write_shard("depth", shard, latents[shard.start : shard.stop], seconds=1, device="cpu")
        assert sorted(reader.committed("depth")) == list(range(shard.index + 1))
    writer.consolidate("depth")
    assert np.array_equal(reader.read("depth", np.arange(12)), latents)
    writer.withdraw("depth", {1: writer.committed("depth")[1]})
    assert reader.missing("depth") == [1]


def test_a_shard_that_two_committed_at_once_is_whole_and_one_record_stays(
    elsewhere: Elsewhere, made: SimpleNamespace, on_another_machine: Callable
) -> None:
    recipe = made.recipe()
    latents = made.latents(recipe, 4)

    def begin() -> LatentStore:
        return create_store(URL, made.rows(4), [], 4, {"depth": recipe})

    def commit(store: LatentStore, seconds: float) -> bool:
        return store.write_shard("depth", store.shards[0], latents, seconds=seconds, device="cpu")

    def meanwhile() -> None:
        with on_another_machine():
            assert commit(begin(), 2)

    store = begin()
    elsewhere.before, elsewhere.meanwhile = "commits/", meanwhile
    assert commit(store, 1)
    assert not commit(store, 3)
    assert len(names_of(elsewhere, "commits/")) == 2
    assert verify_store(store).problems == ()
    store.consolidate("depth")
    assert len(names_of(elsewhere, "commits/")) == 1
    assert verify_store(store).problems == ()
    assert np.array_equal(store.read("depth", np.arange(4)), latents)


def test_a_damaged_description_is_written_again_by_the_next_build(
    store: LatentStore, elsewhere: Elsewhere, made: SimpleNamespace
) -> None:
    described = elsewhere.read("latents/zarr.json")
    elsewhere.write("latents/zarr.json", b"{}")
    assert [problem.where for problem in verify_store(store).problems] == ["latents/zarr.json"]
    create_store(URL, made.rows(12), [], 4, {"depth": made.recipe()})
    assert elsewhere.read("latents/zarr.json") == described


def test_verify_reads_what_is_there_and_not_the_copies(store: LatentStore, elsewhere: Elsewhere) -> None:
    store.read("depth", np.arange(12))
    assert verify_store(store).problems == ()
    shard = "latents/depth/c.1.0.0.0"
    elsewhere.write(shard, elsewhere.read(shard)[:-1])
    elsewhere.delete("latents/depth/c.2.0.0.0")
    elsewhere.write("holiday.jpg", b"x")
    elsewhere.write("claims/depth/0.1.json", b"")
    found = {problem.where: problem.what for problem in verify_store(store).problems}
    assert found.keys() == {"depth, shard 1", "depth, shard 2", "holiday.jpg"}
    assert found["depth, shard 2"].startswith(f"there is no `{URL}/latents/depth/c.2.0.0.0`")
    part = next(name for name in names_of(elsewhere, "rows/") if name.endswith(".arrow"))
    elsewhere.write(part, elsewhere.read(part)[:-1])
    with pytest.raises(StoreError, match="row table's part `rows/"):
        verify_store(store)


def test_a_server_that_is_down_is_no_damage_and_repair_takes_nothing_out(
    elsewhere: Elsewhere, manifest: Manifest, spec: CacheSpec, open_source: Callable
) -> None:
    build = partial(build_cache, manifest, spec, URL, open_source=open_source)
    build()
    before = names_of(elsewhere)
    store = open_store(URL)
    elsewhere.down = "latents/depth/c"
    for work in (lambda: store.read("depth", np.arange(12)), lambda: verify_store(store), lambda: build(repair=True)):
        with pytest.raises(StoreError, match="the server does not answer") as caught:
            work()
        assert not isinstance(caught.value, CorruptShardError)
    assert names_of(elsewhere) == before


def test_a_builder_that_dies_before_any_change_has_lost_nothing_that_it_committed(
    elsewhere: Elsewhere, manifest: Manifest, spec: CacheSpec, open_source: Callable, tmp_path: Path
) -> None:
    build = partial(build_cache, manifest, spec, URL, open_source=open_source)
    whole = build_cache(manifest, spec, tmp_path / "local", open_source=open_source)
    committed = []
    for changes in range(1, 99, 2):
        shutil.rmtree(elsewhere.folder, ignore_errors=True)
        elsewhere.changes_left = changes
        try:
            build()
        except Death:
            committed.append(5 - len(open_store(URL).missing("depth")) if "zarr.json" in names_of(elsewhere) else 0)
        else:
            break
        elsewhere.changes_left = sys.maxsize
        shutil.rmtree(elsewhere.folder / "claims", ignore_errors=True)  # else it waits for the dead one's to end
        report = build()
        assert (report.content_hash, report.shards_committed) == (whole.content_hash, 5 - committed[-1])
        assert verify_store(open_store(URL), manifest).problems == ()
    assert committed == sorted(committed)
    assert set(committed) == set(range(6))


def test_images_are_appended_under_an_open_store_and_the_former_index_of_rows_goes(
    elsewhere: Elsewhere, made: SimpleNamespace
) -> None:
    recipe = made.recipe()
    latents = made.latents(recipe, 6)
    reader = made.store(URL, recipe, latents, 4)
    grown = create_store(URL, made.rows(9), [], 4, {"depth": recipe}, append=True)
    assert (len(reader.rows), len(grown.rows), len(open_store(URL).rows)) == (6, 9, 9)
    assert len([name for name in names_of(elsewhere, "rows/") if "index" in name]) == 1
    assert np.array_equal(reader.read("depth", np.arange(6)), latents)
    assert grown.missing("depth") == [2]


def test_a_damaged_copy_is_fetched_again_the_next_time(store: LatentStore, tmp_path: Path) -> None:
    store.read("depth", np.arange(4))
    (copy,) = (tmp_path / "cache" / "objects").iterdir()
    copy.write_bytes(bytes(copy.stat().st_size))
    store = open_store(URL)
    with pytest.raises(CorruptShardError, match="shard 0 of `depth` is damaged"):
        store.read("depth", np.arange(4))
    assert len(store.read("depth", np.arange(4))) == 4


def test_no_more_is_mapped_than_the_cache_may_hold(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch, made: SimpleNamespace
) -> None:
    size = store.committed("depth")[0].size_bytes
    monkeypatch.setenv("DLA_CACHE_GB", str(2 * size / 1e9))
    store = open_store(URL)
    rows = np.array([0, 4, 8, 1, 5, 9, 2, 6])
    for _ in range(3):
        assert np.array_equal(store.read("depth", rows), made.latents(made.recipe(), 12)[rows])
        files: Any = store.files
        assert files._mapped_bytes <= 2 * size


def test_two_builders_take_turns_and_one_that_waits_can_be_stopped(
    elsewhere: Elsewhere, manifest: Manifest, spec: CacheSpec, open_source: Callable
) -> None:
    build = partial(build_cache, manifest, spec, URL, open_source=open_source)
    with ThreadPoolExecutor(2) as pool:
        reports = [future.result() for future in [pool.submit(build) for _ in range(2)]]
    assert sum(report.shards_committed for report in reports) == 5
    assert len({report.content_hash for report in reports}) == 1
    assert names_of(elsewhere, "claims/") == set()
    wider = spec.model_copy(update={"latents": (spec.latents[0].model_copy(update={"modality": Modality.SHAPE}),)})
    held = Claims(elsewhere, 60)
    assert held.acquire("shape", 3) == 1
    seen: list[BuildProgress] = []
    with pytest.raises(WorkInterrupted, match="4 of 5"):
        build_cache(
            manifest,
            wider,
            URL,
            open_source=open_source,
            on_progress=seen.append,
            should_stop=lambda: seen[-1].is_waiting,
        )
    assert seen[-1].shard == 3
    held.release("shape", 3, 1)
    assert build_cache(manifest, wider, URL, open_source=open_source).shards_committed == 1


def test_what_changes_a_folder_refuses_a_store_that_is_none(store: LatentStore) -> None:
    for work in (measure_usage, prune_store):
        with pytest.raises(StoreError, match=r"`s3://bucket/store` is no folder.*\nhint: copy the store to a folder"):
            work(store)


def test_a_bound_that_is_no_number_is_refused(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("much", "-1", "nan", "inf", "0"):
        monkeypatch.setenv("DLA_CACHE_GB", text)
        with pytest.raises(SpecError, match=f"`DLA_CACHE_GB` is `{text}`"):
            open_store(URL)
