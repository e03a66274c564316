"""`dla cache takedown|ls|du|prune|rm`: what they print, and how they end."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from cli.cache_manage import du_command, ls_command, prune_command, rm_command, takedown_command
from cli.render import as_size
from dla_cache.errors import MissingLatentError, StoreError
from dla_cache.spec import LatentFormat, Modality, Recipe
from dla_cache.store import create_store, open_store
from dla_cache.store.rows import RowTable, StoredImage


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the commands in a folder with a store `caches/s` of five images, `image-<n>`; 0 and 1 are one file."""
    monkeypatch.chdir(tmp_path)
    latent = LatentFormat(kind="continuous", shape=(3,), axes=("channel",), dtype="float16")
    recipe = Recipe(
        modality=Modality.DEPTH,
        source="made",
        weights_sha256="",
        parameters={},
        seed=0,
        source_view_size=4,
        format=latent,
    )
    rows = RowTable(
        [StoredImage(row, f"image-{row}", str(max(row, 1)) * 64, "train", None, f"{row}.png") for row in range(5)]
    )
    store = create_store(Path("caches/s"), rows, [], 2, {"depth": recipe})
    for shard in store.shards:
        latents = np.full((len(shard), 3), shard.index + 1, np.float16)
        store.write_shard("depth", shard, latents, seconds=0, device="cpu")
    app = typer.Typer()
    for name, command in {
        "takedown": takedown_command,
        "ls": ls_command,
        "du": du_command,
        "prune": prune_command,
        "rm": rm_command,
    }.items():
        app.command(name)(command)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_a_takedown_takes_ids_and_files_of_ids(run: Callable[..., Result]) -> None:
    Path("ids.txt").write_text("image-0\n\nimage-3\n")
    result = run("takedown", "caches/s", "--ids", "ids.txt", "--ids", "image-4")
    assert result.exit_code == 0, result.output
    store = open_store(Path("caches/s"))
    assert store.rows.kept_ids == ("image-1", "image-2")
    assert "contact sheets" in result.stderr
    assert result.stdout.splitlines()[:3] == [
        "store         caches/s",
        "removed       3 images: `image-0`, `image-3`, `image-4`",
        "same bytes    under another ID in 1 image: `image-1`; name them as well to remove them",
    ]
    assert result.stdout.splitlines()[3] == "rewritten     3 shards"
    assert result.stdout.splitlines()[5] == f"content hash  {store.content_hash()}"


def test_a_dry_takedown_says_would_and_does_nothing(run: Callable[..., Result]) -> None:
    result = run("takedown", "caches/s", "--ids", "image-4", "--dry-run")
    assert "would remove  1 image: `image-4`" in result.stdout
    assert open_store(Path("caches/s")).rows.kept_ids[-1] == "image-4"


def test_a_takedown_tells_json(run: Callable[..., Result]) -> None:
    (told,) = json.loads(run("takedown", "caches/s", "--ids", "image-4", "--json").stdout)["stores"]
    assert (told["removed"], told["shards_rewritten"], told["same_bytes"]) == (["image-4"], 1, [])
    (told,) = json.loads(run("takedown", "caches/s", "--ids", "image-1", "--dry-run", "--json").stdout)["stores"]
    assert told["same_bytes"] == ["image-0"]


def test_an_images_path_is_no_id_and_the_id_is_told(run: Callable[..., Result]) -> None:
    content = b"\x89PNG\xff"
    rows = list(open_store(Path("caches/s")).rows)
    rows[3] = replace(rows[3], sha256=hashlib.sha256(content).hexdigest())
    recipe = open_store(Path("caches/s")).recipe("depth")
    create_store(Path("t"), RowTable(rows), [], 2, {"depth": recipe})
    Path("elsewhere").mkdir()
    Path("elsewhere/3.png").write_bytes(content)
    for place in ("3.png", "elsewhere/3.png"):
        fault = run("takedown", "caches/s", "t", "--ids", place, "--ids", "image-0").exception
        assert isinstance(fault, MissingLatentError)
        assert fault.message == f"`{place}` is an image's path; its ID is `image-3`"
    Path("elsewhere/3.png").write_bytes(b"\xff\xfe")
    fault = run("takedown", "t", "--ids", "elsewhere/3.png").exception
    assert "`elsewhere/3.png` cannot be read" in fault.message
    assert len(open_store(Path("t")).rows.kept_ids) == 5


def test_an_unknown_id_is_an_error(run: Callable[..., Result]) -> None:
    result = run("takedown", "caches/s", "--ids", "image-4", "--ids", "imge-3")
    assert isinstance(result.exception, MissingLatentError)
    assert len(open_store(Path("caches/s")).rows.kept_ids) == 5


def test_ls_lists_what_there_is(run: Callable[..., Result]) -> None:
    lines = run("ls").stdout.splitlines()
    assert lines[0].split() == ["store", "layout", "holds", "images", "complete", "size", "content", "hash"]
    content_hash = open_store(Path("caches/s")).content_hash()
    (told,) = json.loads(run("ls", "caches", "--json").stdout)
    assert told["content_hash"] == content_hash
    size = as_size(told["size_bytes"]).split()
    assert lines[1].split() == ["caches/s", "zarr", "depth", "5", "yes", *size, content_hash[:16]]


def test_du_adds_up(run: Callable[..., Result]) -> None:
    told = json.loads(run("du", "caches/s", "--json").stdout)
    parts = sum(told["series"].values()) + told["records"] + told["rest"] + told["leftovers"]
    assert told["total"] == parts == sum(path.stat().st_size for path in Path("caches/s").rglob("*") if path.is_file())
    assert run("du", "caches/s").stdout.splitlines()[-1].split()[:2] == ["total", str(parts)]


def test_prune_names_what_goes(run: Callable[..., Result]) -> None:
    Path("caches/s/commits/depth/.x.tmp").write_bytes(b"half")
    said = ["commits/depth/.x.tmp", "would be removed: 1 file, 4 bytes"]
    assert run("prune", "caches/s", "--dry-run").stdout.splitlines() == said
    assert Path("caches/s/commits/depth/.x.tmp").exists()
    assert run("prune", "caches/s").stdout.splitlines()[-1] == "removed: 1 file, 4 bytes"
    assert not Path("caches/s/commits/depth/.x.tmp").exists()


def test_rm_wants_a_yes(run: Callable[..., Result]) -> None:
    result = run("rm", "caches/s")
    assert isinstance(result.exception, StoreError)
    assert "--yes" in str(result.exception)
    assert run("rm", "caches/s", "--dry-run").exit_code == 0
    assert Path("caches/s").is_dir()
    assert run("rm", "caches/s", "--yes").exit_code == 0
    assert not Path("caches/s").exists()
    assert Path("caches").is_dir()
