"""Metadata that was damaged, or written by hand with its seals made anew, is refused by name."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dla_cache.durable import write_durably
from dla_cache.errors import StoreError
from dla_cache.spec import LARGEST_LATENT, LatentFormat
from dla_cache.store import LatentStore, open_store
from dla_cache.store.commits import CommitLog
from dla_cache.verify import verify_store
from tests.torture.forgery import edit_settings, main_file


@pytest.fixture
def store(tmp_path: Path, made: SimpleNamespace) -> LatentStore:
    recipe = made.recipe()
    return made.store(tmp_path / "s", recipe, made.latents(recipe, 7), 3)


@pytest.mark.parametrize("is_consolidated", [False, True])
def test_any_flipped_byte_of_a_commit_record_is_refused(store: LatentStore, is_consolidated: bool) -> None:
    if is_consolidated:
        store.consolidate("depth")
    path = sorted((store.path / "commits" / "depth").glob("[!.]*"))[0]
    content = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(content), 40).tolist():
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(StoreError, match=f"commit record `.*{path.name}` is damaged"):
            open_store(store.path).content_hash()
    path.write_bytes(content)
    assert open_store(store.path).content_hash() == store.content_hash()


@pytest.mark.parametrize("size", [0, -5, 5.5, "5", 10**13, True])
def test_a_shard_size_that_cannot_be_is_refused(store: LatentStore, size: object) -> None:
    edit_settings(store.path, lambda settings: settings.update(shard_size=size))
    with pytest.raises(StoreError, match=r"`shard_size` is .*, where 1 to 1,000,000 is possible"):
        open_store(store.path)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", ""])
def test_a_main_file_that_is_no_json_is_named(store: LatentStore, text: str) -> None:
    main_file(store.path).write_text(text)
    with pytest.raises(StoreError, match=f"`{main_file(store.path).name}` is no JSON"):
        open_store(store.path)


def test_a_record_of_a_shard_that_is_not_planned_is_noticed_and_does_not_count(store: LatentStore) -> None:
    content_hash = store.content_hash()
    folder = store.path / "commits" / "depth"
    record = store.committed("depth")[2].model_copy(update={"shard": 77})
    assert CommitLog(folder).commit_once(77, lambda: record)
    assert len(list(folder.glob("77-*.json"))) == 1
    assert open_store(store.path).content_hash() == content_hash
    assert [problem.where for problem in verify_store(open_store(store.path)).problems] == ["depth, shard 77"]


def test_a_latent_of_ten_terabytes_is_refused() -> None:
    axes = ("token", "channel")
    LatentFormat(kind="continuous", shape=(LARGEST_LATENT // 4, 4), axes=axes, dtype="float16")
    with pytest.raises(ValueError, match="has more than 268,435,456 numbers"):
        LatentFormat(kind="continuous", shape=(10**13, 1), axes=axes, dtype="float16")


def test_a_link_in_place_of_a_temporary_file_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / ".x.tmp").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        write_durably(tmp_path / "x", b"new")
    assert victim.read_bytes() == b"precious"


def test_a_store_that_goes_while_it_is_verified_is_a_problem_and_no_crash(store: LatentStore) -> None:
    opened = open_store(store.path)
    next(store.path.glob("rows/index-*")).unlink()
    assert "row table" in [problem.where for problem in verify_store(opened).problems]
