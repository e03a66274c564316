"""`dla cache import`: what it prints, and how it ends."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from cli.cache_import import import_command
from dla_cache.errors import MissingLatentError, SpecError
from dla_cache.manifest import ManifestRow, write_manifest
from dla_cache.store import open_store


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the command in a folder with `images.parquet`, three images, and `latents`, one file an image."""
    monkeypatch.chdir(tmp_path)
    Path("latents").mkdir()
    rows = []
    for number in range(3):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        rows.append(ManifestRow(f"image-{number}", f"{number}.png", None, "train", digest, 4, 4))
        np.save(f"latents/image-{number}.npy", np.full((2, 5), number, np.int64))
    write_manifest(Path("images.parquet"), rows, [])
    app = typer.Typer()
    app.command("import")(import_command)
    given = ["latents", "--manifest", "images.parquet", "--out", "s", "--modality", "audio"]
    return lambda *arguments: CliRunner().invoke(app, [*given, *arguments])


CODES = ("--kind", "codes", "--vocabulary", "3")


def test_an_import_says_what_was_stored(run: Callable[..., Result]) -> None:
    result = run(*CODES)
    assert result.exit_code == 0, result.output
    store = open_store(Path("s"))
    assert result.stdout.splitlines() == [
        "store         s, 3 of the manifest's 3 images",
        "latents       audio, uint8 [2, 5] (codebook, step)",
        "source        import:latents",
        "imported      3 images",
        f"content hash  {store.content_hash()}",
    ]


def test_what_was_left_out_is_counted_and_named(run: Callable[..., Result]) -> None:
    Path("latents/image-1.npy").rename("latents/other.npy")
    Path("latents/notes.txt").write_text("")
    result = run(*CODES, "--missing", "skip", "--allow-extra")
    assert result.stdout.splitlines()[0] == "store         s, 2 of the manifest's 3 images"
    assert result.stdout.splitlines()[4:7] == [
        "left out      1: `image-1 (no latent)`",
        "extra         1: `other.npy`",
        "no latents    1: `notes.txt`",
    ]


def test_a_missing_latent_is_an_error_unless_it_may_be_skipped(run: Callable[..., Result]) -> None:
    Path("latents/image-1.npy").unlink()
    result = run(*CODES)
    assert result.exit_code == 1
    assert isinstance(result.exception, MissingLatentError)


def test_json_tells_the_same(run: Callable[..., Result]) -> None:
    told = json.loads(run(*CODES, "--json").stdout)
    assert (told["n_images"], told["images_imported"], told["missing"]) == (3, 3, [])
    assert told["recipe"]["source"] == "import:latents"


@pytest.mark.parametrize("arguments", [("--kind", "codes"), ("--vocabulary", "3"), (*CODES, "--dtype", "float32")])
def test_options_that_contradict_each_other_are_wrong_usage(run: Callable[..., Result], arguments: tuple) -> None:
    assert run(*arguments).exit_code == 2


def test_an_unknown_modality_is_one_error(run: Callable[..., Result]) -> None:
    assert isinstance(run("--modality", "smell").exception, SpecError)
