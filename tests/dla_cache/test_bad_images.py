"""Images without a latent: named, kept out, and never in the way of the others."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import dla_cache.filling
from dla_cache.build import build_cache
from dla_cache.errors import BadImagesError, StoreError
from dla_cache.explain import explain_image
from dla_cache.manifest import Manifest, write_manifest
from dla_cache.shares import parse_allowance
from dla_cache.sources import Encoded
from dla_cache.spec import CacheSpec, LatentSpec, Modality
from dla_cache.store import open_store
from dla_cache.takedown import take_down
from dla_cache.verify import verify_store

LAYOUTS = ["zarr"]

BAD = "image-12"
"""Of shard 2, which holds images 10 to 14."""


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


@pytest.fixture
def build(tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable) -> Callable:
    """Builds the store `s` in batches of 4, again and again."""

    def run(name: str = "s", manifest: Manifest = manifest, spec: CacheSpec = spec, **options: object) -> object:
        defaults = {"open_source": open_source, "batch_size": 4}
        if "allow_bad" in options:
            options["allow_bad"] = parse_allowance(options["allow_bad"])
        return build_cache(manifest, spec, tmp_path / name, **{**defaults, **options})

    return run


@pytest.fixture
def bad_source(manifest: Manifest, open_source: Callable) -> Callable:
    """`bad_source(spoil)`: a source that does `spoil(latents, place)` to the latent of the image `BAD`."""
    from dla_cache.images import decode_image

    row = next(row for row in manifest.rows() if row.image_id == BAD)
    wanted = decode_image(manifest.path_of(row.uri).read_bytes(), BAD)

    def of(spoil: Callable) -> type:
        class Spoilt(open_source):
            def encode(self, pixels: np.ndarray, seeds: Sequence[int]) -> object:
                latents = super().encode(pixels, seeds)
                places = [place for place, one in enumerate(pixels) if np.array_equal(one, wanted)]
                return spoil(latents, places[0]) if places else latents

        return Spoilt

    return of


def with_nan(latents: np.ndarray, place: int) -> np.ndarray:
    latents[place, 0, 0, 0] = np.nan
    return latents


def beyond_float16(latents: np.ndarray, place: int) -> np.ndarray:
    latents[place] += 1e5
    return latents


def of_another_shape(latents: np.ndarray, place: int) -> list[np.ndarray]:
    return [one[:, :1] if number == place else one for number, one in enumerate(latents)]


def blanked(latents: np.ndarray, place: int) -> Encoded:
    latents[place] = 0
    return Encoded(latents, rejected={place: "the safety checker blanked it"})


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: path.write_bytes(b""), "is not the file of the manifest"),
        (cut_off, "is not the file of the manifest"),
        (lambda path: path.unlink(), "at `images/image-12.png` cannot be read: No such file"),
    ],
    ids=["empty", "truncated", "gone"],
)
def test_a_bad_image_is_named_all_other_shards_are_committed_and_mended_it_costs_only_its_own(
    tmp_path: Path, manifest: Manifest, build: Callable, damage: Callable, fault: str
) -> None:
    path = manifest.path_of("images/image-12.png")
    good = path.read_bytes()
    damage(path)
    with pytest.raises(BadImagesError, match=rf"(?s)1 image has no latent.*`{BAD}`.*{fault}.*hint: mend .*--allow-bad"):
        build()
    assert open_store(tmp_path / "s").missing("depth") == [2]
    path.write_bytes(good)
    report = build()
    assert report.images_encoded == 5
    assert report.content_hash == build("unbroken").content_hash


def test_sources_see_black_in_the_place_of_an_image_that_cannot_be_read(
    manifest: Manifest, build: Callable, open_source: Callable
) -> None:
    black = []

    class Watched(open_source):
        def encode(self, pixels: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
            black.append([place for place, one in enumerate(pixels) if not one.any()])
            return super().encode(pixels, seeds)

    manifest.path_of("images/image-21.png").unlink()  # of a batch whose memory others had before it
    with pytest.raises(BadImagesError):
        build(open_source=Watched, batch_size=2)
    assert black == [*[[]] * 10, [1], []]


def test_an_image_that_was_truncated_before_it_was_listed_is_named(
    manifest: Manifest, build: Callable, made: SimpleNamespace
) -> None:
    path = manifest.path_of("images/image-12.png")
    cut_off(path)
    listed = [replace(row, sha256=made.sha256(path)) if row.image_id == BAD else row for row in manifest.rows()]
    truncated = write_manifest(manifest.root / "truncated.parquet", listed, manifest.class_names)
    with pytest.raises(BadImagesError, match=f"`{BAD}` cannot be decoded"):
        build(manifest=truncated)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (with_nan, "the source put out NaN, infinity or a value beyond `float16`"),
        (beyond_float16, "the source put out NaN, infinity or a value beyond `float16`"),
        (of_another_shape, "the source put out a latent of shape [3, 1, 2], not [3, 2, 2]"),
        (blanked, "the safety checker blanked it"),
    ],
)
def test_an_image_that_the_source_makes_no_latent_of_is_left_out_if_allowed_and_no_other_moves(
    tmp_path: Path, manifest: Manifest, build: Callable, bad_source: Callable, spoil: Callable, reason: str
) -> None:
    source = bad_source(spoil)
    with pytest.raises(BadImagesError) as refused:
        build(open_source=source)
    assert f"`{BAD}` has no `depth`: {reason}" in refused.value.message
    store = open_store(tmp_path / "s")
    assert store.missing("depth") == [2]
    assert f"it has no `depth`: {reason}; shard 2 is not committed" in explain_image(store, BAD).findings[0].what
    report = build(open_source=source, allow_bad="1")
    assert (report.put_aside, report.images_left_out) == ({BAD: f"has no `depth`: {reason}"}, 0)
    assert (report.n_images, report.images_encoded, report.shards_committed) == (22, 4, 1)
    build("whole")
    (expected,) = take_down([tmp_path / "whole"], [BAD])
    assert report.content_hash == expected.content_hash
    store = open_store(tmp_path / "s")
    (finding,) = explain_image(store, BAD).findings
    assert (finding.state, finding.what) == ("quarantined", f"a build left it out: it has no `depth`: {reason}")
    assert verify_store(store, manifest).problems == ()
    again = build(open_source=source)
    assert (again.images_encoded, again.images_left_out) == (0, 1)


def test_so_many_are_allowed_and_those_left_out_before_count(
    tmp_path: Path, manifest: Manifest, build: Callable, spec: CacheSpec
) -> None:
    for number in (3, 4, 12):
        manifest.path_of(f"images/image-{number}.png").unlink()
    with pytest.raises(BadImagesError, match=r"3 images have no latent.*`image-3`.*`image-4`.*`image-12`"):
        build(allow_bad="2")
    report = build(allow_bad="14%")  # of 23
    assert (list(report.put_aside), report.n_images) == (["image-3", "image-4", "image-12"], 20)
    manifest.path_of("images/image-20.png").unlink()
    both = spec.model_copy(update={"latents": (*spec.latents, LatentSpec(modality=Modality.AUDIO, source="pixels"))})
    with pytest.raises(BadImagesError, match=r"1 image has no latent.*beside 3 that were left out before.*`image-20`"):
        build(spec=both, allow_bad="3")
    assert open_store(tmp_path / "s").missing("audio") == [4]
    report = build(spec=both, allow_bad="4")
    # It had its depth by then, and has it no more.
    assert (report.n_images, report.images_encoded, report.images_left_out) == (19, 2, 3)
    store = open_store(tmp_path / "s")
    assert verify_store(store, manifest).problems == ()
    kept = json.loads((store.path / "quarantine.json").read_text())
    assert list(kept) == ["image-12", "image-20", "image-3", "image-4"]
    with pytest.raises(StoreError, match="image `image-20` was removed"):
        store.rows.row_of("image-20")


def test_a_reason_is_forgotten_with_the_fault_and_names_no_path_of_this_machine(
    tmp_path: Path, manifest: Manifest, build: Callable
) -> None:
    path = manifest.path_of("images/image-12.png")
    good = path.read_bytes()
    path.unlink()
    with pytest.raises(BadImagesError):
        build()
    kept = (tmp_path / "s" / "quarantine.json").read_text()
    assert json.loads(kept).keys() == {BAD}
    assert str(tmp_path) not in kept
    path.write_bytes(good)
    build()
    assert json.loads((tmp_path / "s" / "quarantine.json").read_text()) == {}
    assert verify_store(open_store(tmp_path / "s"), manifest).problems == ()


def test_where_no_image_is_good_it_ends_at_once(
    manifest: Manifest, build: Callable, monkeypatch: pytest.MonkeyPatch, open_source: Callable
) -> None:
    monkeypatch.setattr(dla_cache.filling, "NONE_GOOD", 8)
    seen = []
    with pytest.raises(BadImagesError, match=r"8 images have no latent, not one good image came before"):
        build(manifest=replace(manifest, root=manifest.root / "elsewhere"), on_progress=seen.append, allow_bad="90%")
    assert len(seen) == 1


def test_without_a_folder_nothing_can_be_left_out_and_that_is_said_at_the_beginning(
    manifest: Manifest, spec: CacheSpec, open_source: Callable
) -> None:
    with pytest.raises(StoreError, match=r"(?s)of `s3://bucket/prefix`.*hint: .*folder"):
        build_cache(manifest, spec, "s3://bucket/prefix", open_source=open_source, allow_bad=parse_allowance("0.1%"))
