"""What alignment says of planted features and of real runs, and what it refuses."""

import dataclasses

import pytest
import torch

from dla_cache.errors import CheckpointError, MissingLatentError, SpecError
from dla_cache.store import open_store
from tests.alignment_world import make_arms, make_world
from trainer.alignment import (
    ImageBootstrap,
    Parts,
    Table,
    Target,
    measure_block,
    prepare_targets,
    remove_class_means,
    shuffle_within_class,
)
from trainer.alignment_arms import (
    MeasuredRun,
    differences,
    draws_of,
    match_controls,
    same_depth,
    summarise,
)
from trainer.alignment_features import other_draw, read_latents, scale_of
from trainer.alignment_metrics import of_mean
from trainer.alignment_probes import noise_ceiling
from trainer.alignment_study import AlignmentPlan, measure_alignment
from trainer.gallery import choose_images, show_gallery


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


N = 240
PARTS = Parts(torch.arange(N) % 4, torch.arange(N) % 4)


def table(make):
    return Table(make(0), make(100))


CENTRES = 3 * normal(4, 6, seed=9)
DETAILS = table(lambda seed: normal(N, 6, seed=seed))
LATENTS = Table(*(CENTRES[PARTS.labels] + part for part in (DETAILS.fit, DETAILS.held)))
TARGET = Target("depth", frozenset(["depth"]), LATENTS, Table(LATENTS.fit[:, :2], LATENTS.held[:, :2]))


def planted(knows_details):
    """Features that tell classes apart, with or without what else is in the latent."""

    def features(part, seed):
        own = normal(N, 6, seed=seed)
        return torch.cat([CENTRES[PARTS.labels] + own, part if knows_details else normal(N, 6, seed=seed + 1)], dim=1)

    return Table(features(DETAILS.fit, 20), features(DETAILS.held, 30))


@pytest.fixture(scope="module")
def prepared():
    return prepare_targets([TARGET], PARTS)


@pytest.fixture(scope="module")
def bootstrap():
    return ImageBootstrap(N)


def measured(arm, knows_details, prepared, bootstrap, *, accuracy=0.5, taught=()):
    found = measure_block(planted(knows_details), prepared, PARTS, bootstrap, n_shuffles=20)
    return MeasuredRun(arm, arm, accuracy, frozenset(taught), ("block",), (found,))


def test_features_that_know_the_class_alone_are_beyond_their_null_in_no_metric(prepared, bootstrap):
    lines = summarise([measured("class", False, prepared, bootstrap)], prepared, N)
    assert len(lines) == 14
    assert [(line.metric, line.class_means) for line in lines if line.is_beyond_null] == []
    raw = {line.metric: line.value for line in lines if line.class_means == "raw"}
    assert raw["cka"] > 0.5  # what looks like knowledge is the class
    assert raw["r2-flattened"] > 0.5
    within = {line.metric: line.value for line in lines if line.class_means == "within-class"}
    assert within["r2-flattened"] < 0.05
    assert abs(within["cka"]) < 0.05


def test_features_that_know_more_than_the_class_are_beyond_their_null_in_every_metric_within_class(prepared, bootstrap):
    lines = summarise([measured("details", True, prepared, bootstrap)], prepared, N)
    within = [line for line in lines if line.class_means == "within-class"]
    assert [line.metric for line in within if not line.is_beyond_null] == []
    assert all(line.low <= line.value <= line.high for line in lines)


def test_class_means_are_gone_after_they_are_removed():
    values = remove_class_means(LATENTS.fit, PARTS.fit_labels)
    for label in range(4):
        torch.testing.assert_close(values[PARTS.fit_labels == label].mean(dim=0), torch.zeros(6), atol=1e-5, rtol=0)


def test_a_shuffle_within_class_is_a_permutation_that_keeps_every_label():
    labels = torch.tensor([2, 0, 1, 0, 2, 2, 1, 0, 0, 5])
    orders = [shuffle_within_class(labels, torch.Generator().manual_seed(seed)) for seed in range(50)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(10))
        assert labels[order].tolist() == labels.tolist()
    assert len({tuple(order.tolist()) for order in orders}) > 30


def test_resampled_images_spread_a_mean_as_its_standard_error_says(bootstrap):
    values = normal(N)
    spread = float(bootstrap.deviations([of_mean(values)]).std())
    assert spread == pytest.approx(float(values.std()) / N**0.5, rel=0.1)


