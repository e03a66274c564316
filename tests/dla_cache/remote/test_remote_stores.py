"""A store below a prefix of an S3 API over HTTP: built, killed, gone on with, verified, repaired and trained from."""

import copy
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import dla_cache
from dla_cache.build import build_cache
from dla_cache.errors import CorruptShardError, StoreError
from dla_cache.manifest import Manifest
from dla_cache.pairs import PairStream
from dla_cache.remote import S3Objects
from dla_cache.spec import CacheSpec
from dla_cache.store import LatentStore, claims, open_store, turns
from dla_cache.verify import verify_store

SCRIPT = Path(__file__).parents[1] / "build_process.py"
FAULTS = [*[""] * 6, "500", *[""] * 7, "dropped", *[""] * 7, "lost", *[""] * 7, "cut"] * 40
"""One request of eight fails, in turn by each kind of fault."""


@pytest.fixture
def url(s3: S3Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DLA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(claims, "CLOCK_SKEW_S", 0.2)
    monkeypatch.setattr(turns, "POLL_S", 0.3)
    return s3.url


def kill_between_commits(manifest: Manifest, s3: S3Objects, layout: str) -> int:
    """Starts a build and kills it once a shard is committed; how many are."""
    arguments = [manifest.root / "manifest.parquet", s3.url, 0.2, 0, 1, layout]
    environment = {**os.environ, "PYTHONPATH": str(Path(dla_cache.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, SCRIPT, *map(str, arguments)], env=environment)
    while not list(s3.names("commits/depth/")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return len(list(s3.names("commits/depth/")))


def epoch_of(store: LatentStore, images: Path) -> list[Any]:
    """IDs, latents, labels and image bytes of every batch of a shuffled epoch."""
    return list(PairStream(store, images, None, 4, seed=1, decode=None).epoch_once())


def is_same(one: Any, other: Any) -> bool:
    return (
        one.image_ids == other.image_ids
        and one.images == other.images
        and torch.equal(one.labels, other.labels)
        and torch.equal(one.latents["depth"], other.latents["depth"])
    )


def test_a_store_below_a_prefix_is_built_by_two_verified_and_repaired_and_reads_as_a_local_one(
    url: str,
    s3: S3Objects,
    proxy: Any,
    manifest: Manifest,
    spec: CacheSpec,
    open_source: Callable,
    tmp_path: Path,
    made_s3: SimpleNamespace,
) -> None:
    whole = build_cache(manifest, spec, tmp_path / "local", open_source=open_source)
    before = kill_between_commits(manifest, s3, spec.layout)
    assert 0 < before < 5
    of_killed = {name for name in s3.names() if name.startswith("claims/")}

    def build(**options: Any) -> Any:
        return build_cache(manifest, spec, url, open_source=open_source, batch_size=4, **options)

    proxy.faults[:] = FAULTS
    with ThreadPoolExecutor(2) as pool:
        reports = [future.result() for future in [pool.submit(build) for _ in range(2)]]
    assert len(proxy.faults) < len(FAULTS) - 30
    committed = sum(report.shards_committed for report in reports)
    assert committed == 5 - before
    assert [report.content_hash for report in reports] == [whole.content_hash] * 2
    assert {name for name in s3.names() if name.startswith("claims/")} <= of_killed
    assert verify_store(open_store(url), manifest).problems == ()

    local = epoch_of(open_store(tmp_path / "local"), manifest.root)
    assert all(map(is_same, local, epoch_of(open_store(url), manifest.root)))
    proxy.faults.clear()

    name = open_store(url).layout_of("depth").files(2)[0]
    content = bytearray(s3.read(name))
    content[len(content) // 3] ^= 1
    s3.write(name, bytes(content))
    assert [problem.where for problem in verify_store(open_store(url)).problems] == ["depth, shard 2"]
    assert build().shards_committed == 0  # looks at presence and size only
    repaired = build(repair=True)
    assert (repaired.shards_repaired, repaired.shards_changed) == (1, ())
    assert verify_store(open_store(url), manifest).problems == ()
    assert build_cache(
        manifest, spec.model_copy(update={"images": "original"}), url, open_source=open_source
    ).images_stored == len(manifest)
    assert verify_store(open_store(url), manifest).problems == ()
    for local_batch, batch in zip(local, epoch_of(open_store(url), None), strict=True):
        assert is_same(local_batch, batch)

    written = [s3.read(name) for name in s3.names()]
    written += [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not any(word.encode() in content for content in written for word in (made_s3.key_id, made_s3.secret))


def test_an_epoch_keeps_to_the_bound_of_the_cache_and_a_damaged_shard_is_named(
    url: str, s3: S3Objects, manifest: Manifest, spec: CacheSpec, open_source: Callable, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, proxy: Any, made_s3: SimpleNamespace,
) -> None:  # fmt: skip
    build_cache(manifest, spec, url, open_source=open_source)
    store = open_store(url)
    largest = max(record.size_bytes for record in store.committed("depth").values())
    monkeypatch.setenv("DLA_CACHE_GB", str(2.5 * largest / 1e9))
    store = copy.copy(open_store(url))  # by what takes it to a loader's worker
    for _ in range(2):
        rows = np.random.default_rng(0).permutation(len(manifest))
        assert len(store.read("depth", rows)) == len(manifest)
        assert 0 < sum(path.stat().st_size for path in (tmp_path / "cache" / "objects").iterdir()) <= 2.5 * largest

    name, payload = store.layout_of("depth").files(2)[0], store.read("depth", np.array([10])).tobytes()
    content = s3.read(name)
    s3.write(name, content.replace(payload, payload[::-1]))
    shutil.rmtree(tmp_path / "cache" / "objects")
    store = open_store(url)
    with pytest.raises(CorruptShardError, match=rf"shard 2 of `depth` is damaged.*`{url}/{name}`") as caught:
        store.read("depth", np.arange(23))
    assert str(tmp_path) not in str(caught.value)
    proxy.faults[:] = ["403"] * 99
    with pytest.raises(StoreError, match="the server answers 403") as refused:
        verify_store(open_store(url))
    assert made_s3.key_id not in str(refused.value)
