"""Students of several teachers at hand: whole runs, what they remember, and what is refused."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from dla_cache.errors import CheckpointError, RecipeMismatchError, SpecError, WorkInterrupted
from dla_cache.manifest import write_manifest
from dla_cache.spec import load_yaml
from dla_cache.store import open_store
from tests.trainer.students import make_student, some_pixels
from tests.trainer.teachers import make_batch, make_teacher
from tests.trainer.toy import assert_same_run
from trainer.batch import Batch
from trainer.card import upbringing as told
from trainer.checkpoint import load_checkpoint
from trainer.config import RunConfig
from trainer.features import LOGITS
from trainer.probe import LatentProbe, ProbeConfig
from trainer.reference import FrozenClassifier, Teachers, mean_answer
from trainer.run import load_run, open_upbringing, train_run
from trainer.run_folder import read_config, read_facts
from trainer.tasks import ProbeTask, StudentTask, TeacherTask

KD = {"ce": {}, "kd": {}}
MST = {"ce": {}, "mst": {"stages": [0.34, 0.34]}}
"""Of six steps two in each stage."""
TRANSFER = {"roles": {"transfer": ["transfer"]}, "transfer_per_batch": 4}


@pytest.fixture(scope="module")
def school(tiny, tmp_path_factory):
    """Folders of a trained probe and a trained teacher."""
    folder = tmp_path_factory.mktemp("school")
    train_run(tiny.run("probe", folder / "probe"))
    train_run(tiny.run("teacher", folder / "teacher"))
    return folder


def student_of(tiny, school, output, objective, names=("probe", "teacher"), **fields):
    teachers = {f"the-{name}": str(school / name) for name in names}
    return tiny.run("student", output, teachers=teachers, objective=objective, **TRANSFER, **fields)


def batch_of(tiny, school):
    """Validation images with their latents, as a student's reference is asked about them."""
    store = open_store(tiny.store)
    rows = store.rows_of(["validation"])
    latents = {"depth": torch.from_numpy(store.read("depth", rows)).float()}
    pixels = torch.randn(len(rows), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch(tuple(map(str, rows)), pixels, latents, torch.full((len(rows),), -1))


def test_the_mean_of_logits_is_the_geometric_and_that_of_probabilities_the_arithmetic_mean_of_distributions():
    answers = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    p = answers.softmax(dim=-1)
    geometric = p.prod(dim=0) ** (1 / 3)
    torch.testing.assert_close(mean_answer(answers, "logits").softmax(-1), geometric / geometric.sum(-1, keepdim=True))
    torch.testing.assert_close(mean_answer(answers, "probabilities").softmax(-1), p.mean(dim=0))
    yes = mean_answer(answers, "probabilities", is_multi_label=True).sigmoid()
    torch.testing.assert_close(yes, answers.sigmoid().mean(dim=0))
    assert mean_answer(1e4 * answers, "probabilities").isfinite().all()


@pytest.mark.parametrize("how", ["logits", "probabilities"])
def test_a_student_of_several_teachers_hears_their_mean_answer(tiny, school, tmp_path, how):
    config = student_of(tiny, school, tmp_path / "run", KD, ensemble=how)
    upbringing = open_upbringing(config, open_store(config.store))
    batch = batch_of(tiny, school)
    each = torch.stack([load_run(school / n).task.features(batch).logits for n in ("probe", "teacher")])
    (found,) = upbringing.reference.targets(batch, [LOGITS]).values()
    torch.testing.assert_close(found, mean_answer(each, how).detach())
    assert not found.requires_grad


def test_a_student_is_distilled_from_several_teachers_and_remembers_them(tiny, school, tmp_path):
    train_run(student_of(tiny, school, tmp_path / "run", KD))
    run = load_run(tmp_path / "run")
    assert run.facts.teachers_sha256 == {f"the-{n}": load_run(school / n).weights_sha256 for n in ("probe", "teacher")}
    assert run.facts.teacher_kind == "probe and teacher"
    assert "a probe and teacher, which looks at latents of `depth`" in told(run)
    written = load_yaml(tmp_path / "run" / "config.yaml")["teachers"]
    assert not any(Path(place).is_absolute() for place in written.values())  # all may be moved together
    places = read_config(tmp_path / "run").teachers
    assert {name: Path(place).resolve() for name, place in places.items()} == {
        f"the-{n}": (school / n).resolve() for n in ("probe", "teacher")
    }


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("settings", [{}, {"routing": "random"}, {"mutual": True}], ids=["soft", "random", "mutual"])
def test_a_routed_student_trains_through_all_stages_and_goes_on_bitwise_wherever_it_was_stopped(
    tiny, school, tmp_path, settings
):
    objective = {"ce": {}, "mst": {**MST["mst"], **settings}}
    train_run(student_of(tiny, school, tmp_path / "unbroken", objective))
    told_shares = [record["gradient_shares"] for record in metrics_of(tmp_path / "unbroken")]
    assert all(set(shares) == {"ce", "mst"} and shares["mst"] > 0 for shares in told_shares)
    config = student_of(tiny, school, tmp_path / "broken", objective)
    for stop in (1, 3, 5):
        seen = []
        with pytest.raises(WorkInterrupted):
            train_run(
                config,
                resume=stop > 1,
                on_progress=lambda at, seen=seen: seen.append(at.step),
                should_stop=lambda seen=seen, stop=stop: bool(seen) and seen[-1] >= stop,
            )
    train_run(config, resume=True)
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")


def parts_at_each_evaluation(tiny, school, folder, settings):
    """What lies beside the student after steps 2, 4 and 6, the last of each stage."""
    found = []
    config = student_of(tiny, school, folder, {"ce": {}, "mst": {**MST["mst"], **settings}})
    for stop in (2, 4, None):
        seen = []
        with suppress(WorkInterrupted):
            train_run(
                config,
                resume=stop != 2,
                on_progress=lambda at, seen=seen: seen.append(at.step),
                should_stop=lambda seen=seen, stop=stop: bool(stop and seen and seen[-1] >= stop),
            )
        tensors, _ = load_checkpoint(folder / "last.safetensors")
        found.append({name.removeprefix("task/"): value for name, value in tensors.items() if name.startswith("task")})
    return found


def changed(before, after, what):
    return {name for name in before if what in name and not torch.equal(before[name], after[name])}


def test_masks_stand_still_once_students_are_routed_and_teachers_after_the_first_stage(tiny, school, tmp_path):
    first, second, third = parts_at_each_evaluation(tiny, school, tmp_path / "run", {"mutual": True})
    assert changed(first, second, ".masks.")
    assert not changed(second, third, ".masks.")
    assert not changed(first, second, ".gate.")
    assert changed(second, third, ".gate.")
    assert not changed(first, third, "teachers.")
    original, _ = load_checkpoint(school / "teacher" / "best.safetensors")
    learned = {name for name, value in original.items() if not torch.equal(value, first_of(first, name))}
    assert any("blocks.0" in name for name in learned)


def first_of(state, name):
    (value,) = [value for key, value in state.items() if key.endswith(f"teachers.the-teacher.{name}")]
    return value


def test_teachers_that_learn_with_the_student_leave_their_own_folders_as_they_are(tiny, school, tmp_path):
    before = (school / "teacher" / "best.safetensors").read_bytes()
    train_run(student_of(tiny, school, tmp_path / "run", {"mst": {**MST["mst"], "mutual": True}, "ce": {}}))
    assert (school / "teacher" / "best.safetensors").read_bytes() == before
    assert load_run(tmp_path / "run").task.teachers is None


def test_a_student_begins_with_the_same_weights_whatever_it_learns_from(tiny, school, tmp_path):
    states = []
    for name, objective in {"kd": KD, "mst": MST}.items():
        config = student_of(tiny, school, tmp_path / name, objective)
        with pytest.raises(WorkInterrupted):
            train_run(config, should_stop=lambda: True)
        states.append(load_checkpoint(tmp_path / name / "last.safetensors")[0])
    both = [name for name in states[0] if name.startswith("task") and "student." in name and name in states[1]]
    assert len(both) > 10
    assert all(torch.equal(states[0][name], states[1][name]) for name in both)


def test_one_teacher_may_be_routed_between_its_own_masks(tiny, school, tmp_path):
    result = train_run(tiny.run("student", tmp_path / "run", teacher=school / "teacher", objective=MST))
    assert result.gradient_shares["mst"] > 0


def tasks_with_places():
    """One of each kind of model, and a batch for it."""
    pixels, latents = make_batch()
    teacher = make_teacher(standardise=True, late_fusion=True)
    of_latents = Batch(tuple("abcde"), pixels, latents, torch.full((5,), -1))
    for fusion in ({}, {"fusion": "bottleneck", "n_bottlenecks": 2}, {"fusion": "late"}):
        yield TeacherTask(make_teacher(**fusion), None), of_latents
    yield TeacherTask(teacher, None), of_latents
    for kind in ("linear", "mlp"):
        probe = LatentProbe(ProbeConfig(n_classes=4, formats=teacher.config.formats, kind=kind, hidden=8))
        probe.load_state_dict(
            {**probe.state_dict(), **{k: v for k, v in teacher.state_dict().items() if "scaler" in k}}
        )
        yield ProbeTask(probe, None), of_latents
    for family in ("vit", "resnet", "swin"):
        images = some_pixels()
        yield StudentTask(make_student(family)), Batch(("a", "b", "c"), images, latents, torch.full((3,), -1))


@pytest.mark.parametrize("number", range(9))
def test_a_mask_weighs_what_a_model_of_any_kind_holds_and_a_mask_of_ones_changes_nothing(number):
    task, batch = list(tasks_with_places())[number]
    model = FrozenClassifier(task)
    plain = model.logits(batch)
    assert model.task.places
    for place, one in model.task.places.items():
        seen = []

        def ones(tokens, seen=seen, width=one.width):
            seen.append(tokens.shape[-1])
            return torch.ones(len(tokens), width)

        torch.testing.assert_close(model.logits(batch, place=place, mask=ones), plain)
        assert seen == [one.width]
        weights = torch.rand(one.width, generator=torch.Generator().manual_seed(3)).requires_grad_()
        masked = model.logits(batch, place=place, mask=lambda tokens, weights=weights: weights.expand(len(tokens), -1))
        assert not torch.allclose(masked, plain)
        masked.square().sum().backward()
        assert weights.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in task.module.parameters())
    torch.testing.assert_close(model.logits(batch), plain)


