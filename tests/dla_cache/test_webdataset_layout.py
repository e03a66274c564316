"""The WebDataset layout: stock readers find what is written, and the tars are what the format says."""

import io
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dla_cache.errors import CorruptShardError, StoreError
from dla_cache.spec import ORIGINAL_IMAGES, Modality
from dla_cache.store import LatentStore, open_store
from dla_cache.store.index import encode_index
from dla_cache.store.rows import RowTable, StoredImage
from dla_cache.store.webdataset_layout import npy_header

LAYOUTS = ["webdataset"]

FORMATS = [((3, 2, 2), "float16"), ((4,), "float32"), ((2, 5), "int16"), ((3, 7), "uint8"), ((1, 1, 1), "int32")]


@pytest.fixture
def store(tmp_path: Path, made: SimpleNamespace) -> LatentStore:
    """Seven images in shards of three, with depth, codes for audio, and their own bytes: PNG and JPEG in turn."""
    contents = []
    for row in range(7):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), (row, 0, 0)).save(buffer, format=("PNG", "JPEG")[row % 2])
        contents.append(buffer.getvalue())
    rows = RowTable(
        [
            StoredImage(row, f"image-{row}", made.sha256_of_bytes(content), "train", None, f"{row}.png")
            for row, content in enumerate(contents)
        ]
    )
    recipes = {"depth": made.recipe(), "audio": made.recipe((2, 5), "int16", modality=Modality.AUDIO)}
    store = made.create(tmp_path / "s", rows, [], 3, recipes, images=ORIGINAL_IMAGES)
    for shard in store.shards:
        for modality, recipe in recipes.items():
            latents = made.latents(recipe, 7)[shard.start : shard.stop]
            store.write_shard(modality, shard, latents, seconds=0, device="cpu")
        store.write_images(shard, contents[shard.start : shard.stop], seconds=0)
    return store


def tars(store: LatentStore, series: str) -> list[str]:
    return [str(store.shard_path(series, shard.index)) for shard in store.shards]


def test_stock_webdataset_reads_all_series_which_join_by_key(store: LatentStore) -> None:
    import webdataset

    streams = [
        webdataset.WebDataset(tars(store, series), shardshuffle=False, empty_check=False).decode("rgb8")
        for series in ("depth", "audio", "images")
    ]
    joined = list(zip(*streams, strict=True))
    assert [[sample["__key__"] for sample in samples] for samples in joined] == [
        [f"image-{row}"] * 3 for row in range(7)
    ]
    depth, audio, images = ([samples[place] for samples in joined] for place in range(3))
    np.testing.assert_array_equal([sample["depth.npy"] for sample in depth], store.read("depth", np.arange(7)))
    np.testing.assert_array_equal([sample["audio.npy"] for sample in audio], store.read("audio", np.arange(7)))
    assert [next(iter(sample.keys() & {"png", "jpg"})) for sample in images] == [
        ("png", "jpg")[row % 2] for row in range(7)
    ]
    assert images[6]["png"][0, 0].tolist() == [6, 0, 0]


