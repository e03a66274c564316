"""relief-digits is frozen: splits, labels, renders and the files they are written to."""

import hashlib
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dla_cache.data.export import check_files_are_ours, encode_png, read_truth, write_relief_digits
from dla_cache.data.relief_digits import (
    CLASS_NAMES,
    SPLITS,
    depth_maps,
    load_digits,
    load_textures,
    plan_renderings,
    render_relief,
    render_split,
)
from dla_cache.errors import StoreError
from dla_cache.images import decode_image
from dla_cache.manifest import ManifestRow, read_manifest, write_manifest

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("relief-*.png"))
PLANS = {split: plan_renderings(split) for split in SPLITS}
SIZES = {"labelled": 200, "transfer": 3600, "validation": 800, "test": 1600, "generator": 21600}
EVERYTHING = [rendering for plan in PLANS.values() for rendering in plan]


def number_of(rendering):
    return int(rendering.image_id.split("-")[1])


@pytest.fixture(scope="module")
def depth():
    return depth_maps(load_digits()[0])


@pytest.fixture(scope="module")
def textures():
    return load_textures()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relief-digits")
    write_relief_digits(folder)
    return folder


def bytes_of(folder):
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*.p*")}


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_has_its_size_and_as_many_digits_of_each_class(split):
    plan = PLANS[split]
    assert len(plan) == SIZES[split]
    digits = {rendering.digit: rendering.label for rendering in plan}
    assert np.bincount([*digits.values()]).tolist() == [SPLITS[split].digits_per_class] * len(CLASS_NAMES)
    assert all(rendering.split == split for rendering in plan)


def test_no_digit_stands_in_two_splits():
    owned = [{rendering.digit for rendering in plan} for plan in PLANS.values()]
    assert len(set().union(*owned)) == sum(map(len, owned)) == len(load_digits()[1])


def test_no_two_digits_are_the_same_picture():
    assert len({digit.tobytes() for digit in load_digits()[0]}) == 5000


def test_labels_are_those_of_the_shipped_digits():
    labels = load_digits()[1]
    assert all(labels[rendering.digit] == rendering.label for rendering in EVERYTHING)


def test_the_splits_are_those_that_were_frozen():
    lines = "\n".join(f"{r.split} {r.image_id} {r.digit} {r.label}" for r in EVERYTHING)
    assert hashlib.sha256(lines.encode()).hexdigest() == (
        "f78388a0270a2706c0ac43573c1d0212153cb6900853050196e8c111766d83a9"
    )


def test_image_ids_are_unique_and_safe_file_names():
    image_ids = [rendering.image_id for rendering in EVERYTHING]
    assert len(set(image_ids)) == len(image_ids)
    assert all(re.fullmatch(r"digit-\d{4}-render-\d", image_id) for image_id in image_ids)


def test_an_image_id_does_not_tell_the_label():
    labels = np.array([label for _, label in sorted({(number_of(r), r.label) for r in EVERYTHING})])
    assert len(labels) == 5000
    # Of 5000 random pairs a correlation has standard deviation .014, of a tenth a share .004.
    assert abs(np.corrcoef(np.arange(5000), labels)[0, 1]) < 0.05
    assert abs((labels[1:] == labels[:-1]).mean() - 0.1) < 0.02


@pytest.mark.parametrize("split", SPLITS)
def test_the_order_of_a_split_is_mixed_over_the_classes(split):
    labels = [rendering.label for rendering in PLANS[split] if rendering.image_id.endswith("-0")]
    assert abs(np.corrcoef(np.arange(len(labels)), labels)[0, 1]) < 4 / len(labels) ** 0.5
    assert set(labels[:100]) == set(range(10))


def test_a_render_is_a_function_of_its_depth_and_image_id_alone(depth, textures):
    plan, pixels, _ = render_split("labelled")
    alone = [*zip(plan, pixels, strict=True)]
    random.Random(0).shuffle(alone)
    np.random.seed(1)
    state = np.random.get_state()[1].tolist()
    for rendering, image in alone[:50]:
        assert np.array_equal(render_relief(depth[rendering.digit], rendering.image_id, textures), image)
    assert np.random.get_state()[1].tolist() == state


def test_two_renders_of_a_digit_differ_in_light_texture_and_noise(depth, textures):
    first, second = (render_relief(depth[3], f"digit-0000-render-{draw}", textures) for draw in (0, 1))
    assert np.abs(first.astype(float) - second).mean() > 10


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_render_is_the_frozen_one(path, depth, textures):
    rendering = next(r for r in EVERYTHING if path.stem == f"relief-{r.image_id}")
    pixels = render_relief(depth[rendering.digit], rendering.image_id, textures)
    frozen = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
    # One level: a cosine may be rounded another way on another machine.
    assert np.abs(pixels.astype(int) - frozen).max() <= 1


def test_there_is_a_frozen_render_of_every_split():
    frozen = {path.stem.removeprefix("relief-") for path in GOLDEN}
    assert {rendering.split for rendering in EVERYTHING if rendering.image_id in frozen} == set(SPLITS)