def test_teachers_are_told_only_of_the_latents_that_they_know():
    pixels, latents = make_batch()
    model = FrozenClassifier(TeacherTask(make_teacher(), None))
    more = Batch(tuple("abcde"), pixels, {**latents, "depth": torch.zeros(5, 1)}, torch.full((5,), -1))
    assert model.targets(more, [LOGITS])[LOGITS].shape == (5, 4)


def test_a_teacher_that_has_changed_is_refused_by_its_name(tiny, school, tmp_path):
    for name in ("probe", "teacher"):
        shutil.copytree(school / name, tmp_path / name)
    config = student_of(tiny, tmp_path, tmp_path / "run", KD)
    with pytest.raises(WorkInterrupted):
        train_run(config, should_stop=lambda: True)
    shutil.rmtree(tmp_path / "teacher")
    train_run(tiny.run("teacher", tmp_path / "teacher", seed=5))
    with pytest.raises(CheckpointError, match=f"another teacher than `{tmp_path / 'teacher'}`"):
        train_run(config, resume=True)
    swapped = config.model_copy(update={"teachers": {"a": config.teachers["the-probe"], "b": str(school / "teacher")}})
    with pytest.raises(CheckpointError, match="another `teachers`"):
        train_run(swapped, resume=True)


def test_teachers_may_move_while_a_student_is_stopped(tiny, school, tmp_path):
    shutil.copytree(school, tmp_path / "here")
    with pytest.raises(WorkInterrupted):
        train_run(student_of(tiny, tmp_path / "here", tmp_path / "run", KD), should_stop=lambda: True)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert train_run(student_of(tiny, tmp_path / "there", tmp_path / "run", KD), resume=True).best_step


