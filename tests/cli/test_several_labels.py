"""The commands on runs of images with several labels: what they print, write and refuse."""

import ast
import csv
import io
import json
import re
import runpy

import pytest
import torch
from PIL import Image

from dla_cache.store import open_store
from tests.several_labels import build_several
from trainer.measure import measure_run
from trainer.run import load_run, train_run
from trainer.run_folder import read_result


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A teacher and a student that learned from it, both for long enough to see red."""
    folder = tmp_path_factory.mktemp("several")
    store = str(build_several(tiny, folder))
    loop = {"steps": 60, "evaluate_steps": 60, "learning_rate": 0.01}
    train_run(tiny.run("teacher", folder / "teacher", allow_empty_classes=True, loop=loop, store=store))
    fields = {"teacher": folder / "teacher", "objective": tiny.objectives["kd"], "store": store}
    train_run(tiny.run("student", folder / "student", allow_empty_classes=True, loop=loop, **fields))
    return folder


def test_evaluate_prints_map_for_every_subset_and_the_precision_of_each_class(dla, tiny, runs):
    text = dla("evaluate", runs / "teacher", "--split", "test").stdout
    facts = json.loads(dla("evaluate", runs / "teacher", "--split", "test", "--json").stdout)
    result = read_result(runs / "teacher")
    assert (facts["metric"], facts["mAP"]["value"], facts["mAP"]["low"]) == ("mAP", result.test_score, result.test_low)
    assert [subset["modalities"] for subset in facts["subsets"]] == [[], ["depth"]]
    assert f"{100 * facts['subsets'][0]['mAP']['value']:.1f}" in text
    assert f"\nmean average precision, mAP  {100 * facts['mAP']['value']:.1f} %  " in text
    assert "top-1" not in text
    assert "top1" not in facts
    measured = measure_run(
        load_run(runs / "teacher"), open_store(runs / "several.zarr"), tiny.images, ["test"], where=""
    )
    for one, count, value in zip(
        facts["classes"],
        measured.predictions.labels.sum(0).tolist(),
        measured.predictions.precision().by_class().tolist(),
        strict=True,
    ):
        assert (one["images"], one["average_precision"]) == (count, value if count else None)
        assert re.search(rf"{one['class']} +{count} +" + (f"{100 * value:.1f}" if count else "no image"), text)


def test_the_predictions_file_names_all_classes_of_an_image(dla, tiny, runs, tmp_path):
    ended = dla("evaluate", runs / "student", "--out", tmp_path / "out", "--probabilities")
    assert "confusion.png" not in ended.stdout
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "predictions.csv").read_text())))
    several = {row.image_id: row.label for row in open_store(runs / "several.zarr").rows}
    names = tiny.manifest.class_names
    assert len(rows) == 6
    for row in rows:
        assert json.loads(row["label"]) == [names[k] for k in several[row["image_id"]]]
        assert json.loads(row["predicted"]) == [name for name in names if float(row[f"probability of {name}"]) > 0.5]


def test_predict_names_the_classes_above_half_and_says_so_where_there_is_none(dla, tiny, runs):
    images = sorted((tiny.images / "images").glob("test-*.png"))
    answers = [json.loads(line) for line in dla("predict", runs / "student", *images, "--json").stdout.splitlines()]
    full = [
        json.loads(line) for line in dla("predict", runs / "student", *images, "--json", "--top", 3).stdout.splitlines()
    ]
    for answer, ranked in zip(answers, full, strict=True):
        assert len(ranked["classes"]) == 3
        assert answer["classes"] == [one for one in ranked["classes"] if one["probability"] > 0.5]
    assert {len(answer["classes"]) for answer in answers} > {0}  # blue images have none, others some
    lines = dla("predict", runs / "student", *images).stdout.splitlines()
    listed = list(csv.reader(io.StringIO(dla("predict", runs / "student", *images, "--csv").stdout)))
    for answer, line in zip(answers, lines, strict=True):
        shown = [f"{one['class']} {100 * one['probability']:.1f} %" for one in answer["classes"]]
        assert line == "  ".join([answer["path"], *(shown or ["no class above 50 %"])])
        cells = [[one["class"], f"{one['probability']:.6g}"] for one in answer["classes"]] or [["", ""]]
        assert [row[1:] for row in listed if row[0] == answer["path"]] == cells


@pytest.mark.parametrize("format_name", ["transformers", "torch-export"])
def test_an_export_says_how_its_classes_are_to_be_read(dla, tiny, runs, tmp_path, monkeypatch, capsys, format_name):
    out = tmp_path / "student"
    assert dla("export", runs / "student", "--out", out, "--format", format_name).exit_code == 0
    card = (out / "README.md").read_text()
    assert "any number of them an image" in card
    score = f"**{100 * read_result(runs / 'student').test_score:.1f} %**"
    assert f"Mean average precision (mAP) on the 4 images of `test`: {score}" in card
    Image.open(tiny.images / "images" / "test-1.png").save(out / "photo.jpg", format="PNG")
    student = out if format_name == "transformers" else runs / "student"
    expected = json.loads(dla("predict", student, out / "photo.jpg", "--json").stdout)["classes"]
    (out / "load.py").write_text(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1])
    monkeypatch.chdir(out)
    capsys.readouterr()
    logits = torch.as_tensor(runpy.run_path("load.py")["logits"])[0]
    told = ast.literal_eval(capsys.readouterr().out)
    assert set(told) == {one["class"] for one in expected}
    assert logits.sigmoid().max().item() == pytest.approx(max(one["probability"] for one in expected), abs=1e-4)


def test_a_page_of_several_labels_speaks_of_map_and_takes_no_other_runs(dla, tiny, runs, tmp_path):
    page = tmp_path / "page.html"
    ended = dla("report", runs / "teacher", runs / "student", "--out", page, "--json")
    assert [row["metric"] for row in json.loads(ended.stdout)["rows"]] == ["mAP", "mAP"]
    text = page.read_text()
    assert "Mean average precision on the test images" in text
    assert "top-1" not in text.lower()
    train_run(tiny.run("probe", tmp_path / "probe"))
    refused = dla("report", runs / "teacher", tmp_path / "probe", "--out", tmp_path / "mixed.html")
    assert refused.exit_code == 1
    assert "some runs are measured by mAP and others by top-1" in refused.stderr
    assert not (tmp_path / "mixed.html").exists()


def test_train_says_what_its_score_is(dla, tiny, runs, tmp_path):
    run_file = tmp_path / "run.yaml"
    run_file.write_text(
        json.dumps(tiny.describe("probe", tmp_path / "run", allow_empty_classes=True, store=str(runs / "several.zarr")))
    )
    ended = dla("train", run_file)
    assert ended.exit_code == 0, ended.stderr
    assert re.search(r"^validation mAP +\d", ended.stdout, re.MULTILINE)
    assert "top-1" not in ended.stdout
