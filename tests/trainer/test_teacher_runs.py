"""Whole runs of teachers of each fusion and of a pretrained backbone, and of the students that learn from them."""

import json
import shutil

import pytest
import torch
import yaml
from transformers import AutoModel
from typer.testing import CliRunner

from cli.main import app
from dla_cache.errors import CheckpointError, SpecError, WorkInterrupted
from tests.conftest import MODEL
from tests.trainer.backbones import MEAN, STD, save_pretrained
from trainer.checkpoint import load_checkpoint
from trainer.config import resolve_run
from trainer.run import load_run, train_run
from trainer.run_folder import read_facts, read_result

SMALL = {**MODEL, "tokens_per_modality": 4, "resampler_heads": 2}
PIXELS = {"pixel_mean": MEAN, "pixel_std": STD}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    return {family: save_pretrained(family, folder / family) for family in ("resnet", "vit")}


@pytest.fixture(scope="module")
def kinds(backbones):
    """Fields of a run of each kind of teacher."""
    trained = {"pretrained": str(backbones["resnet"])}
    return {
        "bottleneck": {"model": {**SMALL, "fusion": "bottleneck", "bottleneck_from": 0}},
        "late": {"model": {**SMALL, "fusion": "late"}},
        "backbone": {"model": {**SMALL, "backbone": trained}, **PIXELS},
        "frozen": {"model": {**SMALL, "fusion": "late", "backbone": {**trained, "freeze": True}}, **PIXELS},
    }


@pytest.mark.parametrize("kind", ["bottleneck", "late", "backbone", "frozen"])
def test_a_teacher_of_each_kind_trains_is_measured_and_teaches_a_student(tiny, kinds, tmp_path, kind):
    train_run(tiny.run("teacher", tmp_path / "teacher", **kinds[kind]))
    assert list(read_result(tmp_path / "teacher").branches) == ["teacher", "fused", "image alone"]
    ended = CliRunner().invoke(app, ["evaluate", str(tmp_path / "teacher"), "--json"])
    assert ended.exit_code == 0, ended.output
    assert [subset["modalities"] for subset in json.loads(ended.stdout)["subsets"]] == [[], ["depth"]]
    pixels = PIXELS if "pixel_mean" in kinds[kind] else {}
    fields = {"teacher": tmp_path / "teacher", "objective": tiny.objectives["messy"], **pixels}
    train_run(tiny.run("student", tmp_path / "student", **fields))
    record = json.loads((tmp_path / "student" / "metrics.jsonl").read_text().splitlines()[0])
    assert set(record["losses"]) == {"ce", "kd", "messy", "total"}


def weights_of(folder):
    return load_checkpoint(folder / "best.safetensors")[0]


def test_pretrained_weights_are_where_a_run_begins_and_frozen_ones_where_it_ends(tiny, kinds, backbones, tmp_path):
    train_run(tiny.run("teacher", tmp_path / "frozen", **kinds["frozen"]))
    train_run(tiny.run("teacher", tmp_path / "learning", **kinds["backbone"]))
    published = AutoModel.from_pretrained(backbones["resnet"]).state_dict()
    stock = {f"backbone.model.{name}": value for name, value in published.items()}
    frozen, learning = weights_of(tmp_path / "frozen"), weights_of(tmp_path / "learning")
    assert all(torch.equal(frozen[name], value) for name, value in stock.items())
    changed = [name for name, value in stock.items() if not torch.equal(learning[name], value)]
    assert any("running_mean" in name for name in changed)
    assert any("convolution.weight" in name for name in changed)


def test_a_stopped_run_of_a_pretrained_backbone_resumes_to_the_unbroken_one(tiny, kinds, tmp_path):
    train_run(tiny.run("teacher", tmp_path / "whole", **kinds["backbone"]))
    answers = iter([False] * 3 + [True])
    config = tiny.run("teacher", tmp_path / "broken", **kinds["backbone"])
    with pytest.raises(WorkInterrupted):
        train_run(config, should_stop=lambda: next(answers))
    train_run(config, resume=True)
    whole, broken = weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken")
    assert [name for name in whole if not torch.equal(whole[name], broken[name])] == []


def test_a_run_needs_its_pretrained_folder_no_more_and_never_goes_on_from_other_weights(tiny, tmp_path):
    folder = save_pretrained("vit", tmp_path / "vit")
    model = {**SMALL, "backbone": {"pretrained": str(folder)}}
    answers = iter([False] * 3 + [True])
    config = tiny.run("teacher", tmp_path / "run", model=model, **PIXELS)
    with pytest.raises(WorkInterrupted):
        train_run(config, should_stop=lambda: next(answers))
    shutil.move(folder, tmp_path / "moved")
    with pytest.raises(SpecError, match="there is no folder"):
        train_run(config, resume=True)
    moved = {**model, "backbone": {"pretrained": str(tmp_path / "moved")}}
    save_pretrained("vit", folder, image_mean=[0.5, 0.5, 0.5])  # the same weights, made for other pixels
    with pytest.raises(CheckpointError, match="other pretrained weights"):
        train_run(config, resume=True)
    train_run(tiny.run("teacher", tmp_path / "run", model=moved, **PIXELS), resume=True)
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "moved")
    assert load_run(tmp_path / "run").facts.pretrained == read_facts(tmp_path / "run").pretrained


def test_a_pretrained_folder_is_relative_to_the_run_file_and_in_a_run_folder_to_that(tiny, tmp_path):
    save_pretrained("vit", tmp_path / "vit")
    described = tiny.describe("teacher", tmp_path / "run", model={**SMALL, "backbone": {"pretrained": "vit"}}, **PIXELS)
    train_run(resolve_run(described, base=tmp_path, where="test"))
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["model"]["backbone"]["pretrained"] == "../vit"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "`pixel_mean` is"),
        ({**PIXELS, "image_size": 12}, "images of 12 pixels"),
    ],
)
def test_a_run_that_does_not_fit_its_backbone_writes_nothing(tiny, backbones, tmp_path, fields, told):
    model = {**SMALL, "backbone": {"pretrained": str(backbones["vit"])}}
    with pytest.raises(SpecError, match=told):
        train_run(tiny.run("teacher", tmp_path / "run", model=model, **fields))
    assert not (tmp_path / "run").exists()
