"""What is measured of a classifier: by hand, against the formula, and on whole runs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dla_cache.errors import RecipeMismatchError, SpecError, StoreError, TrainingError
from dla_cache.spec import LatentFormat
from dla_cache.store import open_store
from trainer.batch import Batch
from trainer.evaluate import Predictions, measure_branches, measure_subsets, predict
from trainer.measure import measure_run
from trainer.probe import LatentProbe, ProbeConfig
from trainer.run import load_run, train_run
from trainer.run_folder import read_result
from trainer.tasks import ProbeTask, TeacherTask
from trainer.teacher import Teacher, TeacherConfig

N_CLASSES = 3
DEPTH = LatentFormat(kind="continuous", shape=(2, 2, 2), axes=("channel", "height", "width"), dtype="float16")
AUDIO = LatentFormat(kind="codes", shape=(2, 5), axes=("codebook", "step"), dtype="int16", vocabulary=7)
FORMATS = {"depth": DEPTH, "audio": AUDIO}


def predictions(probabilities, labels):
    ids = tuple(f"image-{number}" for number in range(len(labels)))
    return Predictions(ids, torch.tensor(labels), torch.tensor(probabilities).log())


def test_accuracies_log_loss_and_confusion_are_those_of_a_table_done_by_hand():
    table = [[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.1, 0.3, 0.6], [0.2, 0.7, 0.1]]
    measured = predictions(table, [0, 1, 0, 1])
    assert (measured.accuracy().correct, measured.accuracy().n) == (2, 4)
    assert measured.accuracy_within(2).correct == 3
    assert measured.log_loss() == pytest.approx(-np.log([0.7, 0.4, 0.1, 0.7]).mean(), rel=1e-6)  # float32 logits
    assert measured.confusion().tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(("n_right", "error"), [(8, 0.0), (5, 0.3), (10, 0.2)])
def test_calibration_error_is_what_confidence_exceeds_accuracy_or_falls_short_of_it(n_right, error):
    measured = predictions([[0.8, 0.2]] * 10, [0] * n_right + [1] * (10 - n_right))
    assert measured.calibration_error() == pytest.approx(error, abs=1e-6)


def test_calibration_error_is_the_formula_taken_bin_by_bin():
    generator = np.random.default_rng(0)
    table = generator.dirichlet([1, 1, 1], size=500)
    labels = generator.integers(0, 3, size=500)
    confidence, right = table.max(axis=1), table.argmax(axis=1) == labels
    expected = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            expected += inside.sum() / 500 * abs(right[inside].mean() - confidence[inside].mean())
    measured = predictions(table.tolist(), labels.tolist())
    assert measured.calibration_error() == pytest.approx(expected, abs=1e-5)


def make_task(kind):
    torch.manual_seed(0)
    if kind == "probe":
        task = ProbeTask(LatentProbe(ProbeConfig(n_classes=N_CLASSES, formats=FORMATS, hidden=8)), None)
    else:
        shape = {"image_size": 8, "patch_size": 4, "width": 16, "depth": 1, "n_heads": 2, "resampler_heads": 2}
        late = {"tokens_per_modality": 3, "standardise": True, "late_fusion": kind == "late", "late_fusion_hidden": 8}
        config = TeacherConfig(n_classes=N_CLASSES, formats=FORMATS, **shape, **late)
        task = TeacherTask(Teacher(config), None)
        torch.nn.init.normal_(task.module.head.weight)
    task.module.set_statistics("depth", torch.ones(2), torch.full((2,), 2.0))
    return task


def make_batches(n_batches=3, size=8):
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(
            tuple(f"image-{number}-{position}" for position in range(size)),
            torch.randn(size, 3, 8, 8, generator=generator),
            {
                "depth": 3 * torch.randn(size, 2, 2, 2, generator=generator),
                "audio": torch.randint(0, 7, (size, 2, 5), generator=generator),
            },
            torch.randint(0, N_CLASSES, (size,), generator=generator),
        )
        for number in range(n_batches)
    ]


KINDS = pytest.mark.parametrize("kind", ["probe", "teacher", "late"])


@KINDS
def test_every_subset_of_the_modalities_is_measured_and_all_of_them_is_the_answer(kind):
    task, batches = make_task(kind), make_batches()
    measured = measure_subsets(task, lambda: iter(batches))
    assert list(measured) == [(), ("depth",), ("audio",), ("depth", "audio")]
    answer = next(iter(measure_branches(task, lambda: iter(batches)).values()))
    assert measured["depth", "audio"] == answer == predict(task, lambda: iter(batches)).accuracy()
    assert len({accuracy.correct for accuracy in measured.values()}) > 1


@KINDS
def test_what_is_left_out_of_a_subset_does_not_matter(kind):
    task, batches = make_task(kind), make_batches()
    for subset, others in [((), ("depth", "audio")), (("depth",), ("audio",)), (("audio",), ("depth",))]:
        changed = [
            replace(batch, latents=batch.latents | {name: torch.full_like(batch.latents[name], 1) for name in others})
            for batch in batches
        ]
        before, after = (measure_subsets(task, lambda of=of: iter(of)) for of in (batches, changed))
        assert before[subset] == after[subset]
        assert before != after


def test_a_probe_takes_an_absent_modality_for_the_mean_of_the_training_images():
    task, batch = make_task("probe"), make_batches()[0]
    at_mean = replace(batch, latents=batch.latents | {"depth": torch.ones(8, 2, 2, 2)})
    task.module.eval()
    absent = task.branch_logits(batch, {"depth": False})["probe"]
    assert torch.equal(absent, task.branch_logits(at_mean)["probe"])
    assert not torch.equal(absent, task.branch_logits(batch)["probe"])
    without = replace(batch, latents={"audio": batch.latents["audio"]})
    assert torch.equal(absent, task.branch_logits(without, {"depth": False})["probe"])


def test_a_probe_that_is_given_no_latent_at_all_says_so():
    with pytest.raises(TrainingError, match="how many images") as refused:
        make_task("probe").module({}, present={"depth": False, "audio": False})
    assert refused.value.hint


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A finished probe, teacher and student."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("probe", "teacher", "student"):
        train_run(tiny.run(kind, folder / kind))
    return folder


def measure(tiny, run, splits, store=None):
    store = store or tiny.store
    return measure_run(run, open_store(store), tiny.images, splits, where=str(store))


@pytest.mark.parametrize("kind", ["probe", "teacher", "student"])
def test_measured_again_a_run_is_as_good_as_it_said(tiny, runs, kind):
    run, result = load_run(runs / kind), read_result(runs / kind)
    test = measure(tiny, run, ["test"])
    assert test.predictions.accuracy().value == result.test_score
    assert test.is_own_data
    assert list(test.subsets) == ([] if kind == "student" else [(), ("depth",)])
    assert measure(tiny, run, ["validation"]).predictions.accuracy().value == result.validation_score
    both = measure(tiny, run, ["validation", "test"]).predictions
    assert sorted(both.image_ids) == [f"test-{number}" for number in range(4)] + [f"validation-{n}" for n in range(6)]


def test_a_store_of_another_recipe_is_refused_but_for_a_student(tiny, runs, tmp_path):
    other = tiny.build(tiny.manifest, tmp_path / "other.zarr", seed=1)
    for kind in ("probe", "teacher"):
        with pytest.raises(RecipeMismatchError, match=r"another recipe of `depth` than `.*other\.zarr`") as refused:
            measure(tiny, load_run(runs / kind), ["test"], other)
        assert refused.value.hint
    measured = measure(tiny, load_run(runs / "student"), ["test"], other)
    assert measured.predictions.accuracy().value == read_result(runs / "student").test_score


def test_a_store_of_another_class_map_is_refused(tiny, runs, tmp_path):
    manifest = tiny.make_manifest(tmp_path / "data", ("red", "blue", "green"))
    other = tiny.build(manifest, tmp_path / "other.zarr")
    with pytest.raises(RecipeMismatchError, match="different class maps"):
        measure(tiny, load_run(runs / "student"), ["test"], other)


def test_other_images_than_the_runs_own_are_measured_and_said_to_be_others(tiny, runs, tmp_path):
    other = tiny.build(tiny.reverse(tiny.manifest), tmp_path / "other.zarr")
    measured = measure(tiny, load_run(runs / "probe"), ["test"], other)
    assert not measured.is_own_data
    assert measured.predictions.accuracy().value == read_result(runs / "probe").test_score


def test_images_without_a_label_and_splits_without_an_image_are_refused(tiny, runs):
    with pytest.raises(SpecError, match="8 of 8 images of `transfer` have no label"):
        measure(tiny, load_run(runs / "student"), ["transfer"])
    with pytest.raises(StoreError, match="no image of split `nothing`"):
        measure(tiny, load_run(runs / "student"), ["nothing"])


def test_progress_tells_every_image_of_every_pass(tiny, runs):
    told = []
    run = load_run(runs / "teacher")
    measure_run(
        run,
        open_store(tiny.store),
        tiny.images,
        ["test"],
        where="",
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(4, 8), (8, 8)]
