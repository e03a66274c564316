"""Each way in which an image can be amiss has its name and its reason."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dla_cache.build import build_cache
from dla_cache.explain import Explanation, explain_image
from dla_cache.image_ids import escape_id
from dla_cache.ingest import quarantine_path
from dla_cache.manifest import Manifest, write_manifest
from dla_cache.spec import CacheSpec
from dla_cache.store import open_store
from dla_cache.takedown import take_down

Ask = Callable[..., Explanation]


@pytest.fixture
def ask(tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable) -> Ask:
    """What is said of an image of a store with 23 images, their own bytes among what it holds."""
    whole = spec.model_copy(update={"images": "original", "splits": ("train", "test")})
    build_cache(manifest, whole, tmp_path / "s", open_source=open_source)

    def explain(image_id: str) -> Explanation:
        return explain_image(open_store(tmp_path / "s"), image_id, manifest_path=manifest.root / "manifest.parquet")

    return explain


def said(explanation: Explanation, where: str) -> tuple[str, str]:
    (finding,) = [finding for finding in explanation.findings if finding.where == where]
    return finding.state, finding.what


def test_an_image_of_which_nothing_is_amiss_is_whole_everywhere(ask: Ask) -> None:
    explanation = ask("image-3")
    assert explanation.state == "whole"
    assert [finding.where for finding in explanation.findings] == ["depth", "images", "manifest", "file"]


def test_a_changed_and_a_lost_file_are_stale_and_missing(ask: Ask, manifest: Manifest) -> None:
    path = manifest.root / "images" / "image-3.png"
    path.write_bytes(path.read_bytes() + b"!")
    assert said(ask("image-3"), "file")[0] == ask("image-3").state == "stale"
    assert "has changed" in said(ask("image-3"), "file")[1]
    path.unlink()
    assert said(ask("image-3"), "file")[0] == ask("image-3").state == "missing"


def test_a_manifest_that_says_otherwise_makes_it_stale(ask: Ask, manifest: Manifest) -> None:
    rows = [replace(row, label=1) if row.image_id == "image-3" else row for row in manifest.rows()]
    write_manifest(manifest.root / "manifest.parquet", rows[:-1], manifest.class_names)
    assert said(ask("image-3"), "manifest") == (
        "stale",
        "it says otherwise: `label` `None` → `1`; build a new store from it",
    )


def test_a_flipped_byte_and_a_withdrawn_shard_are_damaged_and_missing(ask: Ask, tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    row = store.rows.row_of("image-3")
    path = store.shard_path("images", row // store.shard_size)
    content = path.read_bytes()
    image = store.read_images(store.rows_of()[row : row + 1])[0]
    place = content.index(image) + 9
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert said(ask("image-3"), "images")[0] == ask("image-3").state == "damaged"
    store.withdraw("images", {row // store.shard_size: store.committed("images")[row // store.shard_size]})
    assert said(ask("image-3"), "images")[0] == ask("image-3").state == "missing"
    assert said(ask("image-3"), "depth")[0] == "whole"


def test_who_is_not_in_the_store_is_removed_of_another_split_quarantined_or_unknown(
    ask: Ask, tmp_path: Path, manifest: Manifest
) -> None:
    take_down([tmp_path / "s"], ["image-3"])
    assert ask("image-3").state == "removed"
    assert ask("image-1").state == "missing"
    assert "split `validation`" in said(ask("image-1"), "row table")[1]
    assert ask("image-99").state == "unknown"
    lines = [{"where": "bad/0 1.jpg", "reason": "is an HTML page"}, {"neither": 1}]
    path = quarantine_path(manifest.root / "manifest.parquet")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "not JSON\n")
    assert said(ask(escape_id("bad/0 1.jpg")), "manifest") == said(ask("bad/0 1.jpg"), "manifest")
    assert said(ask("bad/0 1.jpg"), "manifest") == (
        "quarantined",
        "`dla manifest make` put it aside: it is an HTML page",
    )


def test_without_a_manifest_the_store_alone_is_asked(tmp_path: Path, ask: Ask) -> None:
    explanation = explain_image(open_store(tmp_path / "s"), "image-3")
    assert [finding.where for finding in explanation.findings] == ["depth", "images"]
