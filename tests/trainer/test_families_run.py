"""Students of every family from their run file to their export: the same store, loop, commands and checks for all."""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from dla_cache.images import centre_square
from tests.trainer.students import FAMILIES, SIDE, WITH_BATCH_NORM, make_student, model_of
from trainer.data import PixelScale
from trainer.export import FORMATS, Student, compare, export_run
from trainer.predict import classify, open_student
from trainer.run import load_run, train_run

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """The folder of a finished run of a family, trained once a module; `folder / "export"` is its export."""
    top = tmp_path_factory.mktemp("families")

    @cache
    def train(family):
        loop = {"steps": 2, "evaluate_steps": 2, "learning_rate": 0.01, "ema_decay": 0.5}
        train_run(tiny.run("student", top / family, image_size=SIDE, model=model_of(family), loop=loop))
        return top / family

    return train


@pytest.fixture(scope="module")
def exported(trained):
    """The same, exported for transformers."""

    @cache
    def export(family):
        out = trained(family).with_name(f"{family}-export")
        report = export_run(trained(family), out)
        assert report.max_difference <= 1e-5 * max(1, report.largest_logit)
        return out

    return export


@every_family
def test_stock_transformers_gives_an_export_the_pixels_and_logits_of_evaluation(family, trained, exported):
    run = load_run(trained(family))
    pixels = np.random.default_rng(3).integers(0, 256, (3, 41, 57), dtype=np.uint8)
    scale = PixelScale(run.config.pixel_mean, run.config.pixel_std)
    seen = scale.apply(torch.from_numpy(centre_square(pixels, SIDE)[None]))
    processed = AutoImageProcessor.from_pretrained(exported(family))(pixels.transpose(1, 2, 0), return_tensors="pt")
    torch.testing.assert_close(processed["pixel_values"], seen, atol=1e-5, rtol=0)
    model = AutoModelForImageClassification.from_pretrained(exported(family))
    assert model.config.id2label == {0: "red", 1: "green", 2: "blue"}
    with torch.inference_mode():
        torch.testing.assert_close(model(seen).logits, run.task.student(seen).logits, atol=1e-6, rtol=0)


@every_family
def test_a_run_and_its_export_name_the_same_classes_of_a_file(family, trained, exported, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    (of_run,), (of_export,) = (
        list(classify(open_student(folder), [path], batch_size=2, top=3))
        for folder in (trained(family), exported(family))
    )
    assert [name for name, _ in of_run.classes] == [name for name, _ in of_export.classes]
    np.testing.assert_allclose([p for _, p in of_run.classes], [p for _, p in of_export.classes], atol=1e-6)


@every_family
def test_a_card_says_what_model_it_is_and_what_it_costs(family, exported):
    card = (exported(family) / "README.md").read_text()
    assert f"`{family}`" in card
    assert "FLOPs" in card


@pytest.mark.parametrize("family", WITH_BATCH_NORM)
def test_batch_statistics_are_averaged_kept_and_loaded(family, trained):
    student = load_run(trained(family)).task.student
    state = student.state_dict()
    means = [value for name, value in state.items() if name.endswith("running_mean")]
    assert means
    assert any(value.any() for value in means)
    assert {int(value) for name, value in state.items() if name.endswith("num_batches_tracked")} == {2}


@pytest.mark.parametrize(
    ("family", "format_name"),
    [("swin", "onnx"), ("resnet", "onnx"), ("resnet", "torch-export"), ("convnext", "torch-export")],
)
def test_a_traced_export_of_each_kind_of_layer_gives_the_student_s_logits(family, format_name, tmp_path):
    if format_name == "onnx":
        pytest.importorskip("onnxscript", reason="an extra")
    names = ("red", "green", "blue")
    student = Student(make_student(family), names, False, SIDE, PixelScale((0.5,) * 3, (0.5,) * 3))
    images = [np.random.default_rng(n).integers(0, 256, (3, 40, 50 + n), dtype=np.uint8) for n in range(4)]
    difference, largest = compare(FORMATS[format_name](student, tmp_path), student, images)
    assert difference < 1e-5
    assert largest > 1e-3
    assert (student.model.config._attn_implementation == "sdpa") == (family == "swin")
