"""`dla cache merge`: what it says before and after, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dla_cache.spec import LatentFormat, Modality, Recipe
from dla_cache.store import create_store
from dla_cache.store.rows import RowTable, StoredImage
from dla_cache.takedown import take_down


def make_store(path: str, numbers: range, modality: Modality) -> None:
    latent = LatentFormat(kind="codes", shape=(2,), axes=("codebook",), dtype="uint8", vocabulary=99)
    recipe = Recipe(
        modality=modality, source="made", weights_sha256="", parameters={}, seed=0, source_view_size=1, format=latent
    )
    rows = [
        StoredImage(row, f"image-{number}", "0" * 64, "train", None, f"{number}.png")
        for row, number in enumerate(numbers)
    ]
    made = create_store(Path(path), RowTable(rows), [], 4, {modality.value: recipe})
    for shard in made.shards:
        codes = np.repeat(np.array(numbers[shard.start : shard.stop])[:, None], 2, axis=1)
        made.write_shard(modality.value, shard, codes, seconds=0, device="cpu")


@pytest.fixture(autouse=True)
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`a` and `b` have depth of ten images between them, `c` sound of nine of these."""
    monkeypatch.chdir(tmp_path)
    make_store("a", range(6), Modality.DEPTH)
    make_store("b", range(6, 10), Modality.DEPTH)
    make_store("c", range(9), Modality.AUDIO)


def test_a_dry_run_says_what_a_run_then_does(dla: Callable) -> None:
    take_down([Path("b")], ["image-7"])
    arguments = ["cache", "merge", "a", "b", "c", "--out", "t", "--missing", "skip", "--shard-size", "5"]
    planned = dla(*arguments, "--dry-run")
    told = (
        "store         t, zarr, 8 images, 5 images a shard\n"
        "found         9 images: audio of 8, depth of 9\n"
        "left out      1 image removed from a store\n"
        "left out      1 image without `audio`: `image-9`\n"
    )
    assert (planned.exit_code, planned.stdout) == (0, f"{told}would write   4 shards, about 32 bytes in all\n")
    assert not Path("t").exists()
    facts = json.loads(dla(*arguments, "--dry-run", "--json").stdout)
    assert (facts["dry_run"], facts["shards_missing"], facts["coverage"]) == (True, 4, {"audio": 8, "depth": 9})
    done = dla(*arguments)
    assert done.stdout.startswith(f"{told}written       4 shards\ncontent hash  ")
    again = json.loads(dla(*arguments, "--json").stdout)
    assert (again["shards_written"], again["n_images"], again["shards_missing"]) == (0, 8, 0)
    assert again["content_hash"] == json.loads(dla("cache", "status", "t", "--json").stdout)["content_hash"]
    assert dla("cache", "verify", "t").exit_code == 0


def test_one_store_alone_loses_its_gaps_and_keeps_its_content_hash(dla: Callable) -> None:
    take_down([Path("a")], ["image-1"])
    before = json.loads(dla("cache", "status", "a", "--json").stdout)["content_hash"]
    facts = json.loads(dla("cache", "merge", "a", "--out", "t", "--layout", "webdataset", "--json").stdout)
    assert (facts["content_hash"], facts["layout"], facts["n_images"]) == (before, "webdataset", 5)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "told"),
    [
        (["a", "c", "--out", "t"], 1, "3 lack `depth`: `image-6`, `image-7`, `image-8`"),
        (["a", "b", "--out", "a"], 1, "is a store to read"),
        (["a", "b", "--out", "t", "--with-images"], 1, "no store holds them"),
        (["a", "missing", "--out", "t"], 1, "is no store"),
        (["s3://bucket/a", "--out", "t"], 1, "works on folders only"),
        (["a", "--out", "s3://bucket/t", "--dry-run"], 1, "works on folders only"),
        (["a", "b"], 2, "--out"),
        (["--out", "t"], 2, "STORE"),
        (["a", "--out", "t", "--shard-size", "0"], 2, "--shard-size"),
        (["a", "--out", "t", "--missing", "null"], 2, "skip"),
    ],
)
def test_what_makes_no_sense_is_refused(dla: Callable, arguments: list[str], exit_code: int, told: str) -> None:
    ended = dla("cache", "merge", *arguments)
    assert (ended.exit_code, told in ended.stderr) == (exit_code, True), ended.stderr
    assert not Path("t").exists()
