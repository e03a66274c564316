"""Objects in a folder and below a prefix: both do the same."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dla_cache.errors import StoreError
from dla_cache.remote import FolderObjects, MissingObjectError, ObjectStore, S3Objects, open_objects


def test_what_is_written_is_read_back_in_whole_and_in_ranges(objects: ObjectStore, tmp_path: Path) -> None:
    content = bytes(range(256)) * 11
    objects.write("latents/depth/c.7", b"before")
    objects.write("latents/depth/c.7", content)
    assert objects.read("latents/depth/c.7") == content
    assert objects.read_range("latents/depth/c.7", 5, 300) == content[5:300]
    assert objects.read_range("latents/depth/c.7", len(content) - 1, len(content) + 9) == content[-1:]
    assert objects.read_range("latents/depth/c.7", len(content), len(content) + 9) == b""
    stat = objects.stat("latents/depth/c.7")
    assert stat.size_bytes == len(content)
    with (tmp_path / "file").open("w+b") as file:
        objects.read_into("latents/depth/c.7", file, stat)
    assert (tmp_path / "file").read_bytes() == content


def test_an_empty_object_is_an_object(objects: ObjectStore) -> None:
    assert objects.create("empty", b"")
    assert objects.read("empty") == b""
    assert objects.stat("empty").size_bytes == 0


def test_an_object_is_created_once(objects: ObjectStore) -> None:
    assert objects.create("commits/3.json", b"first")
    assert not objects.create("commits/3.json", b"second")
    assert objects.read("commits/3.json") == b"first"


def test_of_many_who_create_one_object_at_once_one_does(objects: ObjectStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda number: objects.create("one", b"%d" % number), range(16)))
    assert created.count(True) == 1
    assert objects.read("one") == b"%d" % created.index(True)
    assert [*objects.names()] == ["one"]


def test_names_are_listed_by_their_beginning_over_any_number_of_pages(
    objects: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    names = {f"claims/depth/{shard}.1.json" for shard in range(11)} | {"claims/depthless", "rows/0"}
    for name in names:
        objects.write(name, b"x")
    assert set(objects.names()) == names
    assert {*objects.names("claims/depth/1")} == {"claims/depth/1.1.json", "claims/depth/10.1.json"}
    assert [*objects.names("nothing/here")] == []


def test_what_is_deleted_is_gone_and_may_be_deleted_again(objects: ObjectStore) -> None:
    objects.write("one", b"x")
    objects.delete("one")
    objects.delete("one")
    assert [*objects.names()] == []
    with pytest.raises(MissingObjectError, match=r"there is no `.*one`"):
        objects.read("one")
    with pytest.raises(MissingObjectError):
        objects.read_range("one", 0, 1)
    with pytest.raises(MissingObjectError):
        objects.stat("one")


def test_an_object_that_was_written_again_while_it_was_read_is_refused(objects: ObjectStore, tmp_path: Path) -> None:
    objects.write("one", b"before")
    stat = objects.stat("one")
    objects.write("one", b"after!")
    with (tmp_path / "file").open("w+b") as file, pytest.raises(StoreError, match="written again while it was read"):
        objects.read_into("one", file, stat)


def test_a_name_that_leads_elsewhere_is_refused(objects: ObjectStore) -> None:
    for name in ["", "..", "../x", "a/../x", "/x", "a//b", "a/", "./a", "a\\b", "a\0b"]:
        with pytest.raises(StoreError, match="no path below it"):
            objects.write(name, b"x")


def test_an_object_is_replaced_only_if_it_is_still_the_one_that_was_seen(objects: ObjectStore) -> None:
    objects.write("one", b"before")
    etag = objects.stat("one").etag
    assert objects.replace("one", b"after", etag)
    assert not objects.replace("one", b"too late", etag)
    assert objects.read("one") == b"after"


def test_a_place_is_a_prefix_or_a_folder(tmp_path: Path) -> None:
    assert isinstance(open_objects("s3://bucket/store"), S3Objects)
    assert isinstance(open_objects(str(tmp_path)), FolderObjects)


def test_a_killed_writer_leaves_nothing_that_is_listed(tmp_path: Path) -> None:
    objects = FolderObjects(tmp_path)
    (tmp_path / ".one.0123456789abcdef.tmp").write_bytes(b"half")
    assert [*objects.names()] == []


def test_a_folder_that_cannot_be_written_is_said_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="hint: "):
        FolderObjects(tmp_path / "file").create("one", b"x")
    with pytest.raises(StoreError, match="hint: "):
        FolderObjects(tmp_path / "file").read("one")
