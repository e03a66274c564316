"""Whole runs on control stores, and the controls of a teacher that need no store: everything downstream works."""

import json
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
import torch
from typer.testing import CliRunner

from cli.main import app
from dla_cache.control_recipe import Kind
from dla_cache.controls import control_store
from dla_cache.errors import MissingLatentError, RecipeMismatchError
from dla_cache.parquet import to_parquet
from dla_cache.store import open_store
from tests.conftest import MODEL
from trainer.checkpoint import load_checkpoint
from trainer.run import initial_task, load_run, open_upbringing, train_run
from trainer.run_folder import read_facts, read_result
from trainer.target_store import make_targets
from trainer.targets import TargetsConfig

SHORT = {"steps": 2, "evaluate_steps": 2, "learning_rate": 0.01}
OF_CLASSES = ("shuffled-within-class", "shuffled-across-classes", "label-embedding")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A control store of each kind, and `labels.parquet` with the labels that the store of the images hides."""
    path = tmp_path_factory.mktemp("controls")
    image_ids = [row.image_id for row in tiny.manifest.rows()]
    labels = [int(image_id.rpartition("-")[2]) % 3 for image_id in image_ids]
    (path / "labels.parquet").write_bytes(to_parquet(pa.table({"image_id": image_ids, "label": labels})))
    model = {**MODEL, "tokens_per_modality": 4, "resampler_heads": 2}
    train_run(tiny.run("teacher", path / "image-only", modalities=[], model=model, loop=SHORT))
    for splits, name in ((None, "some.zarr"), (("labelled", "transfer", "validation", "test"), "features.zarr")):
        make_targets(
            TargetsConfig(
                store=str(tiny.store),
                images=str(tiny.images),
                output=str(path / name),
                teacher=str(path / "image-only"),
                splits=splits,
                also=("pooled/image/1",),
                view={"count": 1},
            )
        )
    store, features = open_store(tiny.store), open_store(path / "features.zarr")
    for kind in get_args(Kind):
        options = {"labels": path / "labels.parquet"} if kind in OF_CLASSES else {}
        options |= {"features": features} if kind == "fabricated" else {}
        control_store(store, path / f"{kind}.zarr", kind=kind, **options)
    return path


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_probe_a_teacher_and_a_messy_student_train_on_every_control(tiny, folder, tmp_path, kind):
    on_control = {"store": str(folder / f"{kind}.zarr"), "loop": SHORT}
    train_run(tiny.run("probe", tmp_path / "probe", **on_control))
    train_run(tiny.run("teacher", tmp_path / "teacher", **on_control))
    messy = tiny.objectives["messy"]
    student = tiny.run("student", tmp_path / "student", teacher=tmp_path / "teacher", objective=messy, **on_control)
    assert train_run(student).test_images == 4
    on_real = {"teacher": tmp_path / "teacher", "objective": messy, "loop": SHORT}
    with pytest.raises(RecipeMismatchError, match="another recipe of `depth` than") as refused:
        train_run(tiny.run("student", tmp_path / "on-real", **on_real))
    assert f"`{tiny.store}` holds\n" in str(refused.value)


def test_a_student_of_a_teacher_of_real_latents_refuses_a_control_by_its_name(tiny, folder, tmp_path):
    train_run(tiny.run("teacher", tmp_path / "teacher", loop=SHORT))
    places = {"store": str(folder / "gaussian.zarr"), "teacher": tmp_path / "teacher"}
    with pytest.raises(RecipeMismatchError, match="holds, a control `gaussian` of `corners`, seed 0: noise"):
        train_run(tiny.run("student", tmp_path / "student", objective=tiny.objectives["kd"], loop=SHORT, **places))


def test_an_exported_student_names_the_control_that_it_was_made_of(tiny, folder, tmp_path):
    on_control = {"store": str(folder / "shuffled.zarr"), "loop": SHORT}
    train_run(tiny.run("probe", tmp_path / "probe", **on_control))
    kd = {"teacher": tmp_path / "probe", "objective": tiny.objectives["kd"]}
    train_run(tiny.run("student", tmp_path / "student", **kd, **on_control))
    ended = CliRunner().invoke(app, ["export", str(tmp_path / "student"), "--out", str(tmp_path / "export")])
    assert ended.exit_code == 0, ended.output
    assert "`control`, control `shuffled` of `corners`, seed 0" in (tmp_path / "export" / "README.md").read_text()
    page = CliRunner().invoke(app, ["report", str(tmp_path / "student"), "--out", str(tmp_path / "r.html")])
    assert page.exit_code == 0, page.output
    assert "Control `shuffled` of `corners`, seed 0" in (tmp_path / "r.html").read_text()


def test_features_that_cover_the_training_splits_alone_are_refused(tiny, folder, tmp_path):
    with pytest.raises(MissingLatentError, match=r"no features of \d+ images, in split `.*test`") as refused:
        control_store(
            open_store(tiny.store), tmp_path / "c", kind="fabricated", features=open_store(folder / "some.zarr")
        )
    assert "dla train targets" in refused.value.hint


def test_a_random_teacher_keeps_the_weights_it_began_with_and_teaches(tiny, tmp_path):
    config = tiny.run("teacher", tmp_path / "random", loop={**SHORT, "steps": 0, "warmup_steps": 1, "ema_decay": 0.5})
    result = train_run(config)
    assert (result.best_step, result.train_seconds, result.images_per_s) == (0, 0, 0)
    assert train_run(config, resume=True) == read_result(tmp_path / "random")
    store = open_store(tiny.store)
    begun = initial_task(config, read_facts(tmp_path / "random"), open_upbringing(config, store), store)
    kept = load_run(tmp_path / "random").task.module.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in begun.module.state_dict().items())
    (record,) = [json.loads(line) for line in (tmp_path / "random" / "metrics.jsonl").read_text().splitlines()]
    assert (record["step"], record["gradient_shares"], record["steps_per_s"]) == (0, {}, 0)
    messy = {"teacher": tmp_path / "random", "objective": tiny.objectives["messy"], "loop": SHORT}
    assert train_run(tiny.run("student", tmp_path / "student", **messy)).test_images == 4


def test_the_command_says_of_a_run_of_no_steps_that_nothing_was_trained(tiny, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tiny.describe("probe", str(tmp_path / "probe"))))
    ended = CliRunner().invoke(app, ["train", str(path), "--set", "loop.steps=0"])
    assert ended.exit_code == 0, ended.output
    assert "the weights are those it began with" in ended.output
    report = CliRunner().invoke(app, ["report", str(tmp_path / "probe"), "--out", str(tmp_path / "r.html")])
    assert report.exit_code == 0, report.output


def test_weights_of_no_steps_are_not_those_of_some(tiny, tmp_path):
    for steps in (0, 2):
        train_run(tiny.run("probe", tmp_path / str(steps), loop={**SHORT, "steps": steps}))
    none, some = (load_checkpoint(tmp_path / str(steps) / "best.safetensors")[0] for steps in (0, 2))
    assert any(not np.array_equal(none[name], some[name]) for name in none)
