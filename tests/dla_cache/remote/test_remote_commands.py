"""Commands on the URL of a store, and training from there."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from cli.main import app
from dla_cache.errors import StoreError
from dla_cache.remote import FolderObjects, S3Objects


@pytest.fixture
def url(tiny: SimpleNamespace, s3: S3Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny store, copied below a prefix as any tool copies it."""
    monkeypatch.setenv("DLA_CACHE_DIR", str(tmp_path / "cache"))
    folder = FolderObjects(tiny.store)
    for name in folder.names():
        s3.write(name, folder.read(name))
    return s3.url


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def test_a_store_that_was_copied_below_a_prefix_is_read_there_by_its_url(url: str, tiny: SimpleNamespace) -> None:
    for words in (["cache", "status"], ["cache", "inspect"], ["cache", "verify"]):
        at_url, local = run(*words, url, "--json"), run(*words, str(tiny.store), "--json")
        assert (at_url.exit_code, json.loads(at_url.stdout)) == (0, json.loads(local.stdout))
    assert "labelled-0 is whole" in run("cache", "explain", url, "labelled-0").stdout
    assert run("cache", "diff", url, str(tiny.store)).exit_code == 0


def test_a_run_trained_from_a_url_is_the_run_trained_from_the_folder(
    url: str, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    results = []
    for name, store in (("remote", url), ("local", str(tiny.store))):
        run_file = tmp_path / "runs" / f"{name}.yaml"
        run_file.write_text(yaml.safe_dump(tiny.describe("probe", tmp_path / name) | {"store": store}))
        done = run("train", str(run_file), "--json")
        assert done.exit_code == 0, done.output
        results.append(json.loads(done.stdout))
    timing = {"train_seconds", "images_per_s"}
    assert {k: v for k, v in results[0].items() if k not in timing} == {
        k: v for k, v in results[1].items() if k not in timing
    }
    assert yaml.safe_load((tmp_path / "remote" / "config.yaml").read_text())["store"] == url
    measured = run("evaluate", str(tmp_path / "remote"), "--json")
    assert measured.exit_code == 0, measured.output
    assert json.loads(measured.stdout)["is_own_data"]


@pytest.mark.parametrize("words", [["du"], ["prune"], ["rm", "--yes"], ["takedown", "--ids", "labelled-0"]])
def test_what_works_on_folders_only_refuses_a_url_and_says_what_to_do(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error: Any = run("cache", *words, "s3://bucket/store").exception
    assert isinstance(error, StoreError)
    assert "`s3://bucket/store` is no folder" in error.message
    assert "copy the store to a folder" in (error.hint or "")
    assert [*tmp_path.iterdir()] == []


def test_a_cache_that_was_removed_is_filled_again(url: str, tmp_path: Path) -> None:
    for _ in range(2):
        assert run("cache", "explain", url, "labelled-0").exit_code == 0
        shutil.rmtree(tmp_path / "cache")
