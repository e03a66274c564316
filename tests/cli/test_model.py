"""`dla evaluate`, `dla predict`, `dla export`: what they print, write and refuse."""

import csv
import io
import json
import math
import os
import re
import runpy
import shutil
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
from typer.testing import CliRunner

import trainer.export
from cli.confusion import draw_confusion
from cli.main import app
from trainer.run import load_run, train_run
from trainer.run_folder import read_result

ORIENTATION = 0x0112  # the EXIF tag


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A finished probe and teacher, and a student that learned from the teacher."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("probe", "teacher"):
        train_run(tiny.run(kind, folder / kind))
    fields = {"teacher": folder / "teacher", "objective": tiny.objectives["messy"]}
    loop = {"steps": 40, "evaluate_steps": 20, "learning_rate": 0.01}
    train_run(tiny.run("student", folder / "student", loop=loop, **fields))
    return folder


@pytest.fixture(scope="module")
def export_once(runs, tmp_path_factory):
    """Exports the student in a format, once a module: its new folder and what the command printed."""

    @cache
    def export(format_name):
        out = tmp_path_factory.mktemp("exported") / "new" / "student"
        # Not by the fixture `dla`, which lives no longer than a test.
        arguments = ["export", runs / "student", "--out", out, "--format", format_name, "--json"]
        ended = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert ended.exit_code == 0, ended.output
        return out, json.loads(ended.stdout)

    return export


@pytest.fixture(scope="module")
def exported(export_once):
    """The student in the format of transformers."""
    return export_once("transformers")[0]


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def lines_of(ended):
    assert ended.exit_code == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def assert_one_message(ended, *words):
    assert ended.exit_code == 1
    assert ended.stderr.count("error: ") == ended.stderr.count("hint: ") == 1
    assert "Traceback" not in ended.stderr
    for word in words:
        assert word in ended.stderr


def image_of(tiny, image_id):
    return tiny.images / "images" / f"{image_id}.png"


# dla evaluate


def test_evaluate_measures_the_validation_split_unless_another_is_named(dla, runs):
    ended = dla("evaluate", runs / "teacher", "--json")
    facts = json.loads(ended.stdout)
    assert (facts["splits"], facts["roles"], facts["images"]) == (["validation"], {"validation": "validation"}, 6)
    assert facts["top1"]["value"] == read_result(runs / "teacher").validation_score
    assert "a little optimistic" in ended.stderr


def test_the_test_split_is_read_again_by_name_only_and_that_is_said(dla, runs):
    result = read_result(runs / "student")
    ended = dla("evaluate", runs / "student", "--split", "test", "--json")
    facts = json.loads(ended.stdout)
    measured = {"value": result.test_score, "low": result.test_low, "high": result.test_high}
    assert facts["top1"] == pytest.approx(measured)
    assert "note: `test`: the run read it once" in ended.stderr
    assert "note: `test`" not in dla("evaluate", runs / "student").stderr


def test_units_stand_with_their_values_and_images_are_counted_once(dla, runs):
    ended = dla("evaluate", runs / "teacher")
    table = [re.split("  +", line) for line in ended.stdout.splitlines()[2:6]]
    assert table[0] == ["measured", "value", "95 % interval"]
    assert [row[0] for row in table[1:]] == ["top-1", "calibration error, 15 bins", "log loss"]
    assert re.fullmatch(r"[\d.]+ %", table[1][1])
    assert re.fullmatch(r"[\d.]+ to [\d.]+ %", table[1][2])
    assert re.fullmatch(r"[\d.]+ %", table[2][1])
    assert re.fullmatch(r"[\d.]+ nats", table[3][1])
    assert "evaluate: 6/6 images" in ended.stderr  # of latents, too, which are gone through twice
    assert ", 6 images\n" in ended.stdout


@pytest.mark.parametrize(
    ("kind", "sees"),
    [("probe", ["nothing", "depth"]), ("teacher", ["image alone", "image and depth"]), ("student", [])],
)
def test_every_subset_of_modalities_is_shown_where_there_are_any(dla, runs, kind, sees):
    subsets = json.loads(dla("evaluate", runs / kind, "--json").stdout)["subsets"]
    assert [subset["modalities"] for subset in subsets] == ([[], ["depth"]] if sees else [])
    shown = dla("evaluate", runs / kind).stdout
    assert [line for line in sees if not re.search(rf"^{line} +\d", shown, re.MULTILINE)] == []
    assert ("sees" in shown) == bool(sees)


