"""Verify: a whole store has no problem, and whatever is amiss is one."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dla_cache.build import build_cache
from dla_cache.manifest import Manifest, write_manifest
from dla_cache.spec import CacheSpec
from dla_cache.store import LatentStore, create_store, open_store
from dla_cache.takedown import take_down
from dla_cache.verify import verify_store
from tests.torture.forgery import rename_member


@pytest.fixture
def store(tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable) -> LatentStore:
    build_cache(manifest, spec, tmp_path / "s", open_source=open_source, batch_size=4)
    return open_store(tmp_path / "s")


def described(store: LatentStore, manifest: Manifest | None = None) -> list[str]:
    return [f"{problem.where}: {problem.what}" for problem in verify_store(store, manifest).problems]


def test_a_whole_store_has_no_problem_and_every_byte_was_read(store: LatentStore, manifest: Manifest) -> None:
    seen: list[tuple[int, int]] = []
    report = verify_store(store, manifest, on_progress=lambda done, total: seen.append((done, total)))
    assert report.problems == ()
    assert (report.n_images, report.shards_checked) == (23, 5)
    files = [path for shard in range(5) for path in store.shard_files("depth", shard)]
    assert report.bytes_checked == sum(path.stat().st_size for path in files)
    assert report.content_hash == store.content_hash()
    assert seen == [(done, 5) for done in range(1, 6)]


def test_a_store_of_some_splits_agrees_with_the_whole_manifest(
    tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable
) -> None:
    some = spec.model_copy(update={"splits": ("train", "test")})
    build_cache(manifest, some, tmp_path / "some", open_source=open_source)
    assert described(open_store(tmp_path / "some"), manifest) == []


def test_a_removed_image_that_the_manifest_lists_is_counted_and_no_problem(
    store: LatentStore, manifest: Manifest
) -> None:
    take_down([store.path], ["image-4", "image-9"])
    rows = [row for row in manifest.rows() if row.image_id != "image-9"]
    anew = write_manifest(manifest.root / "anew.parquet", rows, manifest.class_names)
    found = {
        name: verify_store(open_store(store.path), listed)
        for name, listed in {"old": manifest, "anew": anew, "none": None}.items()
    }
    assert {name: (report.problems, report.n_removed) for name, report in found.items()} == {
        "old": ((), 2),
        "anew": ((), 1),
        "none": ((), 0),
    }


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"sha256": "1" * 64}, "1 images have another `sha256` in the manifest: `image-4`"),
        ({"label": 1}, "1 images have another `label` in the manifest: `image-4`"),
        ({"split": "test"}, "1 images have another `split` in the manifest: `image-4`"),
        ({"uri": "b.png"}, "1 images have another `uri` in the manifest: `image-4`"),
    ],
)
def test_a_row_that_the_manifest_tells_otherwise_is_named(
    store: LatentStore, manifest: Manifest, changes: dict[str, object], fault: str
) -> None:
    rows = [replace(row, **changes) if row.image_id == "image-4" else row for row in manifest.rows()]
    other = write_manifest(manifest.root / "other.parquet", rows, manifest.class_names)
    assert described(store, other) == [f"row table: {fault}"]


def test_images_of_one_side_only_are_named(store: LatentStore, manifest: Manifest) -> None:
    rows = [replace(row, image_id="new") if row.image_id == "image-4" else row for row in manifest.rows()]
    other = write_manifest(manifest.root / "other.parquet", rows, ["odd", "even"])
    assert described(store, other) == [
        "row table: 1 images are in the manifest but not in the store: `new`",
        "row table: 1 images are in the store but not in the manifest: `image-4`",
        f"{store.metadata.layout.main_file}: the class names are not the manifest's",
    ]


def test_what_is_not_committed_is_a_problem(tmp_path: Path, store: LatentStore, layout: str) -> None:
    empty = create_store(tmp_path / "empty", store.rows, [], 12, {"depth": store.recipe("depth")}, layout=layout)
    assert described(empty) == [
        f"depth, shard {shard}: not committed: run `dla cache build` with the same spec again" for shard in (0, 1)
    ]
    assert verify_store(empty).content_hash is None


def test_a_file_that_belongs_to_nothing_is_a_problem(store: LatentStore) -> None:
    stray = store.shard_path("depth", 9)
    stray.write_bytes(b"")
    (store.path / "notes.txt").write_text("mine")
    names = sorted([stray.relative_to(store.path).as_posix(), "notes.txt"])
    assert described(store) == [f"{name}: it belongs to nothing that is committed: move it away" for name in names]


def test_a_card_that_tells_of_another_number_of_images_is_a_problem(store: LatentStore) -> None:
    card = store.path / "README.md"
    before = card.read_bytes()
    take_down([store.path], ["image-4"])
    assert described(open_store(store.path)) == []
    card.write_bytes(before)
    (problem,) = described(open_store(store.path))
    assert problem.startswith("README.md: it does not tell of 22 images: ")
    card.write_text("# My own notes on 23 images\n")
    assert described(open_store(store.path)) == []


@pytest.mark.parametrize("layout", ["zarr"], scope="session")
def test_array_metadata_of_another_shape_is_a_problem(store: LatentStore) -> None:
    path = store.path / "latents" / "depth" / "zarr.json"
    path.write_text(path.read_text().replace("23", "24", 1))
    assert described(store) == [
        "latents/depth/zarr.json: it is not what describes this store, byte for byte: `dla cache build` writes it again"
    ]


@pytest.mark.parametrize("layout", ["zarr"], scope="session")
def test_lost_metadata_of_the_group_of_arrays_is_a_problem(store: LatentStore) -> None:
    (store.path / "latents" / "zarr.json").unlink()
    assert described(store) == [
        "latents/zarr.json: it is not what describes this store, byte for byte: `dla cache build` writes it again"
    ]


def test_a_record_of_another_recipe_is_a_problem(store: LatentStore) -> None:
    (path,) = (store.path / "commits" / "depth").iterdir()
    records = store.committed("depth")
    path.unlink()
    for record in records.values():
        changes = {"recipe_hash": "1" * 64} if record.shard == 3 else {"n_rows": 4} if record.shard == 2 else {}
        text = record.model_copy(update=changes).model_dump_json()
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        (path.parent / f"{record.shard}-{name}.json").write_text(text)
    assert described(open_store(store.path)) == [
        "depth, shard 2: its record is of 4 images, 5 are planned",
        f"depth, shard 3: its record is of another recipe, `{'1' * 64}`",
    ]


def test_other_white_space_in_metadata_is_a_problem(store: LatentStore) -> None:
    path = store.path / store.metadata.layout.main_file
    path.write_text(path.read_text().replace("  ", "   ", 1))
    assert [problem.where for problem in verify_store(store).problems] == [path.name]


def test_any_changed_byte_of_the_card_is_a_problem_whatever_its_words(store: LatentStore) -> None:
    card = store.path / "README.md"
    content = card.read_bytes()
    for damaged in [
        content[:9],
        b"",
        *(content[:at] + b"\0" + content[at + 1 :] for at in range(0, len(content), 101)),
    ]:
        card.write_bytes(damaged)
        (problem,) = described(store)
        assert problem.startswith("README.md: it is not the card that was written: ")
    text = content[: content.rindex(b"\n<!-- ")].replace(b"Made to train", b"Made for training")
    card.write_bytes(text + seal(text))
    assert described(store) == []


def test_a_card_of_another_content_is_a_problem(store: LatentStore) -> None:
    card = store.path / "README.md"
    text = card.read_bytes().replace(store.content_hash().encode(), b"1" * 64)
    text = text[: text.rindex(b"\n<!-- ")]
    card.write_bytes(text + seal(text))
    (problem,) = described(store)
    assert problem.startswith("README.md: it tells of another content hash: ")


def seal(text: bytes) -> bytes:
    return b"\n<!-- SHA-256 of all lines before: " + hashlib.sha256(text).hexdigest().encode() + b" -->\n"


@pytest.mark.parametrize("layout", ["webdataset"], scope="session")
@pytest.mark.parametrize(("name", "kind"), [("../../x.depth.npy", b"0"), ("image-5.depth.npy", b"2")])
def test_a_member_of_another_name_or_kind_is_a_problem_though_record_and_checksums_agree(
    store: LatentStore, name: str, kind: bytes
) -> None:
    rename_member(store.path, "depth", 1, name, kind)
    (problem,) = described(open_store(store.path))
    assert problem.startswith(
        "depth, shard 1: it holds other things than its images under their names: see the members"
    )


@pytest.mark.parametrize("jobs", [1, 3])
def test_problems_come_in_the_order_of_shards_however_many_are_read_at_a_time(store: LatentStore, jobs: int) -> None:
    for shard in (3, 0, 4):
        with store.shard_path("depth", shard).open("r+b") as file:
            file.write(b"\xff")
    found = [problem.where for problem in verify_store(store, jobs=jobs).problems]
    assert found == [f"depth, shard {shard}" for shard in (0, 3, 4)]


def test_a_sample_reads_so_many_shards_and_says_which_it_has_not_read(store: LatentStore) -> None:
    report = verify_store(store, sample=2, seed=3)
    (read,) = report.sample.read.values()
    assert (len(read), report.shards_checked, report.sample.unread, report.sample.seed) == (2, 2, {"depth": 3}, 3)
    assert report.sample == verify_store(store, sample=2, seed=3).sample
    assert len({verify_store(store, sample=2, seed=seed).sample.read["depth"] for seed in range(20)}) > 3
    assert verify_store(store, sample=0.3).shards_checked == 2
    assert verify_store(store, sample=99).sample.unread == {"depth": 0}
    for shard in set(range(5)) - set(read):
        path = store.shard_path("depth", shard)
        path.write_bytes(bytes(path.stat().st_size))
    assert verify_store(store, sample=2, seed=3).problems == ()
    store.shard_path("depth", min(set(range(5)) - set(read))).unlink()
    assert len(verify_store(store, sample=2, seed=3).problems) == 1
