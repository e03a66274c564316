"""A plan of a store below a prefix: it looks, and leaves nothing there."""

from pathlib import Path

import pytest

from dla_cache.build import build_cache
from dla_cache.planning import make_plan
from dla_cache.remote import S3Objects
from dla_cache.store import open_store
from dla_cache.survey import NEW_STORE, NOT_COMMITTED


@pytest.mark.parametrize("layout", ["zarr"], indirect=True)
def test_a_plan_of_a_store_below_a_prefix_writes_nothing_there(
    s3: S3Objects, manifest, spec, open_source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DLA_CACHE_DIR", str(tmp_path / "cache"))

    def plan():
        listed = manifest.root / "manifest.parquet"
        return make_plan(listed, spec, s3.url, open_source=open_source, batch_size=4, n_batches=1)

    first = plan()
    assert (first.is_there, first.free_bytes, first.latents["depth"].reasons) == (False, None, {NEW_STORE: 23})
    assert list(s3.names()) == []
    build_cache(manifest, spec, s3.url, open_source=open_source)
    store = open_store(s3.url)
    assert first.size_bytes == sum(record.size_bytes for record in store.committed("depth").values())
    store.withdraw("depth", {1: store.committed("depth")[1]})
    names = sorted(s3.names())
    again = plan()
    assert (again.is_there, again.latents["depth"].reasons) == (True, {NOT_COMMITTED: 5})
    assert sorted(s3.names()) == names