def test_the_classes_have_their_own_accuracies_which_make_the_whole(dla, runs):
    splits = ("--split", "labelled", "--split", "validation")
    facts = json.loads(dla("evaluate", runs / "probe", *splits, "--json").stdout)
    assert facts["roles"] == {"labelled": "labelled", "validation": "validation"}
    assert [(one["class"], one["images"]) for one in facts["classes"]] == [("red", 4), ("green", 4), ("blue", 4)]
    right = sum(one["images"] * one["top1"]["value"] for one in facts["classes"])
    assert right / 12 == pytest.approx(facts["top1"]["value"])
    assert facts["top5"] is None  # of three classes


def test_of_more_than_five_classes_there_is_a_top_5_and_one_without_images_has_no_accuracy(dla, tiny, tmp_path):
    manifest = tiny.make_manifest(tmp_path / "data", ("red", "green", "blue", "grey", "pink", "gold", "ash"))
    store = tiny.build(manifest, tmp_path / "cache.zarr")
    images = str(manifest.root)
    train_run(tiny.run("probe", tmp_path / "run", store=str(store), images=images, allow_empty_classes=True))
    facts = json.loads(dla("evaluate", tmp_path / "run", "--json").stdout)
    assert facts["top5"]["value"] >= facts["top1"]["value"]
    assert [one["top1"] is None for one in facts["classes"]] == [False] * 3 + [True] * 4
    shown = dla("evaluate", tmp_path / "run").stdout
    assert re.search(r"^top-5 +\d", shown, re.MULTILINE)
    assert re.search(r"^grey +0 +no image$", shown, re.MULTILINE)


def test_predictions_are_written_by_image_id_and_give_the_accuracy_again(dla, runs, tmp_path):
    arguments = (
        "evaluate",
        runs / "teacher",
        "--split",
        "test",
        "--split",
        "validation",
        "--out",
        tmp_path / "a" / "b",
    )
    facts = json.loads(dla(*arguments, "--probabilities", "--json").stdout)
    rows = rows_of((tmp_path / "a" / "b" / "predictions.csv").read_text())
    assert sorted(row["image_id"] for row in rows) == [f"test-{n}" for n in range(4)] + [
        f"validation-{n}" for n in range(6)
    ]
    assert {row["image_id"]: row["label"] for row in rows}["test-1"] == "green"
    assert np.mean([row["label"] == row["predicted"] for row in rows]) == pytest.approx(facts["top1"]["value"])
    for row in rows:
        probabilities = {name: float(row[f"probability of {name}"]) for name in ("red", "green", "blue")}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)  # six digits are written
        assert float(row["probability"]) == max(probabilities.values()) == probabilities[row["predicted"]]
    assert dla(*arguments).stdout.splitlines()[-2:] == [f"file {path}" for path in facts["files"]]
    assert list(rows_of((tmp_path / "a" / "b" / "predictions.csv").read_text())[0]) == [
        *("image_id", "label", "predicted", "probability")
    ]
    assert Image.open(tmp_path / "a" / "b" / "confusion.png").format == "PNG"


def cells_of(content, n_classes, cell):
    """The colour near the corner of each cell of a confusion picture, [K, K, 3]."""
    pixels = np.asarray(Image.open(io.BytesIO(content))).astype(int)
    is_frame = (pixels == 160).all(axis=2)
    (top, bottom), (left, right) = (np.flatnonzero(is_frame.sum(axis=axis) > n_classes * cell) for axis in (1, 0))
    assert bottom - top == right - left == n_classes * cell + 1
    return pixels[top + 4 :: cell, left + 4 :: cell][:n_classes, :n_classes]


def test_the_confusion_picture_is_blue_where_right_red_where_wrong_and_white_where_nothing():
    content = draw_confusion(np.array([[9, 1, 0], [0, 0, 0], [0, 5, 5]]), ["Ägypten", "b [x]", "日本" * 40], "run")
    cells = cells_of(content, 3, 56)
    white = (255, 255, 255)
    for place in ((0, 2), (1, 0), (1, 1), (1, 2), (2, 0)):
        assert tuple(cells[place]) == white
    for place in ((0, 0), (2, 2)):
        assert cells[place][2] > cells[place][0] + 40
    for place in ((0, 1), (2, 1)):
        assert cells[place][0] > cells[place][2] + 10
    assert cells[0, 0].sum() < cells[2, 2].sum()  # nine of ten is darker than five


