"""Whole runs on a cache of 24 images: every kind trains, is kept, is loaded again, and refuses what does not fit."""

import json
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from dla_cache.errors import (
    CheckpointError,
    RecipeMismatchError,
    SpecError,
    StoreError,
    WorkInterrupted,
)
from dla_cache.manifest import write_manifest
from dla_cache.spec import Modality, load_yaml
from dla_cache.store import create_store, open_store
from dla_cache.store.rows import RowTable
from trainer.checkpoint import load_checkpoint
from trainer.config import RunConfig, resolve_run
from trainer.data import PairSource, PixelScale, Role
from trainer.reference import FrozenClassifier
from trainer.run import load_run, train_run
from trainer.run_folder import read_result
from trainer.tasks import StudentTask
from trainer.upbringing import Upbringing, data_facts
from trainer.views import ViewConfig

WHOLE = ViewConfig()
SCALE = PixelScale((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TRANSFER = {"roles": {"transfer": ["transfer"]}, "transfer_per_batch": 4, "self_training": {"confidence": 0.34}}


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Finished runs of a probe and a teacher, with self-training, and of a student of each sort."""
    folder = tmp_path_factory.mktemp("runs")
    train_run(tiny.run("probe", folder / "probe", **TRANSFER))
    train_run(tiny.run("teacher", folder / "teacher", **TRANSFER))
    train_run(tiny.run("student", folder / "image-only"))
    train_run(tiny.run("student", folder / "kd-probe", teacher=folder / "probe", objective=tiny.objectives["kd"]))
    train_run(tiny.run("student", folder / "kd-teacher", teacher=folder / "teacher", objective=tiny.objectives["kd"]))
    train_run(tiny.run("student", folder / "messy", teacher=folder / "teacher", objective=tiny.objectives["messy"]))
    return folder


def pair_source(tiny, modalities=("depth",), store=None, view=WHOLE):
    return PairSource(
        open_store(store or tiny.store),
        tiny.images,
        image_size=8,
        pixel_scale=SCALE,
        modalities=modalities,
        view=view,
        seed=0,
        device="cpu",
    )


def validation_batch(tiny, modalities=("depth",)):
    return next(pair_source(tiny, modalities).evaluation(Role(("validation",), 99), modalities)())


STUDENTS = {
    "image-only": {"ce"},
    "kd-probe": {"ce", "kd"},
    "kd-teacher": {"ce", "kd"},
    "messy": {"ce", "kd", "messy"},
}


@pytest.mark.parametrize("name", ["probe", "teacher", *STUDENTS])
def test_every_kind_of_run_leaves_its_config_metrics_weights_and_result(trained, name):
    result = read_result(trained / name)
    assert result.test_images == 4
    assert result.test_low <= result.test_score <= result.test_high
    assert result.best_step in (2, 4, 6)
    metrics = [json.loads(line) for line in (trained / name / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics] == [2, 4, 6]
    best = next(record for record in metrics if record["step"] == result.best_step)
    assert best["metrics"]["selection"] == result.validation_score == max(m["metrics"]["selection"] for m in metrics)
    assert RunConfig.model_validate(yaml.safe_load((trained / name / "config.yaml").read_text()))
    assert load_run(trained / name).facts.class_names == ("red", "green", "blue")


@pytest.mark.parametrize(("name", "terms"), STUDENTS.items())
def test_a_student_is_trained_on_the_terms_of_its_objective(trained, name, terms):
    for line in (trained / name / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert set(record["losses"]) == terms | {"total"}
        assert all(share > 0 for share in record["gradient_shares"].values())


@pytest.mark.parametrize(
    ("name", "branches"),
    [("probe", ["probe"]), ("teacher", ["teacher", "fused", "late", "image alone"]), ("messy", ["student"])],
)
def test_a_result_tells_every_branch_and_the_first_is_the_answer(trained, name, branches):
    result = read_result(trained / name)
    assert list(result.branches) == branches
    assert result.branches[branches[0]] == result.test_score


def test_enough_steps_learn_the_classes(tiny, tmp_path):
    loop = {"steps": 60, "evaluate_steps": 60, "learning_rate": 0.02}
    result = train_run(tiny.run("probe", tmp_path / "probe", loop=loop))
    assert result.validation_score == result.test_score == 1


@pytest.mark.parametrize("name", STUDENTS)
def test_stock_transformers_loads_the_student_that_validation_chose_with_equal_logits(tiny, trained, name):
    batch = validation_batch(tiny, ())
    student = AutoModelForImageClassification.from_pretrained(trained / name / "student")
    with torch.no_grad():
        stock = student(pixel_values=batch.pixels).logits
        ours = load_run(trained / name).task.branch_logits(batch)["student"]
    assert torch.equal(stock, ours)
    assert float(stock.std()) > 0
    assert student.config.id2label == {0: "red", 1: "green", 2: "blue"}
    assert student.config.label2id == {"red": 0, "green": 1, "blue": 2}


def test_the_stock_image_processor_scales_pixels_as_the_student_was_trained(tiny, trained):
    batch = validation_batch(tiny, ())
    processor = AutoImageProcessor.from_pretrained(trained / "messy" / "student")
    images = [Image.open(tiny.images / "images" / f"{image_id}.png") for image_id in batch.image_ids]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, batch.pixels, rtol=0, atol=1e-5)  # float32 in another order


def test_the_student_folder_holds_no_head_that_is_thrown_away(trained):
    whole = load_checkpoint(trained / "messy" / "best.safetensors")[0]
    student = AutoModelForImageClassification.from_pretrained(trained / "messy" / "student")
    assert {name for name in whole if name.startswith("objectives.terms.messy.heads.")}
    assert {f"student.{name}" for name in student.state_dict()} == {n for n in whole if not n.startswith("objectives.")}


def test_on_unlabelled_images_a_student_distils_and_has_no_cross_entropy(tiny, trained):
    student, target = load_run(trained / "image-only").task.student, load_run(trained / "teacher").task
    objective = load_run(trained / "kd-teacher").config.objective
    task = StudentTask(student.requires_grad_(True), objective, FrozenClassifier(target))
    transfer = next(pair_source(tiny).evaluation(Role(("transfer",), 4), ("depth",))())
    assert set(transfer.labels.tolist()) == {-1}
    assert set(task.losses(transfer).terms) == {"kd"}
    assert set(task.losses(validation_batch(tiny)).terms) == {"ce", "kd"}


@pytest.mark.parametrize("kind", ["probe", "teacher", "messy"])
def test_two_runs_of_one_config_are_bitwise_equal(tiny, trained, tmp_path, kind):
    fields = TRANSFER
    if kind == "messy":
        fields = {"teacher": trained / "teacher", "objective": tiny.objectives["messy"]}
    again = train_run(tiny.run("student" if kind == "messy" else kind, tmp_path / "run", **fields))
    times = {"train_seconds", "images_per_s"}
    assert again.model_dump(exclude=times) == read_result(trained / kind).model_dump(exclude=times)
    kept, expected = (load_checkpoint(folder / "best.safetensors")[0] for folder in (tmp_path / "run", trained / kind))
    assert [name for name in expected if not torch.equal(kept[name], expected[name])] == []


def test_another_seed_is_another_run(tiny, trained, tmp_path):
    train_run(tiny.run("probe", tmp_path / "run", seed=1, **TRANSFER))
    kept, other = (load_checkpoint(folder / "best.safetensors")[0] for folder in (tmp_path / "run", trained / "probe"))
    assert not torch.equal(kept["classifier.classifier.1.weight"], other["classifier.classifier.1.weight"])


@pytest.mark.parametrize("polls", [0, 1, 3, 5])
def test_a_stopped_run_resumes_to_the_unbroken_one(tiny, trained, tmp_path, polls):
    config = tiny.run("student", tmp_path / "run", teacher=trained / "teacher", objective=tiny.objectives["messy"])
    answers = iter([False] * polls + [True])
    with pytest.raises(WorkInterrupted, match=f"step {polls} of 6"):
        train_run(config, should_stop=lambda: next(answers))
    with pytest.raises(CheckpointError, match="is not finished"):
        read_result(tmp_path / "run")
    train_run(config, resume=True)
    kept, expected = (load_checkpoint(f / "best.safetensors")[0] for f in (tmp_path / "run", trained / "messy"))
    assert [name for name in expected if not torch.equal(kept[name], expected[name])] == []


def test_a_finished_run_is_returned_as_it_stands(tiny, trained):
    before = {path: path.stat().st_mtime_ns for path in (trained / "probe").rglob("*")}
    result = train_run(tiny.run("probe", trained / "probe", **TRANSFER), resume=True)
    assert result == read_result(trained / "probe")
    assert {path: path.stat().st_mtime_ns for path in (trained / "probe").rglob("*")} == before


def test_a_folder_that_holds_a_run_is_not_overwritten(tiny, trained):
    with pytest.raises(CheckpointError, match="already holds a run") as refused:
        train_run(tiny.run("probe", trained / "probe", **TRANSFER))
    assert "--resume" in refused.value.hint


def test_a_run_resumes_with_its_own_settings_only(tiny, trained):
    with pytest.raises(CheckpointError, match="another `labelled_per_batch`, `seed`"):
        train_run(tiny.run("probe", trained / "probe", seed=1, **{**TRANSFER, "labelled_per_batch": 2}), resume=True)


def test_a_run_may_have_been_moved(tiny, trained, tmp_path):
    shutil.copytree(trained / "probe", tmp_path / "moved")
    result = train_run(tiny.run("probe", tmp_path / "moved", **TRANSFER), resume=True)
    assert result == read_result(trained / "probe")


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_does_not_resume_on_latents_of_another_recipe(tiny, tmp_path, finished):
    answers = iter([finished] * 9)
    config = tiny.run("probe", tmp_path / "run")
    if finished:
        train_run(config)
    else:
        with pytest.raises(WorkInterrupted):
            train_run(config, should_stop=lambda: not next(answers))
    other = tiny.build(tiny.manifest, tmp_path / "other.zarr", seed=1)
    with pytest.raises(RecipeMismatchError, match="was begun on other latents of `depth` than"):
        train_run(config.model_copy(update={"store": str(other)}), resume=True)


def copy_store(tiny, path, *, change=lambda row: row, class_names=None, offset=0.0, modalities=("depth",)):
    """The tiny store written anew, in shards of another size; with other rows or latents, or more modalities."""
    old = open_store(tiny.store)
    recipes = {name: old.recipe("depth").model_copy(update={"modality": Modality(name)}) for name in modalities}
    rows = RowTable([change(row) for row in old.rows])
    store = create_store(path, rows, class_names or old.class_names, 7, recipes)
    for name in modalities:
        for shard in store.shards:
            latents = old.read("depth", np.arange(shard.start, shard.stop)) + np.float16(offset)
            store.write_shard(name, shard, latents, seconds=0.1, device="cpu")
    return path


def stop_after(config, n_steps):
    answers = iter([False] * n_steps + [True])
    with pytest.raises(WorkInterrupted):
        train_run(config, should_stop=lambda: next(answers))
    return config


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"offset": 0.5}, "latents of `depth`"),
        ({"change": lambda row: replace(row, label=0) if row.label == 1 else row}, "images, splits or labels"),
        ({"change": lambda row: replace(row, split="test") if row.row == 3 else row}, "images, splits or labels"),
        ({"change": lambda row: replace(row, sha256="0" * 64) if row.row == 3 else row}, "images, splits or labels"),
        ({"class_names": ("red", "blue", "green")}, "classes"),
    ],
    ids=["latents", "labels", "splits", "files", "classes"],
)
def test_a_run_does_not_resume_on_other_data_of_the_same_recipe(tiny, tmp_path, changes, what):
    config = stop_after(tiny.run("probe", tmp_path / "run"), 1)
    other = copy_store(tiny, tmp_path / "other.zarr", **changes)
    with pytest.raises(RecipeMismatchError, match=f"was begun on other .*{what}") as refused:
        train_run(config.model_copy(update={"store": str(other)}), resume=True)
    assert str(other) in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize("modalities", [("depth",), ("depth", "audio")], ids=["a copy", "a modality more"])
def test_a_run_resumes_on_a_copy_of_its_store_that_may_have_gained_a_modality(tiny, trained, tmp_path, modalities):
    config = stop_after(tiny.run("probe", tmp_path / "run", **TRANSFER), 1)
    other = copy_store(tiny, tmp_path / "other.zarr", modalities=modalities)
    train_run(config.model_copy(update={"store": str(other)}), resume=True)
    kept, expected = (load_checkpoint(f / "best.safetensors")[0] for f in (tmp_path / "run", trained / "probe"))
    assert [name for name in expected if not torch.equal(kept[name], expected[name])] == []


def test_latents_that_a_run_never_sees_may_change(tiny, tmp_path):
    config = stop_after(tiny.run("student", tmp_path / "run"), 1)
    other = copy_store(tiny, tmp_path / "other.zarr", offset=0.5)
    assert train_run(config.model_copy(update={"store": str(other)}), resume=True).test_images == 4


@pytest.mark.parametrize("finished", [True, False])
def test_a_student_does_not_resume_with_a_teacher_that_was_trained_anew(tiny, trained, tmp_path, finished):
    shutil.copytree(trained / "probe", tmp_path / "teacher")
    config = tiny.run("student", tmp_path / "run", teacher=tmp_path / "teacher", objective=tiny.objectives["kd"])
    if finished:
        train_run(config)
    else:
        stop_after(config, 1)
    shutil.rmtree(tmp_path / "teacher")
    train_run(tiny.run("probe", tmp_path / "teacher", seed=1, **TRANSFER))
    with pytest.raises(CheckpointError, match=r"was begun with another teacher than `.*teacher` holds now"):
        train_run(config, resume=True)
    moved = config.model_copy(update={"teacher": str(trained / "probe")})
    assert train_run(moved, resume=True).test_images == 4


def test_only_one_process_at_a_time_trains_in_a_folder(tiny, tmp_path):
    config = tiny.run("probe", tmp_path / "run")
    refused = []

    def train_beside(at):
        for resume in (True, False):
            with pytest.raises(CheckpointError, match=f"another process trains in `{tmp_path / 'run'}`") as error:
                train_run(config, resume=resume)
            refused.append(error.value.hint)

    train_run(config, on_progress=train_beside)
    assert len(refused) == 12
    assert all(refused)
    assert train_run(config, resume=True) == read_result(tmp_path / "run")


def test_messy_on_a_probe_is_refused_and_leaves_no_folder(tiny, trained, tmp_path):
    config = tiny.run("student", tmp_path / "run", teacher=trained / "probe", objective=tiny.objectives["messy"])
    with pytest.raises(SpecError, match="`messy`") as refused:
        train_run(config)
    assert "kind: teacher" in refused.value.hint
    assert not (tmp_path / "run").exists()


def test_messy_on_a_block_that_is_not_there_is_refused(tiny, trained, tmp_path):
    objective = {"ce": {}, "messy": {"layers": [[0, 2]]}}
    with pytest.raises(SpecError, match=r"the teacher has no block `2`, it has 2: `blocks.0`, `blocks.1`"):
        train_run(tiny.run("student", tmp_path / "run", teacher=trained / "teacher", objective=objective))


def test_a_teacher_of_another_recipe_is_refused(tiny, trained, tmp_path):
    other = tiny.build(tiny.manifest, tmp_path / "other.zarr", seed=1)
    config = tiny.run("student", tmp_path / "run", teacher=trained / "teacher", objective=tiny.objectives["kd"])
    with pytest.raises(RecipeMismatchError, match="another recipe of `depth`"):
        train_run(config.model_copy(update={"store": str(other)}))


def test_a_teacher_of_other_classes_is_refused(tiny, trained, tmp_path):
    manifest = tiny.make_manifest(tmp_path / "data", ("red", "blue", "green"))
    other = tiny.build(manifest, tmp_path / "other.zarr")
    config = tiny.run("student", tmp_path / "run", teacher=trained / "teacher", objective=tiny.objectives["kd"])
    with pytest.raises(RecipeMismatchError, match="different class maps"):
        train_run(config.model_copy(update={"store": str(other)}))


def test_a_teacher_that_is_not_finished_is_refused(tiny, tmp_path):
    with pytest.raises(WorkInterrupted):
        train_run(tiny.run("teacher", tmp_path / "teacher"), should_stop=lambda: True)
    student = tiny.run("student", tmp_path / "run", teacher=tmp_path / "teacher", objective=tiny.objectives["kd"])
    with pytest.raises(CheckpointError, match="is not finished"):
        train_run(student)
    with pytest.raises(CheckpointError, match="is no run folder"):
        train_run(student.model_copy(update={"teacher": str(tmp_path / "nothing")}))


@pytest.mark.parametrize("name", ["config.yaml", "data.json", "result.json", "best.safetensors"])
def test_a_damaged_teacher_folder_is_refused_by_the_name_of_the_file(tiny, trained, tmp_path, name):
    shutil.copytree(trained / "probe", tmp_path / "probe")
    (tmp_path / "probe" / name).write_text('{"half":')
    with pytest.raises(CheckpointError, match=name) as refused:
        train_run(tiny.run("student", tmp_path / "run", teacher=tmp_path / "probe", objective=tiny.objectives["kd"]))
    assert f"remove `{tmp_path / 'probe'}` and train the run again" in refused.value.hint


def test_weights_of_another_model_are_refused(tiny, trained, tmp_path):
    shutil.copytree(trained / "probe", tmp_path / "probe")
    shutil.copy(trained / "teacher" / "best.safetensors", tmp_path / "probe" / "best.safetensors")
    with pytest.raises(CheckpointError, match=r"best\.safetensors` is of another model"):
        load_run(tmp_path / "probe")


def test_a_modality_that_the_store_has_not_is_refused(tiny, tmp_path):
    with pytest.raises(SpecError, match="no modality `audio`") as refused:
        train_run(tiny.run("probe", tmp_path / "run", modalities=["audio"]))
    assert "depth" in refused.value.hint


@pytest.mark.parametrize("role", ["labelled", "transfer", "validation", "test"])
def test_a_split_without_an_image_is_named_before_the_first_step(tiny, trained, tmp_path, role):
    steps = []
    roles = {"transfer": ["transfer"], role: ["nothing"]}
    config = tiny.run(
        "student", tmp_path / "run", teacher=trained / "probe", objective=tiny.objectives["kd"], roles=roles
    )
    with pytest.raises(SpecError, match="no image of split `nothing`") as refused:
        train_run(config, on_progress=steps.append)
    assert "`labelled`, `test`, `transfer`, `validation`" in refused.value.hint
    assert steps == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("role", ["labelled", "validation", "test"])
def test_a_role_that_needs_labels_refuses_images_without(tiny, tmp_path, role):
    with pytest.raises(SpecError, match=rf"8 images of `roles\.{role}` have no label: `transfer-0`"):
        train_run(tiny.run("probe", tmp_path / "run", roles={role: ["transfer"]}))


def test_a_split_smaller_than_its_part_of_a_batch_is_refused(tiny, tmp_path):
    with pytest.raises(SpecError, match=r"`roles.labelled` has 6 images, and `labelled_per_batch` is 7"):
        train_run(tiny.run("probe", tmp_path / "run", labelled_per_batch=7))
    train_run(tiny.run("probe", tmp_path / "run", labelled_per_batch=6))  # the folder is still free


def test_a_store_that_is_not_whole_is_refused(tiny, tmp_path):
    shutil.copytree(tiny.store, tmp_path / "cut.zarr")
    for record in (tmp_path / "cut.zarr" / "commits" / "depth").iterdir():
        record.unlink()
    config = tiny.run("teacher", tmp_path / "run").model_copy(update={"store": str(tmp_path / "cut.zarr")})
    with pytest.raises(StoreError) as refused:
        train_run(config)
    assert "dla cache build" in refused.value.hint


def test_an_image_only_student_needs_no_latents(tiny, tmp_path):
    shutil.copytree(tiny.store, tmp_path / "bare.zarr")
    for shard in range(5):
        open_store(tmp_path / "bare.zarr").shard_path("depth", shard).unlink()
    config = tiny.run("student", tmp_path / "run").model_copy(update={"store": str(tmp_path / "bare.zarr")})
    assert train_run(config).test_images == 4


def test_the_test_split_is_read_once_and_only_after_the_last_step(tiny, tmp_path):
    """Its images and the shard of its latents are not even there while the run trains."""
    shutil.copytree(tiny.images, tmp_path / "data")
    shutil.copytree(tiny.store, tmp_path / "cache.zarr")
    shard = open_store(tmp_path / "cache.zarr").shard_path("depth", 4)
    hidden = [shard, *(tmp_path / "data" / "images").glob("test-*.png")]
    assert len(hidden) == 5

    def hide():
        for path in hidden:
            path.rename(path.with_suffix(".hidden"))

    def show(at):
        if at.step == at.steps:
            for path in hidden:
                path.with_suffix(".hidden").rename(path)

    places = {"store": str(tmp_path / "cache.zarr"), "images": str(tmp_path / "data")}
    config = tiny.run("teacher", tmp_path / "run").model_copy(update=places)
    hide()
    assert train_run(config, on_progress=show).test_images == 4
    hide()
    assert train_run(config, resume=True).test_images == 4


def test_latents_reach_a_run_by_image_id_whatever_the_row_order(tiny, tmp_path):
    reordered = tiny.build(tiny.reverse(tiny.manifest), tmp_path / "reordered.zarr")
    assert open_store(reordered).rows.image_ids == open_store(tiny.store).rows.image_ids[::-1]

    def pairs_of(store):
        pairs = {}
        for batch in pair_source(tiny, store=store).evaluation(Role(("labelled", "transfer"), 5), ("depth",))():
            for image_id, *pair in zip(
                batch.image_ids, batch.pixels, batch.latents["depth"], batch.labels, strict=True
            ):
                pairs[image_id] = [value.numpy() for value in pair]
        return pairs

    pairs = pairs_of(tiny.store)
    assert len(pairs) == 14
    for image_id, (pixels, latent, label) in pairs_of(reordered).items():
        assert np.array_equal(pixels, pairs[image_id][0])
        assert np.array_equal(latent, pairs[image_id][1])
        assert label == pairs[image_id][2]

    batch = next(pair_source(tiny, store=reordered).training([Role(("labelled",), 3), Role(("transfer",), 4)])(5))
    assert [image_id.split("-")[0] for image_id in batch.image_ids] == ["labelled"] * 3 + ["transfer"] * 4
    for image_id, pixels, latent in zip(batch.image_ids, batch.pixels, batch.latents["depth"], strict=True):
        assert np.array_equal(pixels.numpy(), pairs[image_id][0])
        assert np.array_equal(latent.numpy(), pairs[image_id][1])


def test_a_batch_depends_on_its_step_only(tiny):
    view = ViewConfig(scale_min=0.3, horizontal_flip=True)
    roles = [Role(("labelled",), 3), Role(("transfer",), 4)]
    stream = pair_source(tiny, view=view).training(roles)(0)
    in_turn = [next(stream) for _ in range(8)]
    for step in (7, 2):
        jumped = next(pair_source(tiny, view=view).training(roles)(step))
        assert jumped.image_ids == in_turn[step].image_ids
        assert torch.equal(jumped.pixels, in_turn[step].pixels)
    assert not torch.equal(in_turn[0].pixels, next(pair_source(tiny).training(roles)(0)).pixels)


def test_epochs_are_turned_into_steps_of_the_largest_role(tiny, tmp_path):
    steps = []
    loop = {"evaluate_steps": 2}
    config = tiny.run("probe", tmp_path / "run", epochs=2, loop=loop, **{**TRANSFER, "transfer_per_batch": 2})
    train_run(config, on_progress=steps.append)
    # 8 transfer images by 2 are 4 steps an epoch, 6 labelled images by 3 only 2.
    assert [at.step for at in steps] == [*range(1, 9)]


def test_the_facts_of_a_student_name_no_modality_of_its_own(tiny, tmp_path):
    config = tiny.run("student", tmp_path / "run")
    facts = data_facts(config, open_store(tiny.store), Upbringing(config))
    assert facts.modalities == ()
    assert list(facts.recipes) == ["depth"]


def test_a_role_of_batches_closes_with_its_stream(tiny):
    before = threading.active_count()
    stream = pair_source(tiny).training([Role(("labelled",), 3), Role(("transfer",), 4)])(0)
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_the_config_in_a_run_folder_is_a_run_file_that_can_be_moved_with_its_data(tiny, tmp_path):
    home = tmp_path / "here"
    shutil.copytree(tiny.images, home / "data")
    shutil.copytree(tiny.store, home / "cache.zarr")
    places = {"store": str(home / "cache.zarr"), "images": str(home / "data")}
    first = train_run(tiny.run("probe", home / "run", **places))
    home.rename(tmp_path / "there")
    moved = tmp_path / "there" / "run"
    config = resolve_run(load_yaml(moved / "config.yaml"), base=moved, where="test")
    assert train_run(config, resume=True) == first
    again = train_run(config.model_copy(update={"output": str(tmp_path / "again")}))
    assert again.test_score == first.test_score


def test_labels_of_transfer_images_are_never_seen(tiny, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(tiny.images, folder)
    rows = [replace(row, label=0) if row.split == "transfer" else row for row in tiny.manifest.rows()]
    labelled = tiny.build(write_manifest(folder / "labelled.parquet", rows, ["red", "green", "blue"]), tmp_path / "z")
    train_run(tiny.run("probe", tmp_path / "probe"))
    fields = {"teacher": tmp_path / "probe", "objective": tiny.objectives["kd"]}
    train_run(tiny.run("student", tmp_path / "blind", **fields))
    train_run(tiny.run("student", tmp_path / "told", **fields, store=str(labelled)))
    assert load_weights(tmp_path / "blind").keys() == load_weights(tmp_path / "told").keys()
    for name, value in load_weights(tmp_path / "blind").items():
        assert torch.equal(value, load_weights(tmp_path / "told")[name]), name


def load_weights(folder):
    return load_checkpoint(folder / "best.safetensors")[0]


def test_a_student_that_sees_other_pixels_than_its_teacher_is_refused(tiny, trained, tmp_path):
    fields = {"teacher": trained / "teacher", "objective": tiny.objectives["kd"]}
    with pytest.raises(SpecError, match="pixel_mean"):
        train_run(tiny.run("student", tmp_path / "student", **fields, pixel_mean=[0.4, 0.4, 0.4]))
    assert not (tmp_path / "student").exists()


def test_a_student_is_measured_without_latents(tiny, trained, tmp_path):
    folder = tmp_path / "cache.zarr"
    shutil.copytree(tiny.store, folder)
    # Test images fill the last shard and no other.
    last = max((folder / "latents" / "depth").glob("c.*"), key=lambda path: int(path.name.split(".")[1]))
    last.write_bytes(b"\0" * last.stat().st_size)
    fields = {"store": str(folder), "teacher": trained / "probe", "objective": tiny.objectives["kd"]}
    assert train_run(tiny.run("student", tmp_path / "student", **fields)).test_images == 4
    with pytest.raises(StoreError):
        train_run(tiny.run("probe", tmp_path / "probe", store=str(folder)))


def test_a_result_names_the_share_of_each_term_and_those_that_do_nearly_nothing(tiny, trained, tmp_path):
    objective = {"ce": {}, "kd": {"weight": 1e-9}}
    result = train_run(tiny.run("student", tmp_path / "run", teacher=trained / "probe", objective=objective))
    assert result.inert == ("kd",)
    assert 0 < result.gradient_shares["kd"] < 1e-6
    assert sum(result.gradient_shares.values()) == pytest.approx(1)
    assert read_result(trained / "kd-teacher").inert == ()