def test_models_that_do_not_go_together_are_refused(tiny, school, tmp_path):
    train_run(tiny.run("teacher", tmp_path / "loud", pixel_mean=[0.1, 0.2, 0.3]))
    shutil.copytree(school / "teacher", tmp_path / "teacher")
    with pytest.raises(SpecError, match=r"`teachers.the-loud` was trained with `pixel_mean"):
        train_run(student_of(tiny, tmp_path, tmp_path / "run", KD, names=("loud", "teacher")))
    other = tiny.build(tiny.manifest, tmp_path / "other.zarr", seed=9)
    train_run(tiny.run("probe", tmp_path / "elsewhere", store=str(other)))
    with pytest.raises(RecipeMismatchError, match="another recipe of `depth`"):
        train_run(student_of(tiny, tmp_path, tmp_path / "run", KD, names=("elsewhere", "teacher")))
    names = write_manifest(tiny.images / "renamed.parquet", [*tiny.manifest.rows()], ("a", "b", "c"))
    train_run(tiny.run("probe", tmp_path / "renamed", store=str(tiny.build(names, tmp_path / "renamed.zarr"))))
    with pytest.raises(RecipeMismatchError, match="different class maps"):
        train_run(student_of(tiny, tmp_path, tmp_path / "run", KD, names=("renamed", "teacher")))
    assert not (tmp_path / "run").exists()


def test_what_asks_for_blocks_of_several_teachers_is_refused(tiny, school, tmp_path):
    with pytest.raises(SpecError, match="answer as one with logits alone: `messy` predicts") as caught:
        train_run(student_of(tiny, school, tmp_path / "run", {"messy": {}}))
    assert "`mst`" in caught.value.hint


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"teachers": {"a": "a"}}, "at least 2"),
        ({"teachers": {"a": "a", "b/c": "b"}}, "should match pattern"),
        ({"teachers": {"a": "a", "b": "b"}, "teacher": "c"}, "`teacher` and `teachers` both say"),
        ({"targets": "t"}, "runs its teachers with masks"),
        ({}, "none is named"),
        ({"teacher": "a", "ensemble": "probabilities"}, "none are named"),
    ],
)
def test_a_run_says_once_and_fully_whom_it_learns_from(fields, what):
    run = {"kind": "student", "store": "s", "output": "o", "objective": {"mst": {}}, **fields}
    with pytest.raises(ValidationError, match=what):
        RunConfig.model_validate(run)


def test_the_order_of_teachers_in_a_file_decides_nothing():
    run = {"kind": "student", "store": "s", "output": "o", "objective": {"kd": {}}, "teachers": {"b": "x", "a": "y"}}
    assert list(RunConfig.model_validate(run).teachers) == ["a", "b"]


def test_several_teachers_have_no_blocks_to_learn_from(tiny, school):
    models = {name: FrozenClassifier(load_run(school / name).task) for name in ("probe", "teacher")}
    assert Teachers(models).outline.blocks == {}
    assert read_facts(school / "probe").teachers_sha256 == {}