@pytest.mark.parametrize(("n_classes", "cell"), [(1, 56), (60, 20), (700, 1)])
def test_the_confusion_picture_of_many_classes_stays_of_a_size_to_look_at(n_classes, cell):
    counts = np.eye(n_classes, dtype=np.int64)
    content = draw_confusion(counts, [f"class {number}" for number in range(n_classes)], "run")
    assert max(Image.open(io.BytesIO(content)).size) < 1600
    if cell > 3:
        assert cells_of(content, n_classes, cell).shape == (n_classes, n_classes, 3)


def test_a_run_that_was_moved_asks_where_its_store_and_images_are(dla, tiny, runs, tmp_path):
    moved = shutil.copytree(runs / "probe", tmp_path / "elsewhere" / "probe")
    assert_one_message(dla("evaluate", moved), "is not there", "--store")
    assert_one_message(dla("evaluate", moved, "--store", tiny.store), "is not there", "--images")
    ended = dla("evaluate", moved, "--store", tiny.store, "--images", tiny.images)
    assert ended.exit_code == 0, ended.stderr


def test_what_evaluate_cannot_measure_is_one_message(dla, tiny, runs, tmp_path):
    other = tiny.build(tiny.manifest, tmp_path / "other.zarr", seed=1)
    assert_one_message(dla("evaluate", runs / "teacher", "--store", other), "another recipe of `depth`")
    assert_one_message(dla("evaluate", runs / "teacher", "--split", "transfer"), "have no label")
    assert_one_message(dla("evaluate", runs / "teacher", "--split", "nothing"), "no image of split `nothing`")
    assert_one_message(dla("evaluate", tmp_path), "is no run folder")
    (tmp_path / "file").write_text("")
    assert_one_message(dla("evaluate", runs / "probe", "--out", tmp_path / "file"), "cannot be written")
    begun = shutil.copytree(runs / "probe", tmp_path / "begun")
    (begun / "result.json").unlink()
    assert_one_message(dla("evaluate", begun), "is not finished", "--resume")


def test_other_images_than_the_runs_own_are_pointed_out(dla, tiny, runs, tmp_path):
    other = tiny.build(tiny.reverse(tiny.manifest), tmp_path / "other.zarr")
    assert "other images, splits or labels" in dla("evaluate", runs / "probe", "--store", other).stderr
    assert "other images, splits or labels" not in dla("evaluate", runs / "probe").stderr


# dla predict


def test_predict_gives_what_evaluate_measured_from_a_run_its_student_folder_and_its_export(
    dla, tiny, runs, exported, tmp_path
):
    dla("evaluate", runs / "student", "--split", "test", "--out", tmp_path)
    expected = {row["image_id"]: row for row in rows_of((tmp_path / "predictions.csv").read_text())}
    assert len({row["predicted"] for row in expected.values()}) > 1
    paths = [image_of(tiny, image_id) for image_id in expected]
    for model in (runs / "student", runs / "student" / "student", exported):
        answers = lines_of(dla("predict", model, *paths, "--json"))
        assert [answer["path"] for answer in answers] == [str(path) for path in paths]
        for answer, row in zip(answers, expected.values(), strict=True):
            assert answer["class"] == row["predicted"]
            assert answer["probability"] == pytest.approx(float(row["probability"]), abs=1e-5)  # six digits