def test_the_spread_over_few_runs_is_that_of_their_mean():
    values = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    draws = draws_of(values, torch.zeros(3, 20000))
    assert float(draws.mean()) == pytest.approx(2.0, abs=0.05)
    assert float(draws.std()) == pytest.approx(float(values.std()) / 3**0.5, rel=0.03)


def test_a_matched_control_is_the_run_of_the_nearest_accuracy_that_never_saw_the_modality(prepared, bootstrap):
    runs = [
        measured("messy", True, prepared, bootstrap, accuracy=0.84, taught=["depth"]),
        measured("kd", True, prepared, bootstrap, accuracy=0.83, taught=["depth"]),
        measured("weak", False, prepared, bootstrap, accuracy=0.5),
        measured("strong", False, prepared, bootstrap, accuracy=0.82),
        measured("sound", False, prepared, bootstrap, accuracy=0.7, taught=["audio"]),
    ]
    matched = [line for line in differences(runs, prepared) if line.is_matched]
    assert {(line.arm, line.other, line.other_accuracy) for line in matched} == {
        ("messy", "strong", 0.82),
        ("kd", "strong", 0.82),
    }
    assert {line.verdict for line in matched if line.metric == "cka" and line.class_means == "within-class"} == {"more"}
    named = [line.other for line in differences(runs, prepared, ["weak"]) if line.is_matched]
    assert set(named) == {"weak"}


def test_each_run_has_a_control_of_its_own():
    def run(name, accuracy):
        return MeasuredRun("arm", name, accuracy, frozenset(), (), ())

    chosen = match_controls([run("a", 0.8), run("b", 0.6)], [run("c", 0.62), run("d", 0.79)])
    assert [one.name for one in chosen] == ["d", "c"]


def test_blocks_of_models_of_other_depths_are_compared_at_the_same_share_of_the_depth():
    assert [same_depth(block, 3, 12) for block in range(3)] == [3, 7, 11]
    assert [same_depth(block, 12, 3) for block in (0, 3, 7, 11)] == [0, 0, 1, 2]


def test_gallery_images_are_of_as_many_classes_as_there_are():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    assert sorted(labels[choose_images(labels, 3)].tolist()) == [0, 1, 2]
    assert sorted(labels[choose_images(labels, 5)].tolist()) == [0, 0, 1, 1, 2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("alignment"))


def test_of_several_draws_in_a_store_the_first_is_measured_and_the_second_is_the_ceiling(world):
    one, two = open_store(world.store), open_store(world.draws)
    rows = one.rows_of(["test"])
    scale = scale_of(one, "depth", ["validation"])
    first = read_latents(two, "depth", rows, scale)
    torch.testing.assert_close(first.flattened, read_latents(one, "depth", rows, scale).flattened)
    second = other_draw(two, None, "depth", rows, scale)
    assert second.flattened.shape == (60, 8)
    assert 0.5 < noise_ceiling(first.flattened, second.flattened) < 0.999
    assert other_draw(one, None, "depth", rows, scale) is None


@pytest.fixture(scope="module")
def arms(world):
    return make_arms(world)


@pytest.fixture(scope="module")
def plan(world, arms):
    return AlignmentPlan(
        arms=arms,
        store=open_store(world.store),
        images=world.folder,
        fit_splits=("validation",),
        splits=("test",),
        modalities=("audio", "depth"),
        targets={"probe": world.folder / "runs" / "probe"},
        other_draw=open_store(world.other),
        n_shuffles=3,
    )


@pytest.fixture(scope="module")
def found(plan):
    told = []
    result = measure_alignment(plan, on_progress=lambda done, total, note: told.append((done, total, note)))
    assert told[-1] == (8, 8, "image-only")
    return result


def test_students_are_measured_block_by_block_against_latents_and_what_a_probe_says(found):
    assert [(run.arm, sorted(run.taught), run.blocks) for run in found.runs] == [
        ("kd", ["depth"], ("vit.layers.0", "vit.layers.1")),
        ("kd", ["depth"], ("vit.layers.0", "vit.layers.1")),
        ("image-only", [], ("vit.layers.0", "vit.layers.1")),
        ("image-only", [], ("vit.layers.0", "vit.layers.1")),
    ]
    assert {line.target for line in found.lines} == {"audio", "depth", "probe: logits"}
    by_place = {(line.arm, line.block, line.target, line.class_means, line.metric): line for line in found.lines}
    depth = by_place["kd", 1, "depth", "within-class", "r2-flattened"]
    assert depth.value > 0.3
    assert depth.taught
    assert depth.runs == len(depth.values) == 2
    audio = by_place["kd", 1, "audio", "within-class", "r2-flattened"]
    assert not audio.taught
    assert audio.value < 0.1