def test_depth_is_the_padded_digit_with_softened_edges():
    digits = load_digits()[0][::250]
    maps = depth_maps(digits).astype(float)
    assert maps.shape == (20, 32, 32)
    # A blur moves height about and makes none: up to half a level of rounding a pixel.
    assert np.abs(maps.mean(axis=(1, 2)) - digits.sum(axis=(1, 2)) / 32**2).max() < 0.5
    assert np.abs(np.diff(maps)).max() < np.abs(np.diff(digits.astype(float))).max()
    blank = np.zeros((1, 28, 28), np.uint8)
    assert depth_maps(blank).max() == 0


def test_files_manifest_and_truth_agree(written, depth):
    manifest, truth = read_manifest(written / "manifest.parquet"), read_truth(written / "truth.parquet")
    planned = {rendering.image_id: rendering for rendering in EVERYTHING if rendering.split != "generator"}
    assert manifest.class_names == CLASS_NAMES
    assert manifest.image_ids == [*planned] == [*truth]
    assert {path.stem for path in (written / "images").iterdir()} == set(planned)
    for row in manifest.rows():
        assert (row.split, row.width, row.height) == (planned[row.image_id].split, 32, 32)
        assert truth[row.image_id].label == planned[row.image_id].label
        assert np.array_equal(truth[row.image_id].depth, depth[planned[row.image_id].digit])


def test_labels_of_transfer_images_stand_in_the_truth_and_not_in_the_manifest(written):
    labels = {row.image_id: (row.split, row.label) for row in read_manifest(written / "manifest.parquet").rows()}
    truth = read_truth(written / "truth.parquet")
    for image_id, (split, label) in labels.items():
        assert label == (None if split == "transfer" else truth[image_id].label)
    hidden = [truth[image_id].label for image_id, (split, _) in labels.items() if split == "transfer"]
    assert np.bincount(hidden).tolist() == [360] * 10


def test_the_generator_stands_in_no_manifest(written):
    digits = {image_id.rsplit("-", 2)[0] for image_id in read_manifest(written / "manifest.parquet").image_ids}
    assert digits.isdisjoint(rendering.image_id.rsplit("-", 2)[0] for rendering in PLANS["generator"])


def test_with_pairs_the_generators_own_images_are_listed_with_their_labels(tmp_path, monkeypatch):
    for name, split in SPLITS.items():
        monkeypatch.setitem(SPLITS, name, replace(split, digits_per_class=1, renders=1))
    manifest = write_relief_digits(tmp_path, with_pairs=True)
    of_split = {row.split: row.label for row in manifest.rows()}
    assert list(of_split) == list(SPLITS)
    assert [split for split, label in of_split.items() if label is None] == ["transfer"]
    with pytest.raises(StoreError, match="lists other images"):
        write_relief_digits(tmp_path)


def test_no_column_of_the_manifest_but_the_label_tells_a_class(written):
    columns = set(pq.read_schema(written / "manifest.parquet").names)
    assert columns == {"image_id", "uri", "label", "split", "sha256", "width", "height"}


def test_a_written_image_is_the_render(written):
    plan, pixels, _ = render_split("labelled")
    for rendering, image in [*zip(plan, pixels, strict=True)][::20]:
        content = (written / "images" / f"{rendering.image_id}.png").read_bytes()
        assert np.array_equal(decode_image(content, rendering.image_id), image)


def test_png_bytes_give_the_pixels_back():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7), dtype=np.uint8)
    assert np.array_equal(decode_image(encode_png(pixels), "made"), pixels)


def test_writing_again_gives_the_same_bytes(written):
    before = bytes_of(written)
    assert len(before) == 6202
    (written / "images" / "digit-0007-render-0.png").write_bytes(b"damaged")
    (written / "manifest.parquet").unlink()
    write_relief_digits(written)
    assert bytes_of(written) == before


def test_lists_of_its_own_do_not_keep_it_from_writing_again(written):
    check_files_are_ours(written, [split for split in SPLITS if split != "generator"])


@pytest.mark.parametrize("name", ["manifest.parquet", "truth.parquet"])
def test_a_list_of_other_images_is_refused_and_stays(tmp_path, name):
    rows = [ManifestRow("dog", "dog.png", 0, "train", "0" * 64, 5, 7)]
    write_manifest(tmp_path / name, rows, ["dogs"])
    before = bytes_of(tmp_path)
    with pytest.raises(StoreError, match="lists other images") as refused:
        write_relief_digits(tmp_path)
    assert "another folder" in refused.value.hint
    assert bytes_of(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_manifest_that_cannot_be_read_is_not_ours_to_overwrite(tmp_path):
    (tmp_path / "manifest.parquet").write_bytes(b"of a newer version, perhaps")
    with pytest.raises(StoreError, match="lists other images"):
        write_relief_digits(tmp_path)


def test_a_target_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written") as refused:
        write_relief_digits(tmp_path / "file" / "data")
    assert refused.value.hint


def test_a_truth_that_is_missing_or_rubbish_is_one_error(tmp_path):
    for content in (None, b"rubbish"):
        if content is not None:
            (tmp_path / "truth.parquet").write_bytes(content)
        with pytest.raises(StoreError, match="holds no truth") as refused:
            read_truth(tmp_path / "truth.parquet")
        assert "dla data relief-digits" in refused.value.hint