def test_predict_needs_nothing_but_the_students_folder(dla, tiny, runs, tmp_path):
    alone = shutil.copytree(runs / "student", tmp_path / "alone")
    shutil.rmtree(alone / "student")
    ended = dla("predict", alone, image_of(tiny, "test-0"))
    assert ended.exit_code == 0, ended.stderr
    assert re.fullmatch(r".*test-0\.png  (red|green|blue) \d+\.\d %\n", ended.stdout)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_come_in_the_order_of_the_inputs_whatever_the_batch(dla, tiny, runs, monkeypatch, batch_size):
    named = [image_of(tiny, f"test-{number}") for number in (3, 0)]
    piped = [image_of(tiny, f"labelled-{number}") for number in (5, 1, 4)]
    stdin = io.TextIOWrapper(io.BytesIO("\n".join(map(str, piped)).encode() + b"\n\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    ended = dla("predict", runs / "student", named[0], "-", named[1], "--json", "--batch-size", batch_size)
    assert [answer["path"] for answer in lines_of(ended)] == [*map(str, [named[0], *piped, named[1]])]


def test_a_folder_stands_for_all_images_below_it_and_what_is_passed_over_is_counted(dla, tiny, runs, tmp_path):
    places = ["b.png", "a.PNG", "deep/er/c.png", "deep/d.png"]
    for place in [*places, "notes.txt", ".hidden.png", ".git/e.png"]:
        (tmp_path / "in" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image_of(tiny, "test-0"), tmp_path / "in" / place)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "in" / "deep")
    ended = dla("predict", runs / "student", tmp_path / "in", "--json")
    order = ["a.PNG", "b.png", "deep/d.png", "deep/er/c.png"]
    assert [answer["path"] for answer in lines_of(ended)] == [str(tmp_path / "in" / place) for place in order]
    assert "passed over: 1 hidden, 1 of other names, 1 linked folders" in ended.stderr


def test_csv_and_json_hold_the_likeliest_classes_falling(dla, tiny, runs):
    paths = [image_of(tiny, f"test-{number}") for number in range(3)]
    as_csv = rows_of(dla("predict", runs / "student", *paths, "--csv", "--top", 3).stdout)
    as_json = lines_of(dla("predict", runs / "student", *paths, "--json", "--top", 3))
    columns = ["path", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
    for row, answer in zip(as_csv, as_json, strict=True):
        assert list(row) == columns
        assert [row["class"], row["class_2"], row["class_3"]] == [one["class"] for one in answer["top"]]
        probabilities = [one["probability"] for one in answer["top"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)  # float32
        assert {name: answer[name] for name in ("class", "probability")} == answer["top"][0]
    assert list(lines_of(dla("predict", runs / "student", paths[0], "--json"))[0]) == ["path", "class", "probability"]


@pytest.fixture
def mixed(tiny, tmp_path):
    """Two good images, and between them an empty file and one that is not there."""
    (tmp_path / "empty.png").write_bytes(b"")
    bad = [tmp_path / "empty.png", tmp_path / "gone\x1b[31m.png"]
    return [image_of(tiny, "test-0"), *bad, image_of(tiny, "test-1")]


def test_bad_images_are_named_and_all_good_ones_are_predicted(dla, runs, mixed):
    ended = dla("predict", runs / "student", *mixed, "--json")
    assert_one_message(ended, "there is no answer for 2 of 4 images, named above as bad", "--allow-bad 2")
    assert [json.loads(line)["path"] for line in ended.stdout.splitlines()] == [str(mixed[0]), str(mixed[3])]
    assert f"bad: {mixed[1]}: is empty: 0 bytes\n" in ended.stderr
    assert "gone\\x1b[31m.png: cannot be read: No such file" in ended.stderr
    assert "\x1b[31m" not in ended.stderr


@pytest.mark.parametrize(("allowed", "exit_code"), [("2", 0), ("50%", 0), ("1", 1), ("49%", 1), ("-1", 2), ("x", 2)])
def test_so_many_bad_images_may_be_allowed(dla, runs, mixed, allowed, exit_code):
    assert dla("predict", runs / "student", *mixed, "--allow-bad", allowed).exit_code == exit_code


def test_whatever_lies_in_a_folder_predict_ends_with_answers_or_reasons(dla, runs, tmp_path):
    sys.path.insert(0, str(Path(__file__).parents[1]))
    try:
        from hostile import write_hostile_files
    finally:
        sys.path.pop(0)
    expected = {file.name: file.outcome for file in write_hostile_files(tmp_path / "photos")}
    answers = lines_of(dla("predict", runs / "student", tmp_path / "photos", "--allow-bad", "99%", "--json"))
    answered = {os.path.basename(answer["path"]) for answer in answers}
    # A manifest looks for images under other names, and refuses names and links that a plain path may well have.
    misnamed = {"no extension", "photo.jpg_large"}
    listed = {name for name, outcome in expected.items() if outcome == "listed"} - misnamed
    assert listed <= answered
    assert answered - listed == {"leads-out.jpg", "back\\slash.jpg", os.fsdecode(b"caf\xe9.jpg")}


def test_a_path_that_is_no_utf_8_comes_out_of_csv_as_it_went_in(dla, tiny, runs, tmp_path, monkeypatch):
    path = tmp_path / os.fsdecode(b"caf\xe9, 1.png")
    shutil.copy(image_of(tiny, "test-0"), path)
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(os.fsencode(path))))
    monkeypatch.setattr(sys, "stdout", out)
    assert dla("predict", runs / "student", "-", "--csv").exit_code == 0
    out.flush()
    assert out.buffer.getvalue().splitlines()[1].startswith(b'"' + os.fsencode(path) + b'",')


@pytest.mark.parametrize("arguments", [["--top", "4"], ["--top", "0"], ["--csv", "--json"], ["-", "-"], []])
def test_wrong_usage_of_predict_ends_with_2(dla, tiny, runs, arguments):
    inputs = [image_of(tiny, "test-0")] if arguments else []
    assert dla("predict", runs / "student", *inputs, *arguments).exit_code == 2


@pytest.mark.parametrize("kind", ["probe", "teacher"])
@pytest.mark.parametrize("command", ["predict", "export"])
def test_a_model_that_needs_latents_is_refused(dla, tiny, runs, tmp_path, kind, command):
    rest = [image_of(tiny, "test-0")] if command == "predict" else ["--out", tmp_path / "out"]
    assert_one_message(dla(command, runs / kind, *rest), f"is a {kind}, which needs latents", "dla evaluate")
    assert not (tmp_path / "out").exists()


def damage_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-9])


