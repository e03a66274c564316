"""Whole runs of students under objectives on features: online, from stored targets, killed, and without a teacher."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from dla_cache.errors import RecipeMismatchError, SpecError, WorkInterrupted
from dla_cache.store import open_store
from tests.trainer.toy import assert_same_run
from trainer.config import resolve_run
from trainer.data import PairSource
from trainer.export import export_run
from trainer.measure import measure_run
from trainer.mixing import refuse_mixing
from trainer.run import initial_task, load_run, open_upbringing, train_run
from trainer.run_folder import read_result
from trainer.target_store import make_targets
from trainer.targets import resolve_targets
from trainer.upbringing import data_facts

EVERYTHING = {
    "ce": {},
    "fitnets": {},
    "attention": {},
    "vid": {"what": "pooled", "pairs": [{"span": "depth"}]},
    "crd": {"negatives": 12},
    "fd_cmkd": {},
}
TERMS = [*list(EVERYTHING)[:-1], *(f"fd_cmkd.{part}" for part in ("low", "high", "shared", "own"))]
VIEW = {"scale_min": 0.5, "horizontal_flip": True, "count": 3, "seed": 7}
LATENTS = {"ce": {}, "latents": {"modalities": ["depth"], "hidden": 8}}
WITH_TRANSFER = {"roles": {"transfer": ["transfer"]}, "transfer_per_batch": 4}


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train_run(tiny.run("teacher", folder))
    return folder


@pytest.fixture(scope="module")
def online(tiny, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("online") / "run"
    train_run(of_everything(tiny, folder, teacher=teacher))
    return folder


@pytest.fixture(scope="module")
def of_latents(tiny, tmp_path_factory):
    """A student that no model has taught."""
    folder = tmp_path_factory.mktemp("latents") / "run"
    train_run(tiny.run("student", folder, objective=LATENTS, **WITH_TRANSFER))
    return folder


def of_everything(tiny, output, **fields):
    described = tiny.describe("student", output, objective=EVERYTHING, view=VIEW, **WITH_TRANSFER)
    return resolve_run(described | {name: str(value) for name, value in fields.items()}, base=Path(), where="test")


def records_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stop_after(config, n_steps):
    answers = iter([False] * n_steps + [True])
    with pytest.raises(WorkInterrupted):
        train_run(config, should_stop=lambda: next(answers))
    return config


def test_every_term_of_a_run_pulls_at_the_student(online):
    records = records_of(online)
    assert [list(one["gradient_shares"]) for one in records] == [TERMS] * len(records)
    assert all(share > 0 for one in records for share in one["gradient_shares"].values())


def test_stored_targets_give_the_losses_of_the_teacher_itself(tiny, teacher, online, tmp_path):
    config = {
        "kind": "targets",
        "splits": ["labelled", "transfer"],
        "view": VIEW,
        "objective": {name: fields for name, fields in EVERYTHING.items() if name != "ce"},
        "dtype": "float32",
        "store": str(tiny.store),
        "images": str(tiny.images),
        "teacher": str(teacher),
        "output": str(tmp_path / "targets"),
    }
    make_targets(resolve_targets(config, base=Path(), where="test"))
    train_run(of_everything(tiny, tmp_path / "cached", targets=tmp_path / "targets"))
    for one, other in zip(records_of(online), records_of(tmp_path / "cached"), strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-3)  # batches of another size round otherwise


def test_a_stopped_run_goes_on_to_the_bit_with_the_memory_of_crd(tiny, teacher, online, tmp_path):
    config = stop_after(of_everything(tiny, tmp_path / "run", teacher=teacher), 3)
    train_run(config, resume=True)
    assert_same_run(tmp_path / "run", online)


def first_weights(config):
    store = open_store(config.store)
    upbringing = open_upbringing(config, store)
    task = initial_task(config, data_facts(config, store, upbringing), upbringing, store)
    return task.student.state_dict()


def test_a_student_s_first_weights_do_not_depend_on_what_teaches_it(tiny, teacher, tmp_path):
    plain = first_weights(tiny.run("student", tmp_path / "run", objective={"ce": {}}))
    of_latents = first_weights(tiny.run("student", tmp_path / "run", objective=LATENTS, **WITH_TRANSFER))
    for other in (first_weights(of_everything(tiny, tmp_path / "run", teacher=teacher)), of_latents):
        assert [name for name in plain if not torch.equal(plain[name], other[name])] == []


def test_what_an_objective_trains_beside_the_student_is_not_in_its_files(online):
    student = AutoModelForImageClassification.from_pretrained(online / "student")
    kept = load_run(online).task.student.state_dict()
    assert student.state_dict().keys() == kept.keys()


def test_a_student_learns_latents_without_a_teacher_and_is_measured_and_exported_without_them(
    tiny, of_latents, tmp_path
):
    assert list(records_of(of_latents)[-1]["gradient_shares"]) == ["ce", "latents.depth"]
    bare = shutil.copytree(tiny.store, tmp_path / "bare.zarr")
    for numbers in (bare / "latents" / "depth").glob("c.*"):  # what describes them stays
        numbers.unlink()
    measured = measure_run(load_run(of_latents), open_store(bare), tiny.images, ["test"], where="bare")
    assert measured.predictions.score().value == read_result(of_latents).test_score
    export_run(of_latents, tmp_path / "export")
    student = AutoModelForImageClassification.from_pretrained(tmp_path / "export")
    pixels = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(student(pixels).logits, load_run(of_latents).task.student(pixels).logits)


def test_a_student_of_latents_goes_on_to_the_bit(tiny, of_latents, tmp_path):
    config = stop_after(tiny.run("student", tmp_path / "run", objective=LATENTS, **WITH_TRANSFER), 3)
    train_run(config, resume=True)
    assert_same_run(tmp_path / "run", of_latents)


def test_a_student_of_latents_goes_on_with_those_that_it_began_with_only(tiny, tmp_path):
    config = stop_after(tiny.run("student", tmp_path / "run", objective=LATENTS, **WITH_TRANSFER), 1)
    other = tiny.build(tiny.manifest, tmp_path / "other.zarr", seed=5)
    with pytest.raises(RecipeMismatchError, match="latents of `depth`"):
        train_run(config.model_copy(update={"store": str(other)}), resume=True)


@pytest.mark.parametrize("beside", ["alone", "of a probe"])
def test_latents_are_mirrored_with_the_view_that_predicts_them(tiny, tmp_path, monkeypatch, beside):
    fields = {"objective": LATENTS}
    if beside == "of a probe":  # which by itself is asked about latents that no view has mirrored
        train_run(tiny.run("probe", tmp_path / "probe"))
        fields = {"objective": {**LATENTS, "kd": {}}, "teacher": tmp_path / "probe"}
    opened = []

    class Recorded(PairSource):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            opened.append(self)

    monkeypatch.setattr("trainer.run.PairSource", Recorded)
    train_run(tiny.run("student", tmp_path / "run", **fields, **WITH_TRANSFER))
    (pairs,) = opened
    assert pairs.mirrors_latents
    assert pairs.modalities == ("depth",)


def test_images_that_crd_remembers_are_not_mixed(tiny, teacher, tmp_path):
    config = tiny.run("student", tmp_path / "run", teacher=teacher, objective={"crd": {}}, mixing={})
    with pytest.raises(SpecError, match="`crd` remembers what each image looks like"):
        refuse_mixing(config, reference_sees_latents=False, has_stored_targets=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": {"ce": {}, "latents": {"modalities": ["touch"]}}}, "no modality `touch`"),
        ({"objective": LATENTS, "mixing": {}, "labelled_per_batch": 4}, "`objective.latents` reads latents"),
    ],
)
def test_latents_that_cannot_be_predicted_are_refused_before_the_first_step(tiny, tmp_path, fields, message):
    with pytest.raises(SpecError, match=message) as refused:
        train_run(tiny.run("student", tmp_path / "run", **WITH_TRANSFER | fields))
    assert refused.value.hint
    assert not (tmp_path / "run").exists()
