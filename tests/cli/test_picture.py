"""`dla cache inspect --picture`: the contact sheet, and when there is none."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cli.picture import grey_picture, signed_picture
from dla_cache.data.export import encode_png
from dla_cache.data.relief_digits import CLASS_NAMES, render_split
from dla_cache.manifest import ManifestRow, write_manifest
from dla_cache.spec import ORIGINAL_IMAGES
from dla_cache.store import create_store, open_store
from dla_cache.store.rows import RowTable

TILE, GAP, NAME, TOP = 96, 6, 20, 26


@pytest.fixture(scope="module")
def sheet(tmp_path_factory):
    """Forty-two validation images with their truth, and a cache spec for the embedded source."""
    data = tmp_path_factory.mktemp("sheet") / "data"
    (data / "images").mkdir(parents=True)
    plan, pixels, depth = (part[:42] for part in render_split("validation"))
    rows = []
    for rendering, image in zip(plan, pixels, strict=True):
        content = encode_png(image)
        uri = f"images/{rendering.image_id}.png"
        (data / uri).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        rows.append(ManifestRow(rendering.image_id, uri, rendering.label, "validation", digest, 32, 32))
    write_manifest(data / "manifest.parquet", rows, CLASS_NAMES)
    truth = {"image_id": [r.image_id for r in plan], "label": [r.label for r in plan], "depth": [*map(bytes, depth)]}
    pq.write_table(pa.table(truth), data / "truth.parquet")
    (data / "spec.yaml").write_text("latents: [{modality: depth, source: embedded-depth}]\n")
    return SimpleNamespace(data=data, store=data.parent / "cache.zarr", image_id=plan[0].image_id, depth=depth[0])


@pytest.fixture
def store(dla, sheet):
    if not sheet.store.exists():
        spec, manifest = sheet.data / "spec.yaml", sheet.data / "manifest.parquet"
        assert dla("cache", "build", spec, "--manifest", manifest, "--out", sheet.store).exit_code == 0
    return sheet.store


def size_of(columns, rows):
    return (GAP + columns * (TILE + GAP), TOP + rows * (TILE + NAME + GAP))


def tile_of(picture, column):
    left = GAP + column * (TILE + GAP)
    return np.asarray(picture)[TOP : TOP + TILE, left : left + TILE]


def test_eight_images_are_drawn_with_latent_decoded_and_true_depth(dla, sheet, store, tmp_path):
    ended = dla("cache", "inspect", store, "--picture", tmp_path / "sheet.png", "--images", sheet.data, "--json")
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout) == {"picture": str(tmp_path / "sheet.png")}
    picture = Image.open(tmp_path / "sheet.png")
    # image, eight latent channels, decoded depth, true depth
    assert picture.size == size_of(11, 8)
    true, decoded = tile_of(picture, 10)[::3, ::3, 0], tile_of(picture, 9)[::3, ::3, 0]
    assert np.array_equal(true, sheet.depth)
    assert np.corrcoef(true.ravel(), decoded.ravel())[0, 1] > 0.9


def test_one_image_is_drawn_by_its_id(dla, sheet, store, tmp_path):
    options = ("--image-id", sheet.image_id, "--picture", tmp_path / "one.png", "--images", sheet.data)
    assert dla("cache", "inspect", store, *options).exit_code == 0
    picture = Image.open(tmp_path / "one.png")
    assert picture.size == size_of(11, 1)
    image = np.asarray(Image.open(sheet.data / "images" / f"{sheet.image_id}.png"))
    assert np.array_equal(tile_of(picture, 0)[::3, ::3], image)


def test_without_a_truth_there_is_no_column_for_it(dla, sheet, store, tmp_path):
    (sheet.data / "truth.parquet").rename(tmp_path / "truth.parquet")
    ended = dla("cache", "inspect", store, "--picture", tmp_path / "sheet.png", "--images", sheet.data)
    (tmp_path / "truth.parquet").rename(sheet.data / "truth.parquet")
    assert ended.stdout == f"picture {tmp_path / 'sheet.png'}\n"
    assert Image.open(tmp_path / "sheet.png").size == size_of(10, 8)


def test_latents_whose_decoder_is_not_shipped_are_drawn_by_their_channels_alone(dla, tiny, tmp_path):
    ended = dla("cache", "inspect", tiny.store, "--picture", tmp_path / "sheet.png", "--images", tiny.images)
    assert ended.exit_code == 0, ended.stderr
    n_channels = open_store(tiny.store).recipe("depth").format.shape[0]
    assert Image.open(tmp_path / "sheet.png").size[0] == size_of(1 + n_channels, 1)[0]


def test_latents_without_a_grid_are_one_message(dla, tiny, tmp_path):
    store = open_store(tiny.store)
    recipe = store.recipe("depth")
    tokens = recipe.format.model_copy(update={"shape": (4, 16), "axes": ("channel", "token")})
    create_store(
        tmp_path / "s", store.rows, store.class_names, 8, {"depth": recipe.model_copy(update={"format": tokens})}
    )
    ended = dla("cache", "inspect", tmp_path / "s", "--picture", tmp_path / "sheet.png", "--images", tiny.images)
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "nothing to draw" in ended.stderr
    assert ended.stderr.count("hint: ") == 1
    assert not (tmp_path / "sheet.png").exists()


def test_an_image_that_the_store_has_not_is_one_message(dla, sheet, store, tmp_path):
    options = ("--image-id", "nobody", "--picture", tmp_path / "one.png", "--images", sheet.data)
    ended = dla("cache", "inspect", store, *options)
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "`nobody`" in ended.stderr


def test_a_store_without_an_image_is_one_message(dla, sheet, store, tmp_path):
    metadata = open_store(store)
    create_store(tmp_path / "empty", RowTable([]), CLASS_NAMES, 512, {"depth": metadata.recipe("depth")})
    ended = dla("cache", "inspect", tmp_path / "empty", "--picture", tmp_path / "s.png", "--images", sheet.data)
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "no image to draw" in ended.stderr


def test_a_store_of_one_image_without_spread_is_drawn(dla, sheet, store, tmp_path):
    one = create_store(
        tmp_path / "one",
        RowTable(open_store(store).rows[:1]),
        CLASS_NAMES,
        512,
        {"depth": open_store(store).recipe("depth")},
    )
    one.write_shard("depth", one.shards[0], np.zeros((1, 8, 4, 4), np.float16), seconds=0, device="cpu")
    ended = dla("cache", "inspect", one.path, "--picture", tmp_path / "s.png", "--images", sheet.data)
    assert ended.exit_code == 0, ended.stderr
    assert Image.open(tmp_path / "s.png").size == size_of(11, 1)


def test_a_picture_that_cannot_be_written_is_one_message(dla, sheet, store, tmp_path):
    (tmp_path / "file").write_text("")
    ended = dla("cache", "inspect", store, "--picture", tmp_path / "file" / "sheet.png", "--images", sheet.data)
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "cannot be written" in ended.stderr


def test_a_picture_without_images_is_wrong_usage(dla, store, tmp_path):
    assert dla("cache", "inspect", store, "--picture", tmp_path / "sheet.png").exit_code == 2


def test_a_store_that_holds_its_images_is_drawn_without_their_folder(dla, sheet, store, tmp_path):
    rows = open_store(store).rows[:2]
    recipes = {"depth": open_store(store).recipe("depth")}
    held = create_store(tmp_path / "s", RowTable(rows), CLASS_NAMES, 512, recipes, images=ORIGINAL_IMAGES)
    held.write_shard("depth", held.shards[0], np.zeros((2, 8, 4, 4), np.float16), seconds=0, device="cpu")
    held.write_images(held.shards[0], [(sheet.data / row.uri).read_bytes() for row in rows], seconds=0)
    ended = dla("cache", "inspect", held.path, "--picture", tmp_path / "sheet.png")
    assert ended.exit_code == 0, ended.stderr
    image = np.asarray(Image.open(sheet.data / rows[0].uri))
    assert np.array_equal(tile_of(Image.open(tmp_path / "sheet.png"), 0)[::3, ::3], image)


def test_zero_is_white_and_the_sign_is_a_colour():
    below, zero, above = signed_picture(np.array([[-9.0, 0.0, 9.0]]))[0].tolist()
    assert zero == [247, 247, 247]
    assert below[2] > below[0]
    assert above[0] > above[2]


def test_grey_is_clipped_and_rounded():
    assert grey_picture(np.array([[-1.0, 0.5, 2.0]]))[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]
