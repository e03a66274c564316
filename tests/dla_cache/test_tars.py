"""WebDataset shards: their samples are found, nothing is unpacked, and a shard that is not whole is refused."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from dla_cache.candidates import Candidate, Columns
from dla_cache.errors import ManifestError
from dla_cache.listing import list_images
from dla_cache.tars import read_range


def write_files(folder: Path, *names: str, content: bytes = b"\xff\xd8\xff") -> Path:
    for name in names:
        (folder / name).write_bytes(content)
    return folder


def class_name_of(candidate: Candidate) -> str | None:
    """The only class there can be where a listing is not multi-label."""
    if candidate.class_names is None:
        return None
    [class_name] = candidate.class_names
    return class_name


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def test_a_sample_is_a_byte_range_of_its_shard_and_nothing_is_copied(tmp_path: Path) -> None:
    first = {"0001.jpg": b"\xff\xd8\xff first", "0001.cls": b"3\n", "./0002.PNG": b"\x89PNG", "./0002.cls": b"dog"}
    write_shard(tmp_path / "shards" / "000.tar", first)
    write_shard(tmp_path / "shards" / "001.tar", {"0003.jpg": b"third", "0003.cls": b""})
    write_files(tmp_path, "notes.txt", content=b"words")
    listing = list_images([tmp_path])
    assert listing.layout == "webdataset"
    assert listing.remark == "from 2 shards, classes from `cls`, no splits, IDs from the name in the shard"
    assert [(candidate.image_id, class_name_of(candidate)) for candidate in listing.candidates] == [
        ("0001-pjpg", "3"),
        ("0002-pPNG", "dog"),
        ("0003-pjpg", None),
    ]
    uris = [candidate.uri for candidate in listing.candidates]
    assert uris[0] == "shards/000.tar#512+9"
    assert [read_range(tmp_path, uri) for uri in uris] == [b"\xff\xd8\xff first", b"\x89PNG", b"third"]
    assert (listing.n_found, listing.skipped) == (4, {".txt": 1})


def test_shards_can_be_listed_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [write_shard(tmp_path / name / "0.tar", {f"{name}.jpg": b"x"}) for name in ("b", "a")]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    listing = list_images(shards)
    assert [candidate.uri for candidate in listing.candidates] == ["a/0.tar#512+1", "b/0.tar#512+1"]
    assert read_range(listing.root, "b/0.tar#512+1") == b"x"


def test_classes_splits_and_ids_can_come_from_json(tmp_path: Path) -> None:
    facts = {"label": "cat", "split": "test", "url": "https://example.org"}
    shard = write_shard(tmp_path / "0.tar", {"1.jpg": b"x", "1.json": json.dumps(facts).encode()})
    [candidate] = list_images([shard]).candidates
    assert (candidate.image_id, class_name_of(candidate), candidate.split) == ("1-pjpg", "cat", "test")
    [candidate] = list_images([shard], columns=Columns(label="split", image_id="url")).candidates
    assert (candidate.image_id, class_name_of(candidate)) == ("https-3a--_-_example-porg", "test")


def test_a_caption_is_a_class_only_if_asked_for(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", {"1.jpg": b"x", "1.txt": b"a cat on a mat"})
    assert class_name_of(list_images([shard]).candidates[0]) is None
    [candidate] = list_images([shard], columns=Columns(label="txt")).candidates
    assert class_name_of(candidate) == "a cat on a mat"


def test_where_names_repeat_between_shards_ids_begin_with_the_shard(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, {"1.jpg": b"x"})
    listing = list_images([tmp_path])
    assert [candidate.image_id for candidate in listing.candidates] == ["a-ptar-_1-pjpg", "b-ptar-_1-pjpg"]
    assert "IDs from shard and name" in listing.remark


def test_samples_that_are_no_single_image_are_counted(tmp_path: Path) -> None:
    members = {
        "good.jpg": b"x",
        "good.seg.png": b"x",
        "both.jpg": b"x",
        "both.png": b"x",
        "sound.wav": b"x",
        "broken.jpg": b"x",
        "broken.json": b"{",
        "label.jpg": b"x",
        "label.cls": b"\xff",
        ".hidden.jpg": b"x",
        "README": b"x",
    }
    shard = write_shard(tmp_path / "0.tar", members)
    with tarfile.open(shard, "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    listing = list_images([shard])
    assert [candidate.image_id for candidate in listing.candidates] == ["good-pjpg"]
    assert [thing.where for thing in listing.quarantined] == ["0.tar/both.jpg", "0.tar/broken.jpg", "0.tar/label.jpg"]
    assert listing.skipped == {"in a tar, of no sample": 3, "sample without an image": 1}
    assert listing.n_found == 8


def test_a_sparse_member_is_quarantined_for_its_bytes_are_no_range(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        entry = tarfile.TarInfo("1.jpg")
        entry.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(entry)
    [quarantined] = list_images([tmp_path / "0.tar"]).quarantined
    assert quarantined.reason == "is stored as a sparse file"


def test_a_huge_label_is_refused_before_it_is_read(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", {"1.jpg": b"x", "1.json": bytes(2**20 + 1)})
    with pytest.raises(ManifestError, match=r"`1\.json` has 1048577 bytes, too many for a label"):
        list_images([shard])


def test_a_loose_image_beside_shards_decides_the_layout_unless_it_is_forced(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", {"1.jpg": b"x"})
    write_files(tmp_path, "cover.jpg")
    assert (list_images([tmp_path]).layout, list_images([tmp_path]).skipped) == ("flat", {".tar": 1})
    listing = list_images([tmp_path], layout="webdataset")
    assert [candidate.image_id for candidate in listing.candidates] == ["1-pjpg"]
    assert listing.skipped == {"not in a tar": 1}


@pytest.mark.parametrize("damage", ["cut in a header", "cut in a payload", "garbled", "appended", "zipped", "text"])
def test_a_shard_that_is_not_whole_is_refused(tmp_path: Path, damage: str) -> None:
    # tarfile itself stops without a word at a garbled header and at the end of the first of two tars.
    shard = write_shard(tmp_path / "0.tar", {f"{number}.jpg": bytes(600) for number in range(3)})
    whole = shard.read_bytes()
    second = 512 + 1024
    damaged = {
        "cut in a header": whole[: second + 100],
        "cut in a payload": whole[: second + 700],
        "garbled": whole[:second] + b"\x55" * 512 + whole[second + 512 :],
        "appended": whole + whole,
        "zipped": b"\x1f\x8b" + whole,
        "text": b"not a tar at all",
    }
    shard.write_bytes(damaged[damage])
    with pytest.raises(ManifestError, match=r"0\.tar` cannot be read") as refused:
        list_images([shard])
    assert "uncompressed" in str(refused.value.hint)


def test_a_shard_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", {"1.jpg": b"x"})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").symlink_to(tmp_path / "0.tar")
    with pytest.raises(ManifestError, match="leads out"):
        list_images([tmp_path / "in"])
