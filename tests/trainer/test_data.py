"""Batches of real pixels: training crops come from the whole original, evaluation sees its centre."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from dla_cache.errors import ImageError
from dla_cache.images import centre_square, decode_image, shrink
from dla_cache.manifest import ManifestRow, write_manifest
from dla_cache.store import create_store
from dla_cache.store.rows import RowTable
from trainer.augment import apply_views
from trainer.data import PairSource, PixelScale, Role
from trainer.presets import EMBEDDED_CROP
from trainer.student import StudentConfig, build_student, export_student
from trainer.views import ViewConfig, draw_views

DIGITS = sorted((Path(__file__).parents[1] / "golden").glob("relief-digit-*.png"))
SCALE = PixelScale((0.394, 0.401, 0.388), (0.183, 0.168, 0.170))
PLAIN = PixelScale((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
ROLE = Role(("labelled",), 2)


def pair_source(folder, contents, *, image_size, view, pixel_scale=PLAIN):
    """Batches of images alone, from the bytes of their files."""
    rows = []
    for number, content in enumerate(contents):
        (folder / f"{number}.png").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        height, width = decode_image(content, "").shape[1:]
        rows.append(ManifestRow(f"image-{number}", f"{number}.png", 0, "labelled", digest, width, height))
    manifest = write_manifest(folder / "manifest.parquet", rows, ["only"])
    store = create_store(folder / "cache.zarr", RowTable.from_manifest(manifest), manifest.class_names, 8, {})
    return PairSource(
        store,
        folder,
        image_size=image_size,
        pixel_scale=pixel_scale,
        modalities=(),
        view=ViewConfig.model_validate(view),
        seed=0,
        device="cpu",
    )


def png(folder, pixels):
    Image.fromarray(pixels).save(folder / "made.png")
    return (folder / "made.png").read_bytes()


@pytest.fixture
def edged(tmp_path):
    """Two files: a wide image and a tall one, black but for 4 white pixels at the left or upper edge."""
    pixels = np.zeros((24, 72, 3), np.uint8)
    pixels[:, :4] = 255
    return [png(tmp_path, pixels), png(tmp_path, pixels.transpose(1, 0, 2).copy())]


def first_batches(source, n_batches):
    stream = source.training([ROLE])(0)
    batches = [next(stream) for _ in range(n_batches)]
    stream.close()
    return batches


def test_training_crops_show_the_edges_of_a_wide_and_a_tall_image_and_evaluation_its_centre(tmp_path, edged):
    source = pair_source(tmp_path, edged, image_size=24, view={"scale_min": 0.1})
    shown = dict.fromkeys(("image-0", "image-1"), 0.0)
    for batch in first_batches(source, 20):
        for image_id, pixels in zip(batch.image_ids, batch.pixels, strict=True):
            shown[image_id] = max(shown[image_id], float(pixels.max()))
    assert min(shown.values()) > 0.9
    (evaluated,) = source.evaluation(ROLE, ())()
    assert float(evaluated.pixels.max()) == 0


def test_without_crops_training_sees_what_evaluation_sees(tmp_path, edged):
    source = pair_source(tmp_path, edged, image_size=16, view={})
    (batch,) = first_batches(source, 1)
    (evaluated,) = source.evaluation(ROLE, ())()
    order = [evaluated.image_ids.index(image_id) for image_id in batch.image_ids]
    torch.testing.assert_close(batch.pixels, evaluated.pixels[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("crops", [{"scale_min": 0.5}, {}], ids=["crops", "whole"])
def test_large_jpegs_are_decoded_scaled_in_training_where_the_view_says_so_and_never_in_evaluation(tmp_path, crops):
    ramp = np.linspace(0, 255, 96).astype(np.uint8)
    buffer = io.BytesIO()
    # A fine pattern, which a scaled decode averages away a little otherwise than resizing does.
    Image.fromarray(np.where(np.indices((96, 96)).sum(0) % 3, ramp[None], 128).astype(np.uint8)).save(buffer, "JPEG")
    seen = {}
    for scaled in (False, True):
        folder = tmp_path / str(scaled)
        folder.mkdir()
        view = {**crops, "scaled_decode": scaled}
        source = pair_source(folder, [buffer.getvalue()] * 2, image_size=16, view=view)
        (evaluated,) = source.evaluation(ROLE, ())()
        (batch,) = first_batches(source, 1)
        seen[scaled] = (batch.pixels, evaluated.pixels)
    assert torch.equal(seen[False][1], seen[True][1])
    assert not torch.equal(seen[False][0], seen[True][0])
    torch.testing.assert_close(seen[False][0], seen[True][0], rtol=0, atol=0.2)


@pytest.mark.parametrize("view", [EMBEDDED_CROP, {}], ids=["crops", "whole"])
def test_embedded_images_are_bitwise_one_batched_computation(tmp_path, view):
    contents = [path.read_bytes() for path in DIGITS]
    source = pair_source(tmp_path, contents, image_size=32, view=view, pixel_scale=SCALE)
    for number, batch in enumerate(first_batches(source, 6)):
        originals = [decode_image(contents[int(image_id.removeprefix("image-"))], "") for image_id in batch.image_ids]
        views = draw_views(0, batch.image_ids, number // 2, ViewConfig.model_validate(view))
        expected = SCALE.apply(apply_views(torch.from_numpy(np.stack(originals)), views, 32))
        assert torch.equal(batch.pixels, expected)


@pytest.mark.parametrize("shape", [(47, 80), (80, 47), (32, 32), (20, 20), (300, 400), (47, 1000)])
def test_the_exported_student_sees_an_image_as_evaluation_does(tmp_path, shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    source = pair_source(tmp_path, [png(tmp_path, pixels)], image_size=32, view={}, pixel_scale=SCALE)
    (evaluated,) = source.evaluation(ROLE, ())()
    torch.manual_seed(0)
    student = build_student(StudentConfig(n_classes=3, image_size=32, width=16, depth=1, n_heads=2)).eval()
    torch.nn.init.normal_(student.classifier.weight)
    export_student(student, tmp_path / "student", class_names=("a", "b", "c"), image_size=32, pixel_scale=SCALE)

    processor = AutoImageProcessor.from_pretrained(tmp_path / "student")
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "student")
    seen = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    # The same uint8 pixels, normalised in float32 in another order.
    torch.testing.assert_close(seen, evaluated.pixels, rtol=0, atol=1e-5)
    with torch.no_grad():
        expected = student(pixel_values=evaluated.pixels).logits
        torch.testing.assert_close(stock(pixel_values=seen).logits, expected, rtol=0, atol=1e-4)
    assert float(expected.std()) > 0.1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_the_exported_processor_takes_images_that_are_no_rgb(tmp_path, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)).convert(mode)
    image.save(tmp_path / "made.png")
    student = build_student(StudentConfig(n_classes=2, image_size=16, width=16, depth=1, n_heads=2))
    export_student(student, tmp_path / "student", class_names=("a", "b"), image_size=16, pixel_scale=PLAIN)
    source = pair_source(tmp_path, [(tmp_path / "made.png").read_bytes()], image_size=16, view={})
    (evaluated,) = source.evaluation(ROLE, ())()
    seen = AutoImageProcessor.from_pretrained(tmp_path / "student")(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen, evaluated.pixels, rtol=0, atol=1e-5)


def test_a_long_thin_image_is_refused_before_it_fills_the_memory():
    with pytest.raises(ImageError, match="200000 x 1 pixels would have 44800000 x 224") as refused:
        centre_square(np.zeros((3, 1, 200_000), np.uint8), 224)
    assert refused.value.hint


def test_an_original_is_shrunk_with_its_aspect_kept_and_never_enlarged():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 60), dtype=np.uint8)
    assert shrink(pixels, 20).shape == (3, 20, 30)
    assert shrink(pixels, 40) is shrink(pixels, 99) is pixels


def test_a_run_that_sees_no_images_gets_the_same_batches_and_needs_no_file(tmp_path, edged):
    source = pair_source(tmp_path, edged, image_size=24, view={})
    blind = PairSource(
        source.store,
        None,
        image_size=24,
        pixel_scale=PLAIN,
        modalities=(),
        view=source.view,
        seed=0,
        device="cpu",
        sees_images=False,
    )
    seen, unseen = ([*first_batches(each, 3), *each.evaluation(ROLE, ())()] for each in (source, blind))
    assert [(batch.image_ids, batch.labels.tolist()) for batch in unseen] == [
        (batch.image_ids, batch.labels.tolist()) for batch in seen
    ]
    assert {tuple(batch.pixels.shape) for batch in unseen} == {(2, 0)}