def edit(name, before, after):
    def change(folder):
        text = (folder / name).read_text()
        assert before in text
        (folder / name).write_text(text.replace(before, after))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_weights, "no student that can be loaded"),
        (edit("config.json", '"num_hidden_layers": 2', '"num_hidden_layers": 3'), "lack `vit.layers.2"),
        (edit("config.json", '"hidden_size": 16', '"hidden_size": "x"'), "no student that can be loaded"),
        (edit("config.json", '"vit"', '"nothing"'), "no student that can be loaded"),
        (edit("config.json", '"0": "red"', '"7": "red"'), "no student that can be loaded"),
        (edit("preprocessor_config.json", '"resample": 3', '"resample": 2'), "is none of dla's: `resample`"),
        (edit("preprocessor_config.json", '"shortest_edge": 8', '"shortest_edge": 9'), "is none of dla's: `crop_size`"),
        (edit("preprocessor_config.json", "{", "["), "no student that can be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no student that can be loaded"),
        (lambda folder: (folder / "config.json").unlink(), "neither a run nor a student"),
    ],
)
def test_a_damaged_export_is_one_message(dla, tiny, exported, tmp_path, damage, words):
    folder = shutil.copytree(exported, tmp_path / "student")
    damage(folder)
    assert_one_message(dla("predict", folder, image_of(tiny, "test-0")), words)


