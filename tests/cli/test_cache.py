"""`dla cache`: what it prints, what it leaves, and how it ends."""

import json
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import dla_cache.sources
from cli.cache import app
from dla_cache.errors import CorruptShardError, ImageError, SpecError, StoreError, WorkInterrupted
from dla_cache.manifest import ManifestRow, write_manifest
from dla_cache.spec import LatentFormat, LatentSpec, Recipe
from dla_cache.store import open_store


class GreySource:
    """The mean colour of an image, [3]."""

    def __init__(self, spec: LatentSpec, device: str) -> None:
        self.recipe = Recipe(
            modality=spec.modality,
            source=spec.source,
            weights_sha256="",
            parameters={},
            seed=spec.seed,
            source_view_size=4,
            format=LatentFormat(kind="continuous", shape=(3,), axes=("channel",), dtype=spec.dtype),
        )

    def encode(self, pixels: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
        return pixels.mean((2, 3))

    def close(self) -> None:
        pass


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the command in a folder with `spec.yaml` and `images.parquet`, ten images in two splits."""
    import hashlib

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dla_cache.sources, "open_source", GreySource)
    rows = []
    for number in range(10):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(f"{number}.png")
        digest = hashlib.sha256(Path(f"{number}.png").read_bytes()).hexdigest()
        rows.append(ManifestRow(f"image-{number}", f"{number}.png", 0, ("train", "test")[number % 2], digest, 4, 4))
    write_manifest(Path("images.parquet"), rows, ["grey"])
    Path("spec.yaml").write_text("latents: [{modality: depth, source: grey}]\nshard_size: 4\n")
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


BUILD = ("build", "spec.yaml", "--manifest", "images.parquet", "--out", "s")


def test_build_makes_a_store_and_says_what_it_did(run: Callable[..., Result]) -> None:
    result = run(*BUILD)
    assert result.exit_code == 0, result.output
    assert "encoded       10 images" in result.stdout
    assert "build: 10/10 images" in result.stderr
    report = json.loads(run(*BUILD, "--json").stdout)
    assert (report["images_encoded"], report["shards_missing"]) == (0, 0)
    assert report["content_hash"] in result.stdout


def test_status_tells_what_is_missing(run: Callable[..., Result]) -> None:
    run(*BUILD, "--rank", "1", "--world-size", "2")
    state = json.loads(run("status", "s", "--json").stdout)
    assert state["modalities"][0]["shards_missing"] == [0, 2]
    assert state["content_hash"] is None
    text = run("status", "s").stdout
    assert "depth     1/3     4/10" in text
    assert "none yet" in text
    run(*BUILD, "--rank", "0", "--world-size", "2")
    assert "3/3" in run("status", "s").stdout


def test_verify_ends_with_an_error_if_a_byte_is_flipped(run: Callable[..., Result]) -> None:
    run(*BUILD)
    whole = run("verify", "s", "--manifest", "images.parquet")
    assert whole.exit_code == 0
    assert "checked       3 shards" in whole.stdout
    path = Path("s/latents/depth/c.1.0")
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    damaged = run("verify", "s")
    assert isinstance(damaged.exception, CorruptShardError)
    assert "depth, shard 1: 1 of 4 samples do not have their checksum: `image-4`" in damaged.stdout
    assert len(json.loads(run("verify", "s", "--json").stdout)["problems"]) == 1


def test_build_and_verify_count_what_was_taken_out_of_the_store(run: Callable[..., Result]) -> None:
    run(*BUILD, "--rank", "1", "--world-size", "2")
    assert run("takedown", "s", "--ids", "image-4", "--ids", "image-8").exit_code == 0
    line = "left out      2 images of the manifest: removed from this store before"
    for command in (BUILD, ("verify", "s", "--manifest", "images.parquet")):
        result = run(*command)
        assert result.exit_code == 0, result.output
        assert line in result.stdout.splitlines()
    assert json.loads(run(*BUILD, "--json").stdout)["images_left_out"] == 2
    assert json.loads(run("verify", "s", "--manifest", "images.parquet", "--json").stdout)["n_removed"] == 2
    assert "left out" not in run("verify", "s").stdout


def test_what_verify_finds_damaged_a_build_repairs(run: Callable[..., Result]) -> None:
    content_hash = json.loads(run(*BUILD, "--json").stdout)["content_hash"]
    path = Path("s/latents/depth/c.1.0")
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    verified = run("verify", "s").exception
    assert "`--repair`" in verified.hint
    repaired = run(*BUILD, "--repair")
    assert repaired.exit_code == 0, repaired.output
    assert "made again    1 shard, 1 with the content they had" in repaired.stdout
    assert f"content hash  {content_hash}" in repaired.stdout
    assert run("verify", "s").exit_code == 0


def test_a_repair_amid_a_takedown_says_which_shards_are_without_their_removed_images(
    run: Callable[..., Result],
) -> None:
    run(*BUILD)
    for shard in (0, 1):
        path = Path(f"s/latents/depth/c.{shard}.0")
        path.write_bytes(b"\xff" + path.read_bytes()[1:])
    removed = open_store(Path("s")).rows.image_ids[0]
    assert isinstance(run("takedown", "s", "--ids", removed).exception, CorruptShardError)
    repaired = run(*BUILD, "--repair")
    assert repaired.exit_code == 0, repaired.output
    assert "made again    2 shards, 1 with the content they had, 1 without removed images" in repaired.stdout


def test_verify_says_to_move_away_what_no_build_touches(run: Callable[..., Result]) -> None:
    run(*BUILD)
    Path("s/notes.txt").write_text("mine")
    assert run("verify", "s").exception.hint == "move away what no store has written: `notes.txt`"
    Path("s/latents/depth/c.1.0").unlink()
    hint = run("verify", "s").exception.hint
    assert "`--repair`" in hint
    assert "move away what no store has written: `notes.txt`" in hint


def test_a_lost_shard_is_noticed_by_the_next_build(run: Callable[..., Result]) -> None:
    run(*BUILD)
    Path("s/latents/depth/c.1.0").unlink()
    lost = run(*BUILD).exception
    assert isinstance(lost, CorruptShardError)
    assert "`1`" in lost.message
    assert "`--repair`" in lost.hint


def test_other_latents_after_a_repair_end_with_an_error_that_names_the_shards(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(GreySource):
        def encode(self, pixels: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
            return super().encode(pixels, seeds) + 1

    run(*BUILD)
    Path("s/latents/depth/c.1.0").unlink()
    monkeypatch.setattr(dla_cache.sources, "open_source", Other)
    repaired = run(*BUILD, "--repair", "--json")
    assert json.loads(repaired.stdout)["shards_changed"] == ["depth, shard 1"]
    assert isinstance(repaired.exception, StoreError)
    assert "`depth, shard 1`" in repaired.exception.message
    assert run("verify", "s").exit_code == 0


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_one_error_before_anything_is_opened(
    run: Callable[..., Result], device: str
) -> None:
    refused = run("build", "spec.yaml", "--manifest", "nowhere.parquet", "--out", "s", "--device", device)
    assert isinstance(refused.exception, SpecError)
    assert f"`{device}`" in str(refused.exception)
    assert not Path("s").exists()


def test_a_webdataset_store_with_its_images_is_built_checked_shown_and_converted(run: Callable[..., Result]) -> None:
    content_hash = json.loads(run(*BUILD, "--json").stdout)["content_hash"]
    tars = ("build", "spec.yaml", "--manifest", "images.parquet", "--out", "t", "--set", "layout=webdataset")
    built = run(*tars, "--set", "images=original")
    assert built.exit_code == 0, built.output
    assert "stored        the bytes of 10 images" in built.stdout
    assert f"content hash  {content_hash}" in built.stdout
    assert "checked       6 shards" in run("verify", "t", "--manifest", "images.parquet").stdout
    text = run("status", "t").stdout
    assert "images    3/3     10/10" in text
    assert "layout        webdataset" in text
    assert f"bytes     {Path('7.png').stat().st_size}" in run("inspect", "t", "--image-id", "image-7").stdout
    converted = run("convert", "t", "u", "--layout", "zarr")
    assert converted.exit_code == 0, converted.output
    assert "written       6 shards of depth, images" in converted.stdout
    assert json.loads(run("convert", "t", "u", "--layout", "zarr", "--json").stdout) == {
        "n_images": 10,
        "series": ["depth", "images"],
        "shards_written": 0,
        "content_hash": content_hash,
        "source_content_hash": content_hash,
        "rounded": {},
        "errors": {},
    }
    assert run("convert", "t", "u", "--layout", "cupboard").exit_code == 2
    assert run("verify", "u", "--manifest", "images.parquet").exit_code == 0


def test_small_pictures_are_stored_told_and_not_what_latents_are_computed_from_again(
    run: Callable[..., Result],
) -> None:
    content_hash = json.loads(run(*BUILD, "--json").stdout)["content_hash"]
    small = (*BUILD, "--image-encoding", "jpeg", "--set", "image_size=2")
    built = run(*small)
    assert built.exit_code == 0, built.output
    assert "stored        as jpeg, 10 images" in built.stdout
    assert f"content hash  {content_hash}" in built.stdout
    text = run("status", "s").stdout
    assert "images        jpeg, size 2, quality 90, made by Pillow" in text
    live = run("verify", "s", "--recompute", "3")
    assert live.exit_code == 2
    assert "smaller pictures" in live.output
    assert run("verify", "s", "--recompute", "3", "--manifest", "images.parquet").exit_code == 0
    assert "depth: 3 of 3 images equal" in run("verify", "s", "--recompute", "3", "--images", ".").stdout
    other = run(*BUILD, "--image-encoding", "raw")
    assert "`images.encoding` `jpeg` → `raw`" in str(other.exception)
    assert run(*BUILD, "--image-encoding", "gif").exit_code == 2
    assert json.loads(run(*small, "--dry-run").stdout)["images"] == "jpeg"


def test_images_may_lie_elsewhere_than_their_manifest(run: Callable[..., Result]) -> None:
    Path("elsewhere").mkdir()
    Path("images.parquet").rename("elsewhere/images.parquet")
    arguments = ("build", "spec.yaml", "--manifest", "elsewhere/images.parquet", "--out", "s")
    assert isinstance(run(*arguments).exception, ImageError)
    assert run(*arguments, "--images", ".").exit_code == 0


def test_inspect_shows_recipe_and_statistics(run: Callable[..., Result]) -> None:
    run(*BUILD)
    text = run("inspect", "s").stdout
    assert "depth, recipe " in text
    # The red of the even images is 0, 2, 4, 6, 8.
    assert "train  5       0        4.0000  2.8284  0.0000   8.0000" in text
    statistics = json.loads(run("inspect", "s", "--json").stdout)["depth"]["statistics"]
    assert statistics["test"]["mean"] == [5, 0, 0]


def test_inspect_shows_one_image(run: Callable[..., Result]) -> None:
    run(*BUILD)
    assert "7.0000" in run("inspect", "s", "--image-id", "image-7").stdout
    facts = json.loads(run("inspect", "s", "--image-id", "image-7", "--json").stdout)
    assert (facts["image"]["row"], facts["shard"], facts["latents"]["depth"]["mean"]) == (7, 1, [7, 0, 0])
    assert isinstance(run("inspect", "s", "--image-id", "nobody").exception, StoreError)


def test_a_dry_run_prints_the_resolved_spec_and_writes_nothing(run: Callable[..., Result]) -> None:
    result = run(*BUILD, "--dry-run", "--set", "shard_size=7", "--set", "latents.0.seed=3")
    spec = json.loads(result.stdout)
    assert (spec["shard_size"], spec["latents"][0]["seed"], spec["latents"][0]["dtype"]) == (7, 3, "float16")
    assert not Path("s").exists()


def test_set_comes_before_the_file(run: Callable[..., Result]) -> None:
    run(*BUILD, "--set", "splits=[test]")
    assert json.loads(run("status", "s", "--json").stdout)["images_per_split"] == {"test": 5}


def test_an_unknown_key_is_one_error(run: Callable[..., Result]) -> None:
    result = run(*BUILD, "--set", "shard_sise=7")
    assert isinstance(result.exception, SpecError)
    assert "`shard_sise`" in str(result.exception)


def test_a_rank_outside_the_world_is_wrong_usage(run: Callable[..., Result]) -> None:
    assert run(*BUILD, "--rank", "2", "--world-size", "2").exit_code == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_build_between_batches_and_nothing_is_lost(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    class Signalled(GreySource):
        calls = 0

        def encode(self, pixels: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
            self.calls += 1
            if self.calls == 1:  # a second signal would act at once
                signal.raise_signal(number)
            return super().encode(pixels, seeds)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(dla_cache.sources, "open_source", Signalled)
        result = run(*BUILD, "--batch-size", "4")
    assert isinstance(result.exception, WorkInterrupted)
    assert "1 of 3 shards" in str(result.exception)
    assert signal.getsignal(number) is handler
    assert json.loads(run(*BUILD, "--json").stdout)["images_encoded"] == 6


GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "own-source.md"


@pytest.mark.parametrize("how", ["own-cache.yaml", "--source my_sources:Gradients --modality normals"])
def test_a_source_of_the_users_own_fills_a_store_from_the_folder_that_holds_it(dla, tmp_path, monkeypatch, how):
    for name, content in re.findall(r"<!-- file: ([\w.-]+) -->\n```\w+\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        (tmp_path / name).write_text(content)
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(tmp_path / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert dla("manifest", "make", ".", "--out", "m.parquet").exit_code == 0
    ended = dla("cache", "build", *how.split(), "--manifest", "m.parquet", "--out", "s.zarr")
    sys.modules.pop("my_sources", None)
    assert ended.exit_code == 0, ended.stderr
    store = open_store(Path("s.zarr"))
    assert store.read("normals", np.arange(3)).shape == (3, 2, 16, 16)
    assert "not stated" in Path("s.zarr/README.md").read_text()


@pytest.mark.parametrize(
    "arguments", [[], ["spec.yaml", "--source", "embedded-depth"], ["spec.yaml", "--modality", "depth"]]
)
def test_a_build_takes_a_spec_or_a_source_and_not_both(dla, tmp_path, arguments):
    ended = dla("cache", "build", *arguments, "--manifest", "m.parquet", "--out", tmp_path / "s")
    assert ended.exit_code == 2
