"""A store that lost any one of its files or folders: every command ends with one message, or as if nothing was."""

import shutil

import pytest
import yaml

import dla_cache.sources
from dla_cache.spec import LatentFormat, Recipe

PATHS = [
    "commits",
    "commits/depth",
    "commits/depth/consolidated-*.parquet",
    "latents",
    "latents/depth",
    "latents/depth/c.0.0.0.0",
    "latents/depth/c.1.0.0.0",
    "latents/depth/zarr.json",
    "latents/zarr.json",
    "rows",
    "rows/*.arrow",
    "rows/index-*.parquet",
    "zarr.json",
]


class GreySource:
    """The mean colour of an image, [3, 1, 1]."""

    def __init__(self, spec, device):
        self.recipe = Recipe(
            modality=spec.modality,
            source=spec.source,
            weights_sha256="",
            parameters={},
            seed=spec.seed,
            source_view_size=8,
            format=LatentFormat(
                kind="continuous", shape=(3, 1, 1), axes=("channel", "height", "width"), dtype=spec.dtype
            ),
        )

    def encode(self, pixels, seeds):
        return pixels.mean((2, 3), keepdims=True)

    def close(self):
        pass


def delete(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def spoil(path):
    if path.is_file():
        path.write_bytes(b"\x00garbage\xff")
    else:
        for inner in [*path.rglob("*")]:
            if inner.is_file():
                inner.write_bytes(b"\x00garbage\xff")


def empty(path):
    if path.is_file():
        path.write_bytes(b"")
    else:
        delete(path)
        path.mkdir()


def turn_into_the_other_kind(path):
    was_folder = path.is_dir()
    delete(path)
    path.write_text("") if was_folder else path.mkdir()


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A spec, a run file, and a store of 24 images in two shards beside them."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "spec.yaml").write_text("latents: [{modality: depth, source: grey}]\nshard_size: 16\n")
    run = {"store": "s", "loop": {"steps": 1, "evaluate_steps": 1}}
    (folder / "run.yaml").write_text(yaml.safe_dump(tiny.describe("probe", "run", **run)))
    return folder


@pytest.fixture
def store(dla, tiny, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(dla_cache.sources, "open_source", GreySource)
    if not (whole / "s").exists():
        manifest = tiny.images / "manifest.parquet"
        assert dla("cache", "build", whole / "spec.yaml", "--manifest", manifest, "--out", whole / "s").exit_code == 0
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    return tmp_path / "s"


def test_these_are_all_files_and_folders_of_a_store(store):
    patterns = [*PATHS, "README.md"]  # the card repeats what the others say: no data is lost with it
    assert sorted(path for path in store.rglob("*")) == sorted(next(store.glob(pattern)) for pattern in patterns)


@pytest.mark.parametrize("loss", [delete, spoil, empty, turn_into_the_other_kind])
@pytest.mark.parametrize("pattern", PATHS)
def test_whatever_is_lost_no_command_shows_a_traceback_and_no_latent_is_invented(dla, tiny, store, pattern, loss):
    loss(next(store.glob(pattern)))
    build = (
        "cache",
        "build",
        store.parent / "spec.yaml",
        "--manifest",
        tiny.images / "manifest.parquet",
        "--out",
        store,
    )
    for arguments in (
        ("cache", "status", store),
        ("cache", "inspect", store),
        ("cache", "inspect", store, "--image-id", "test-0"),
        ("cache", "verify", store),
        ("train", store.parent / "run.yaml"),
        build,
        (*build, "--repair"),
    ):
        ended = dla(*arguments)
        assert ended.exit_code in (0, 1)
        assert [ended.stderr.count(word) for word in ("error: ", "hint: ")] == [ended.exit_code] * 2
        # Verifying finds each loss, before anything was mended.
        assert ended.exit_code == 1 or "verify" not in arguments
    if ended.exit_code == 0:
        assert dla("cache", "verify", store, "--manifest", tiny.images / "manifest.parquet").exit_code == 0