def test_inputs_without_an_image_are_an_error(dla, runs, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("")
    assert_one_message(dla("predict", runs / "student", tmp_path), "there is no image")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert_one_message(dla("predict", runs / "student", "-"), "there is no image")


# dla export

needs_onnx = pytest.mark.skipif(find_spec("onnxscript") is None, reason="the extra `onnx` is not installed")
FORMATS = ["transformers", "torch-export", pytest.param("onnx", marks=needs_onnx)]


@pytest.mark.parametrize("format_name", FORMATS)
def test_an_export_is_whole_and_checked_against_the_student(export_once, format_name):
    out, report = export_once(format_name)
    assert report["checked_on"] == "6 images of validation"
    assert 0 <= report["max_difference"] < 1e-4 * max(1, report["largest_logit"])  # another order of float32 sums
    assert report["size_bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert [path.name for path in out.parent.iterdir()] == ["student"]


def test_export_says_on_what_and_how_nearly_it_is_the_student(dla, runs, tmp_path):
    lines = dla("export", runs / "student", "--out", tmp_path / "out").stdout.splitlines()
    assert lines[1] == "checked  on 6 images of validation"
    assert re.fullmatch(r"logits   differ from the student's by [\d.e-]+ at most; its largest is [\d.]+", lines[2])


@pytest.mark.parametrize("format_name", FORMATS)
def test_the_code_in_the_card_gives_the_class_that_predict_gives(
    dla, tiny, runs, export_once, tmp_path, monkeypatch, capsys, format_name
):
    folder = shutil.copytree(export_once(format_name)[0], tmp_path / "student")
    wide = np.asarray(Image.open(image_of(tiny, "test-2")))[:, [0, 0, 0, *range(8), 7, 7]]
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    # A PNG under that name, so that no two decoders of JPEG are compared.
    Image.fromarray(wide).resize((39, 24)).save(folder / "photo.jpg", format="PNG", exif=exif)
    expected = lines_of(dla("predict", runs / "student", folder / "photo.jpg", "--json", "--top", 3))[0]
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    (folder / "load.py").write_text(code)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    logits = torch.as_tensor(runpy.run_path("load.py")["logits"])[0]
    assert capsys.readouterr().out.strip() == expected["class"]
    log_probabilities = logits.log_softmax(dim=-1).sort(descending=True).values.tolist()
    told = [math.log(one["probability"]) for one in expected["top"]]
    assert log_probabilities == pytest.approx(told, abs=1e-4)  # pixels are scaled in another order


@pytest.mark.parametrize("format_name", FORMATS)
def test_an_export_names_no_place_on_this_machine(runs, export_once, format_name):
    homes = [str(runs).encode(), str(Path(trainer.export.__file__).parents[1]).encode(), sys.prefix.encode()]
    for path in export_once(format_name)[0].iterdir():
        content = path.read_bytes()
        assert [home for home in homes if home in content] == [], path.name


def test_the_card_tells_classes_accuracy_and_what_the_student_was_made_of(dla, tiny, runs, exported):
    card, result, run = (exported / "README.md").read_text(), read_result(runs / "student"), load_run(runs / "student")
    assert f"**{100 * result.test_score:.1f} %**" in card
    assert f"{100 * result.test_low:.1f} to {100 * result.test_high:.1f} %" in card
    assert json.loads(re.search(r"```json\n(.*?)```", card, re.DOTALL)[1]) == ["red", "green", "blue"]
    facts = run.facts
    hashes = [run.weights_sha256, facts.rows_sha256, facts.teacher_sha256]
    hashes += [facts.latents_sha256["depth"], facts.recipes["depth"]]
    assert [one for one in hashes if one not in card] == []
    assert "distilled from a teacher, which looks at latents of `depth`" in card
    assert "source | `corners`" in card
    assert "Licence" in card


def test_stock_transformers_loads_the_export_with_the_students_logits(tiny, runs, exported):
    image = Image.open(image_of(tiny, "test-1"))
    processor = AutoImageProcessor.from_pretrained(exported)
    model = AutoModelForImageClassification.from_pretrained(exported)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        stock = model(pixel_values=pixels).logits
        ours = load_run(runs / "student").task.student(pixel_values=pixels).logits
    assert torch.equal(stock, ours)
    assert model.config.id2label == {0: "red", 1: "green", 2: "blue"}


def test_without_its_store_a_student_is_checked_on_random_pixels(dla, runs, tmp_path):
    alone = shutil.copytree(runs / "student", tmp_path / "far" / "away" / "alone")
    report = json.loads(dla("export", alone, "--out", tmp_path / "out", "--json").stdout)
    assert report["checked_on"].startswith("8 images of random pixels, since `")
    assert report["max_difference"] < 1e-4 * max(1, report["largest_logit"])
    assert "It was distilled from a teacher" in (tmp_path / "out" / "README.md").read_text()


def test_an_export_that_differs_from_the_student_is_not_put_in_place(dla, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.export, "TOLERANCE", -1.0)
    assert_one_message(dla("export", runs / "student", "--out", tmp_path / "out"), "differs from the student")
    assert list(tmp_path.iterdir()) == []


def test_an_export_leaves_what_is_there_alone(dla, runs, tmp_path):
    (tmp_path / "out").mkdir()
    assert_one_message(dla("export", runs / "student", "--out", tmp_path / "out"), "is there already")
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "file").write_text("")
    assert_one_message(dla("export", runs / "student", "--out", tmp_path / "file" / "out"), "cannot be written")


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_without_a_package_for_onnx_the_extra_is_named(dla, runs, tmp_path, monkeypatch, name):
    monkeypatch.setattr(trainer.export, "import_module", lambda wanted: present(wanted, name))
    ended = dla("export", runs / "student", "--out", tmp_path / "out", "--format", "onnx")
    assert_one_message(ended, f"needs `{name}`", "pip install 'dla[onnx]'")
    assert list(tmp_path.iterdir()) == []


def present(wanted, missing):
    if wanted == missing:
        raise ModuleNotFoundError(f"No module named '{wanted}'")


def test_a_format_that_is_none_ends_with_2(dla, runs, tmp_path):
    ended = dla("export", runs / "student", "--out", tmp_path / "out", "--format", "pickle")
    assert ended.exit_code == 2
    assert "torch-export" in ended.stderr