def test_what_is_noise_has_a_ceiling_of_nothing_and_what_is_seen_one_below_one(found):
    ceilings = {line.target: line.ceiling for line in found.lines if line.metric == "r2-flattened"}
    assert ceilings["depth"] == pytest.approx(0.88, abs=0.1)  # noise of .01 beside a variance of .03 and the classes'
    assert ceilings["audio"] == pytest.approx(0, abs=0.2)
    assert ceilings["probe: logits"] is None


def test_the_same_plan_gives_the_same_numbers(plan, found):
    one_arm = dataclasses.replace(plan, arms={"kd": plan.arms["kd"]}, targets={})
    again = {
        (line.block, line.target, line.class_means, line.metric): line for line in measure_alignment(one_arm).lines
    }
    for line in found.lines:
        if line.arm == "kd" and line.target != "probe: logits":
            assert again[line.block, line.target, line.class_means, line.metric] == line


def test_a_gallery_has_raw_latents_of_every_arm_and_a_null(plan):
    gallery = show_gallery(plan, "depth", n_images=4)
    assert gallery.truth.shape == (4, 2, 2, 2)
    assert [one.arm for one in gallery.seen] == ["kd", "image-only"]
    assert all(one.latents.shape == (4, 2, 2, 2) for one in (*gallery.seen, gallery.null))
    assert gallery.seen[0].r2 > gallery.null.r2 + 0.1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"arms": {"probe": ["probe"]}}, CheckpointError, "is a probe, which sees latents"),
        ({"modalities": ("shape",)}, MissingLatentError, "has no modality `shape`"),
        ({"splits": ("labelled",)}, SpecError, "`labelled` has 12 images of 3 classes, too few"),
        ({"splits": ("unlabelled",)}, SpecError, "4 of 4 images of `unlabelled` have no label"),
        ({"splits": ("validation",)}, SpecError, "would be fitted on and measured as well"),
        ({"controls": ("nobody",)}, SpecError, "`nobody` is no arm"),
    ],
    ids=["no student", "no modality", "too few images", "no labels", "one split twice", "no arm"],
)
def test_a_plan_that_says_nothing_is_refused(plan, world, change, error, message):
    if "arms" in change:
        change = {"arms": {"probe": [world.folder / "runs" / "probe"]}}
    with pytest.raises(error, match=message):
        measure_alignment(dataclasses.replace(plan, **change))


def test_an_arm_that_saw_the_latents_is_no_control_and_one_that_saw_others_of_that_name_is(world, plan):
    with pytest.raises(SpecError, match="arm `kd` is no control for `depth`"):
        measure_alignment(dataclasses.replace(plan, controls=("image-only", "kd")))
    others = world.train("other-probe", "probe", model={"hidden": 8}, store=str(world.other))
    pupil = world.train("other", "student", objective={"kd": {}}, teacher=str(others), store=str(world.other))
    arms = {"kd": plan.arms["kd"][:1], "other": [pupil]}
    change = {"arms": arms, "controls": ("other",), "targets": {}, "modalities": ("depth",)}
    found = measure_alignment(dataclasses.replace(plan, **change))
    assert {(line.arm, line.other) for line in found.differences if line.is_matched} == {("kd", "other")}


def test_the_same_draw_again_is_no_noise_ceiling(plan):
    with pytest.raises(SpecError, match="holds the same draw of `audio`"):
        measure_alignment(dataclasses.replace(plan, other_draw=plan.store))


def test_runs_of_one_arm_must_be_of_one_kind(plan):
    mixed = {"mixed": [plan.arms["kd"][0], plan.arms["image-only"][0]]}
    with pytest.raises(SpecError, match="runs of arm `mixed` learned from different modalities"):
        measure_alignment(dataclasses.replace(plan, arms=mixed, modalities=("depth",), n_shuffles=2, targets={}))
