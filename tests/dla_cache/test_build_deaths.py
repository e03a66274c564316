"""Death: SIGKILL at any moment loses nothing committed, and many processes do not harm each other."""

import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import dla_cache
from dla_cache.build import build_cache
from dla_cache.errors import StoreError
from dla_cache.manifest import Manifest
from dla_cache.spec import CacheSpec, Modality
from dla_cache.store import open_store
from dla_cache.verify import verify_store

SCRIPT = Path(__file__).with_name("build_process.py")


def start_build(
    manifest: Manifest, store: Path, layout: str, seconds: float = 0, rank: int = 0, world_size: int = 1
) -> subprocess.Popen:
    arguments = [manifest.root / "manifest.parquet", store, seconds, rank, world_size, layout]
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(dla_cache.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return out.strip()


def n_committed(store: Path) -> int:
    try:
        return len(open_store(store).committed("depth"))
    except StoreError:
        return 0


@pytest.fixture
def unbroken(tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable) -> str:
    return build_cache(manifest, spec, tmp_path / "unbroken", open_source=open_source, batch_size=4).content_hash


def test_a_build_killed_at_three_random_moments_ends_as_an_unbroken_one(
    tmp_path: Path, made: SimpleNamespace, spec: CacheSpec, open_source: Callable
) -> None:
    manifest = made.manifest(tmp_path / "many", 75)
    unbroken = build_cache(manifest, spec, tmp_path / "unbroken", open_source=open_source, batch_size=4).content_hash
    rng = random.Random(0)
    path = tmp_path / "s"
    for kill in range(3):
        before = n_committed(path)
        process = start_build(manifest, path, spec.layout, seconds=0.1)
        while n_committed(path) <= before:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert before < n_committed(path) < 15, f"kill {kill} did not fall between the first and the last commit"
    assert finish(start_build(manifest, path, spec.layout)) == unbroken
    assert verify_store(open_store(path), manifest).problems == ()


def test_death_before_any_step_to_disk_loses_nothing_committed(
    tmp_path: Path, made: SimpleNamespace, spec: CacheSpec, open_source: Callable, dies_before: Callable
) -> None:
    manifest = made.manifest(tmp_path / "few", 7)
    unbroken = build_cache(manifest, spec, tmp_path / "unbroken", open_source=open_source).content_hash
    deaths = 0
    while True:
        path = tmp_path / f"killed-at-{deaths}"
        build = functools.partial(build_cache, manifest, spec, path, open_source=open_source)
        if not dies_before(deaths, build):
            break
        deaths += 1
        committed = n_committed(path)
        if committed:
            store = open_store(path)
            done = [shard for shard in store.shards if shard.index in store.committed("depth")]
            store.read("depth", np.concatenate([np.arange(shard.start, shard.stop) for shard in done]))
        again = build()
        assert again.content_hash == unbroken
        assert again.shards_committed == 2 - committed
        assert list(path.rglob(".*")) == []
        assert verify_store(open_store(path), manifest).problems == ()
    assert deaths > 30, "the steps of a build were not watched"


@pytest.mark.parametrize("layout", ["zarr"], scope="session")
def test_ranks_that_build_at_the_same_time_make_one_whole_store(
    tmp_path: Path, manifest: Manifest, unbroken: str, layout: str
) -> None:
    processes = [start_build(manifest, tmp_path / "s", layout, 0.02, rank, 3) for rank in range(3)]
    for process in processes:
        finish(process)
    store = open_store(tmp_path / "s")
    assert store.content_hash() == unbroken
    assert verify_store(store, manifest).problems == ()


def test_processes_that_build_the_same_at_the_same_time_do_not_harm_each_other(
    tmp_path: Path, manifest: Manifest, unbroken: str, layout: str
) -> None:
    processes = [start_build(manifest, tmp_path / "s", layout, 0.02) for _ in range(2)]
    assert [finish(process) for process in processes] == [unbroken, unbroken]
    assert verify_store(open_store(tmp_path / "s"), manifest).problems == ()


def test_of_two_attempts_at_a_shard_the_first_commit_wins(tmp_path: Path, made: SimpleNamespace) -> None:
    recipe = made.recipe()
    latents = made.latents(recipe, 3)
    store = made.store(tmp_path / "s", recipe, latents, 3)
    first = store.committed("depth")
    # A source on a GPU may say something else the second time.
    assert not store.write_shard("depth", store.shards[0], latents + np.float16(1), seconds=9, device="cuda")
    assert store.committed("depth") == first
    np.testing.assert_array_equal(store.read("depth", np.arange(3)), latents)


@pytest.fixture
def read_only_folder(tmp_path: Path) -> Path:
    """A folder on a file system that is mounted read-only: permissions do not stop root."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a read-only file system cannot be mounted here; needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_read_only_target_is_one_error(
    read_only_folder: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable
) -> None:
    with pytest.raises(StoreError, match=r"cannot be written: Read-only file system\nhint: "):
        build_cache(manifest, spec, read_only_folder / "s", open_source=open_source)


def test_a_target_under_a_file_is_one_error(
    tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"`.*file/s` cannot be written: .*\nhint: "):
        build_cache(manifest, spec, tmp_path / "file" / "s", open_source=open_source)


def test_a_full_disk_is_one_error_and_committed_shards_stay(
    tmp_path: Path, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = made.recipe()
    latents = made.latents(recipe, 6)
    store = made.store(tmp_path / "s", recipe, latents[:3], 3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _no_space)
        full = made.recipe(modality=Modality.AUDIO)
        with pytest.raises(StoreError, match="No space left"):
            made.store(tmp_path / "s", full, latents[:3], 3)
    np.testing.assert_array_equal(open_store(store.path).read("depth", np.arange(3)), latents[:3])


def _no_space(_descriptor: int) -> None:
    raise OSError(28, "No space left on device")
