"""Adopt: a harmless change is taken for what the store has, on evidence; what is not harmless is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dla_cache.adopt import adopt_paths, adopt_source
from dla_cache.build import build_cache
from dla_cache.errors import RecipeMismatchError, StoreError
from dla_cache.housekeeping import prune_store, remove_store
from dla_cache.manifest import Manifest, write_manifest
from dla_cache.recompute import recompute
from dla_cache.spec import CacheSpec
from dla_cache.store import LatentStore, open_store
from dla_cache.store.adopted import read_adoptions
from dla_cache.store.exchange import convert_store
from dla_cache.verify import verify_store

SAID = {"why": "the module was renamed", "who": "me"}


@pytest.fixture
def store(tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable) -> LatentStore:
    build_cache(manifest, spec, tmp_path / "s", open_source=open_source)
    return open_store(tmp_path / "s")


def with_source(spec: CacheSpec, **changes: object) -> CacheSpec:
    return spec.model_copy(update={"latents": (spec.latents[0].model_copy(update=changes),)})


@pytest.fixture
def renamed(spec: CacheSpec) -> CacheSpec:
    return with_source(spec, source="renamed")


def test_a_renamed_source_that_makes_the_same_is_taken_for_the_old_one(
    store: LatentStore, manifest: Manifest, renamed: CacheSpec, open_source: Callable
) -> None:
    with pytest.raises(RecipeMismatchError, match=r"`depth\.source` `pixels` → `renamed`"):
        build_cache(manifest, renamed, store.path, open_source=open_source)
    source = open_source(renamed.latents[0], "cpu")
    adopted = adopt_source(store, source, manifest.root, n_images=6, **SAID)
    assert adopted.changed == {"source": ("pixels", "renamed")}
    assert (adopted.evidence.n_images, adopted.evidence.n_equal) == (6, 6)
    assert adopt_source(open_store(store.path), source, None, n_images=None, **SAID) is None
    store.withdraw("depth", {2: store.committed("depth")[2]})
    report = build_cache(manifest, renamed, store.path, open_source=open_source)
    assert (report.shards_committed, report.content_hash) == (1, store.content_hash())
    assert open_store(store.path).recipe("depth").source == "pixels"
    checked = verify_store(open_store(store.path), manifest)
    assert (checked.problems, [one.why for one in checked.adopted]) == ((), ["the module was renamed"])


def test_what_was_adopted_holds_for_a_converted_store(
    tmp_path: Path, store: LatentStore, manifest: Manifest, renamed: CacheSpec, open_source: Callable
) -> None:
    adopt_source(store, open_source(renamed.latents[0], "cpu"), manifest.root, n_images=6, **SAID)
    layout = "zarr" if store.layout_name == "webdataset" else "webdataset"
    convert_store(store, tmp_path / "other", layout)
    other = renamed.model_copy(update={"layout": layout})
    assert build_cache(manifest, other, tmp_path / "other", open_source=open_source).images_encoded == 0


def test_latents_are_computed_again_by_the_source_that_was_adopted(
    store: LatentStore, manifest: Manifest, renamed: CacheSpec, open_source: Callable
) -> None:
    adopt_source(store, open_source(renamed.latents[0], "cpu"), manifest.root, n_images=6, **SAID)
    opened = []

    def open_and_note(spec: object, device: str) -> object:
        opened.append(spec.source)
        return open_source(spec, device)

    (one,) = recompute(store, manifest.root, 5, open_source=open_and_note)
    assert (one.n_equal, opened) == (5, ["renamed"])


def test_what_decides_numbers_needs_evidence_and_other_numbers_are_refused(
    store: LatentStore, manifest: Manifest, spec: CacheSpec, renamed: CacheSpec, open_source: Callable
) -> None:
    with pytest.raises(StoreError, match="`source` of `depth` decides the numbers"):
        adopt_source(store, open_source(renamed.latents[0], "cpu"), manifest.root, n_images=None, **SAID)
    reseeded = open_source(with_source(spec, seed=1).latents[0], "cpu")
    with pytest.raises(RecipeMismatchError, match="`seed` is not harmless: 6 of 6 images have other latents"):
        adopt_source(store, reseeded, manifest.root, n_images=6, **SAID)
    assert read_adoptions(store.path) == ()
    assert adopt_source(store, reseeded, manifest.root, n_images=6, tolerance=99.0, dry_run=True, **SAID) is not None
    assert read_adoptions(store.path) == ()


def test_how_bytes_are_read_is_never_adopted(
    store: LatentStore, manifest: Manifest, spec: CacheSpec, open_source: Callable
) -> None:
    source = open_source(with_source(spec, dtype="float32").latents[0], "cpu")
    with pytest.raises(RecipeMismatchError, match=r"cannot adopt another `format.dtype`"):
        adopt_source(store, source, manifest.root, n_images=6, **SAID)


def test_other_words_for_the_same_numbers_need_no_evidence(
    store: LatentStore, spec: CacheSpec, open_source: Callable
) -> None:
    source = open_source(spec.latents[0], "cpu")
    words = source.recipe.format.model_copy(update={"space": "corners of the image"})
    source.recipe = source.recipe.model_copy(update={"format": words})
    adopted = adopt_source(store, source, None, n_images=None, **SAID)
    assert (list(adopted.changed), adopted.evidence) == (["format.space"], None)


def test_any_changed_byte_of_the_record_is_a_problem_and_an_adoption_in_it_does_not_count(
    store: LatentStore, manifest: Manifest, renamed: CacheSpec, open_source: Callable
) -> None:
    adopt_source(store, open_source(renamed.latents[0], "cpu"), manifest.root, n_images=2, **SAID)
    path = store.path / "adopted.json"
    content = path.read_bytes()
    for place in range(0, len(content), 61):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert [problem.where for problem in verify_store(open_store(store.path)).problems] == ["adopted.json"]
    path.write_bytes(content.replace(b"renamed", b"another"))
    with pytest.raises(StoreError, match="is not the record that was written"):
        build_cache(manifest, renamed, store.path, open_source=open_source)


def test_images_that_were_moved_get_their_new_paths_and_nothing_else_changes(
    store: LatentStore, manifest: Manifest, spec: CacheSpec, open_source: Callable
) -> None:
    content_hash = store.content_hash()
    (manifest.root / "images").rename(manifest.root / "moved")
    rows = [replace(row, uri=row.uri.replace("images/", "moved/")) for row in manifest.rows()]
    moved = write_manifest(manifest.root / "moved.parquet", rows, manifest.class_names)
    with pytest.raises(RecipeMismatchError, match="`uri` `images/"):
        build_cache(moved, spec, store.path, open_source=open_source)
    assert adopt_paths(store, moved, dry_run=True, **SAID).n_images == 23
    assert adopt_paths(open_store(store.path), moved, **SAID).changed == {
        "uri": ("images/image-0.png", "moved/image-0.png")
    }
    after = open_store(store.path)
    assert adopt_paths(after, moved, **SAID) is None
    after.withdraw("depth", after.committed("depth"))  # all is made again from the new paths
    assert build_cache(moved, spec, store.path, open_source=open_source).content_hash == content_hash
    assert verify_store(open_store(store.path), moved).problems == ()
    assert prune_store(open_store(store.path)).files == ()


def test_a_manifest_that_says_more_than_other_paths_is_refused(store: LatentStore, manifest: Manifest) -> None:
    for changes, fault in (({"label": 1}, "says otherwise"), ({"image_id": "new"}, "does not list it")):
        rows = [replace(row, **changes) if row.image_id == "image-4" else row for row in manifest.rows()]
        other = write_manifest(manifest.root / "other.parquet", rows, manifest.class_names)
        with pytest.raises(RecipeMismatchError, match=f"of `image-4` it {fault}"):
            adopt_paths(store, other, **SAID)


def test_a_store_that_adopted_something_is_removed_as_a_whole(
    store: LatentStore, manifest: Manifest, renamed: CacheSpec, open_source: Callable
) -> None:
    adopt_source(store, open_source(renamed.latents[0], "cpu"), manifest.root, n_images=2, **SAID)
    assert "adopted.json" in remove_store(store.path).files
    assert not store.path.exists()