def test_stock_datasets_reads_the_tars(store: LatentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    loaded = datasets.load_dataset(
        "webdataset", data_files={"train": tars(store, "depth")}, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded["__key__"] == [f"image-{row}" for row in range(7)]
    np.testing.assert_array_equal(np.array(loaded["depth.npy"], np.float16), store.read("depth", np.arange(7)))


def test_a_tar_is_a_function_of_ids_and_payloads_and_says_nothing_else(store: LatentStore) -> None:
    with tarfile.open(tars(store, "depth")[0]) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [f"image-{row}.depth.npy" for row in range(3)]
    for member in members:
        facts = (member.mtime, member.mode, member.uid, member.gid, member.uname, member.gname, member.pax_headers)
        assert facts == (0, 0o644, 0, 0, "", "", {})


def test_a_sample_is_found_by_the_index_alone(store: LatentStore) -> None:
    """Ten lines of a stranger's reader, as docs/format.md has them."""
    tar, index = store.shard_files("depth", 1)
    entries = np.frombuffer(index.read_bytes()[8:-4], [("offset", "<u8"), ("size", "<u8"), ("crc32c", "<u4")])
    offset, size, _ = entries[2]
    with tar.open("rb") as file:
        file.seek(int(offset))
        latent = np.load(io.BytesIO(file.read(int(size))), allow_pickle=False)
    np.testing.assert_array_equal(latent, store.read("depth", np.array([5]))[0])


@pytest.mark.parametrize(("shape", "dtype"), FORMATS)
def test_numpy_reads_every_sample(tmp_path: Path, made: SimpleNamespace, shape: tuple[int, ...], dtype: str) -> None:
    recipe = made.recipe(shape, dtype)
    latents = made.latents(recipe, 4)
    header = npy_header(recipe.format)
    assert len(header) % 64 == 0
    for latent in latents:
        read = np.load(io.BytesIO(header + latent.tobytes()), allow_pickle=False)
        assert read.dtype == latents.dtype
        np.testing.assert_array_equal(read, latent)


@pytest.mark.parametrize("n_digits", [89, 90, 91, 92, 190])
def test_ids_too_long_for_the_header_are_read_back(tmp_path: Path, made: SimpleNamespace, n_digits: int) -> None:
    rows = RowTable([StoredImage(row, f"{row:0{n_digits}d}", "0" * 64, "train", None, "a.png") for row in range(4)])
    recipe = made.recipe()
    store = made.create(tmp_path / "s", rows, [], 2, {"depth": recipe})
    latents = made.latents(recipe, 4)
    for shard in store.shards:
        store.write_shard("depth", shard, latents[shard.start : shard.stop], seconds=0, device="cpu")
    np.testing.assert_array_equal(store.read("depth", np.array([3, 0, 1])), latents[[3, 0, 1]])
    with tarfile.open(store.shard_path("depth", 1)) as tar:
        assert tar.getnames() == [f"{row:0{n_digits}d}.depth.npy" for row in (2, 3)]


@pytest.mark.parametrize("image_id", ["../../etc/passwd", "/a", "a/b", "a.b/c", "", "a\nb"])
def test_an_id_that_would_lead_elsewhere_is_never_written(tmp_path: Path, made: SimpleNamespace, image_id: str) -> None:
    rows = RowTable([StoredImage(0, image_id, "0" * 64, "train", None, "a.png")])
    store = made.create(tmp_path / "s", rows, [], 3, {"depth": made.recipe()})
    with pytest.raises(StoreError, match=r"a tar of ours cannot hold[\s\S]*hint: "):
        store.write_shard("depth", store.shards[0], made.latents(made.recipe(), 1), seconds=0, device="cpu")
    assert store.missing("depth") == [0]


def test_a_lost_index_is_one_error_that_says_how_to_get_it_back(store: LatentStore) -> None:
    store.shard_files("depth", 0)[1].unlink()
    with pytest.raises(CorruptShardError, match=r"shard 0 of `depth`[\s\S]*`--repair`"):
        open_store(store.path).read("depth", np.array([0]))


@pytest.mark.parametrize("series", ["depth", "images"])
@pytest.mark.parametrize(
    ("offsets", "size"),
    [([512, 1536, 512 * 10**9], 152), ([512, 1536, 2560], 10**6), ([512, 1536], 152), ([512, 1536, 2**63], 152)],
    ids=["beyond the tar", "longer than the tar", "of two images", "beyond any file"],
)
def test_an_index_that_leads_elsewhere_is_one_error(
    store: LatentStore, series: str, offsets: list[int], size: int
) -> None:
    store.shard_files(series, 0)[1].write_bytes(encode_index(offsets, [bytes(size)] * len(offsets)))
    read = {
        "depth": lambda rows: open_store(store.path).read("depth", rows),
        "images": open_store(store.path).read_images,
    }
    with pytest.raises(CorruptShardError, match=f"shard 0 of `{series}`.*(its index leads out of|bytes)"):
        read[series](np.array([2]))


@pytest.mark.parametrize("offset", [0, 20, 27, 68, -1])
def test_a_flipped_byte_of_an_index_is_called_so(store: LatentStore, offset: int) -> None:
    path = store.shard_files("images", 0)[1]
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptShardError, match=r"shard 0 of `images`.*its index is damaged"):
        open_store(store.path).read_images(np.array([1]))


def test_no_name_of_this_machine_or_user_is_in_a_store(store: LatentStore) -> None:
    needles = [str(store.path.parent).encode(), os.uname().nodename.encode()]
    for path in store.path.rglob("*"):
        if path.is_file():
            assert not any(needle in path.read_bytes() for needle in needles), path
