"""`dla cache convert`: what it prints, and what it refuses."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dla_cache.spec import LatentFormat, Modality, Recipe
from dla_cache.store import create_store
from dla_cache.store.rows import RowTable, StoredImage


def recipe_of(modality: Modality, dtype: str, vocabulary: int | None = None) -> Recipe:
    latent = LatentFormat(
        kind="codes" if vocabulary else "continuous",
        shape=(2, 3),
        axes=("codebook" if vocabulary else "channel", "step"),
        dtype=dtype,
        vocabulary=vocabulary,
    )
    return Recipe(
        modality=modality, source="made", weights_sha256="", parameters={}, seed=0, source_view_size=1, format=latent
    )


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`s` has float32 depth and codes of sound, of six images."""
    monkeypatch.chdir(tmp_path)
    rows = [
        StoredImage(row, f"image-{row}", hashlib.sha256(b"").hexdigest(), "train", None, f"{row}.png")
        for row in range(6)
    ]
    recipes = {"depth": recipe_of(Modality.DEPTH, "float32"), "audio": recipe_of(Modality.AUDIO, "uint8", 9)}
    made = create_store(Path("s"), RowTable(rows), [], 4, recipes)
    latents = {"depth": np.linspace(-1, 1, 36, dtype=np.float32).reshape(6, 2, 3), "audio": np.ones((6, 2, 3), int)}
    for modality, numbers in latents.items():
        for shard in made.shards:
            made.write_shard(modality, shard, numbers[shard.start : shard.stop], seconds=0, device="cpu")


def test_a_rounding_prints_its_error_and_both_hashes(dla: Callable) -> None:
    before = json.loads(dla("cache", "status", "s", "--json").stdout)["content_hash"]
    ended = dla("cache", "convert", "s", "t", "--dtype", "int8")
    assert ended.exit_code == 0, ended.stderr
    assert "store         t, zarr, 6 images\nwritten       4 shards of audio, depth\n" in ended.stdout
    assert "rounded       depth, float32 to int8: error 0." in ended.stdout
    assert f"before        {before}, of `s`" in ended.stdout
    facts = json.loads(dla("cache", "convert", "s", "t", "--dtype", "int8", "--json").stdout)
    assert (facts["rounded"], facts["source_content_hash"]) == ({"depth": ["float32", "int8"]}, before)
    assert facts["content_hash"] in ended.stdout
    assert facts["errors"]["depth"]["share_of_std"] < 0.01
    assert max(facts["errors"]["depth"]["max_abs"]) <= 1 / 254
    shown = dla("cache", "inspect", "t").stdout
    assert "  stored as         int8, error 0." in shown
    assert shown.count("stored as") == 1
    assert "  stored as         float32, nothing lost" in dla("cache", "inspect", "s").stdout


def test_a_dry_run_says_what_a_run_would_write_and_refuses_what_it_would(dla: Callable) -> None:
    ended = dla("cache", "convert", "s", "t", "--dtype", "int8", "--dry-run")
    assert ended.stdout == (
        "store         t, zarr, 6 images\n"
        "would round   depth, float32 to int8\n"
        "would write   4 shards of audio, depth, about 72 bytes in all\n"
    )
    facts = json.loads(dla("cache", "convert", "s", "t", "--layout", "webdataset", "--dry-run", "--json").stdout)
    assert (facts["dry_run"], facts["shards_missing"], facts["rounded"]) == (True, 4, {})
    assert not Path("t").exists()
    assert dla("cache", "convert", "s", "s", "--layout", "zarr", "--dry-run").exit_code == 1
    Path("other").mkdir()
    Path("other/thesis.tex").touch()
    assert "thesis.tex" in dla("cache", "convert", "s", "other", "--layout", "zarr", "--dry-run").stderr
    dla("cache", "convert", "s", "t", "--dtype", "int8")
    assert "would write   0 shards" in dla("cache", "convert", "s", "t", "--dtype", "int8", "--dry-run").stdout
    assert "`layout` `zarr`" in dla("cache", "convert", "s", "t", "--layout", "webdataset", "--dry-run").stderr


@pytest.mark.parametrize(
    ("options", "exit_code", "told"),
    [
        ([], 2, "--layout"),
        (["--dtype", "float8"], 2, "bfloat16"),
        (["--dtype", "int8", "--dtype", "depth=int8"], 2, "twice"),
        (["--dtype", "shape=int8"], 1, "no modality `shape`"),
        (["--dtype", "audio=int8"], 1, "`audio` holds codes"),
    ],
)
def test_what_makes_no_sense_is_refused(dla: Callable, options: list[str], exit_code: int, told: str) -> None:
    ended = dla("cache", "convert", "s", "t", *options)
    assert (ended.exit_code, told in ended.stderr) == (exit_code, True), ended.stderr
    assert not Path("t").exists()
