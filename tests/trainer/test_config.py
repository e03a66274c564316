"""Run configs: presets, what is laid over them, where paths start, and what is refused."""

import math
from pathlib import Path

import pytest
import yaml

from dla_cache.errors import SpecError
from dla_cache.spec import LatentFormat
from trainer.config import DERIVED_FIELDS, MODEL_CONFIGS, RunConfig, merge, resolve_run
from trainer.presets import PRESETS
from trainer.run import model_config
from trainer.run_folder import DataFacts, dump_config

PLACES = {"store": "cache.zarr", "images": "data", "output": "run"}
DEPTH = LatentFormat(kind="continuous", shape=(8, 4, 4), axes=("channel", "height", "width"), dtype="float16")
FACTS = {
    "class_names": ("a", "b"),
    "class_counts": (1, 1),
    "n_labelled": 2,
    "n_images": 2,
    "recipes": {"depth": ""},
    "formats": {"depth": DEPTH},
    "modalities": ("depth",),
    "rows_sha256": "",
    "latents_sha256": {"depth": ""},
    "teacher_sha256": None,
}
PRESET_RUNS = [(preset, kind) for preset, kinds in PRESETS.items() for kind in kinds if kind in MODEL_CONFIGS]


def resolve(**fields):
    return resolve_run({**PLACES, **fields}, base=Path("base"), where="run.yaml")


def preset_run(preset, kind, **fields):
    teacher = {"teacher": "teacher"} if kind == "student" else {}
    return resolve(preset=preset, kind=kind, **teacher, **fields)


@pytest.mark.parametrize(("preset", "kind"), PRESET_RUNS)
def test_a_preset_makes_a_whole_run_of_three_paths_and_a_kind(preset, kind):
    config = preset_run(preset, kind)
    assert config.kind == kind
    assert isinstance(model_config(config, DataFacts.model_validate(FACTS)), MODEL_CONFIGS[kind])


@pytest.mark.parametrize("length", [{}, {"epochs": 2}, {"loop": {"steps": 3}}], ids=["preset's", "epochs", "steps"])
@pytest.mark.parametrize(("preset", "kind"), PRESET_RUNS)
def test_a_resolved_run_resolves_to_itself(preset, kind, length):
    config = preset_run(preset, kind, **length)
    again = resolve_run(yaml.safe_load(dump_config(config)), base=Path(), where="again")
    assert again == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(("preset", "kind"), PRESET_RUNS)
def test_the_length_that_a_run_says_replaces_that_of_the_preset(preset, kind):
    by_steps = preset_run(preset, kind, loop={"steps": 3})
    assert (by_steps.epochs, by_steps.loop.steps) == (None, 3)
    by_epochs = preset_run(preset, kind, epochs=2)
    assert by_epochs.epochs == 2
    assert "steps" not in by_epochs.model_dump()["loop"]
    assert by_epochs.loop.learning_rate == by_steps.loop.learning_rate == preset_run(preset, kind).loop.learning_rate


@pytest.mark.parametrize("preset", [{}, {"preset": "paper"}, {"preset": "embedded"}])
def test_a_run_that_says_how_long_in_epochs_and_in_steps_is_refused(preset):
    both = {"kind": "teacher", "epochs": 2, "loop": {"steps": 3}, **preset}
    with pytest.raises(SpecError, match=r"`epochs` and `loop.steps` both say how long.*set `epochs: null`"):
        resolve(**both)
    assert resolve(**{**both, "epochs": None}).loop.steps == 3


def test_the_paper_is_50_epochs_of_batches_of_32_at_a_rate_from_3e_5_to_1e_6():
    config = preset_run("paper", "teacher")
    assert (config.epochs, config.labelled_per_batch, config.image_size) == (50, 32, 224)
    assert (config.loop.learning_rate, config.loop.final_learning_rate) == (3e-5, 1e-6)
    assert (config.loop.weight_decay, config.loop.clip_norm, config.loop.ema_decay) == (0.01, 0, 0)


def test_the_run_comes_over_the_preset_field_by_field():
    config = preset_run("embedded", "teacher", loop={"steps": 7}, model={"depth": 1})
    preset = preset_run("embedded", "teacher")
    assert config.loop == preset.loop.model_copy(update={"steps": 7})
    assert config.model == {**preset.model, "depth": 1}


def test_an_objective_replaces_that_of_the_preset():
    config = preset_run("embedded", "student", objective={"kd": {"temperature": 4.0}})
    assert list(config.objective.active) == ["kd"]
    assert config.objective.kd.temperature == 4


@pytest.mark.parametrize(
    ("below", "above", "merged"),
    [
        ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"a": {"b": 3, "c": 2}}),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"d": 2}}}, {"a": {"b": {"c": 1, "d": 2}}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
        ({"a": 1}, {"a": {"b": 2}}, {"a": {"b": 2}}),
        ({"objective": {"ce": {}}}, {"objective": {"kd": {}}}, {"objective": {"kd": {}}}),
    ],
)
def test_mappings_merge_and_all_else_is_replaced(below, above, merged):
    before = yaml.safe_dump([below, above])
    assert merge(below, above) == merged
    assert yaml.safe_dump([below, above]) == before


def test_paths_start_at_the_folder_of_the_file_unless_absolute():
    config = resolve(kind="student", objective={"kd": {}}, teacher="../teacher", images="/data")
    assert (config.store, config.output, config.teacher) == ("base/cache.zarr", "base/run", "base/../teacher")
    assert config.images == "/data"


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"sede": 1}, "`sede`"),
        ({"loop": {"learning_rte": 1}}, "`loop.learning_rte`"),
        ({"roles": {"trasnfer": ["a"]}}, "`roles.trasnfer`"),
        ({"view": {"flip": True}}, "`view.flip`"),
        ({"model": {"widht": 8}}, "'widht'"),
        ({"objective": {"dino": {}}}, "`objective.dino`"),
        ({"objective": {"ce": {"wieght": 1}}}, "`objective.ce.wieght`"),
        ({"objective": {"ce": {}, "messy": {"layer": 1}}}, "`objective.messy.layer`"),
        ({"kind": "probe", "objective": None, "self_training": {"threshold": 0.5}}, "`self_training.threshold`"),
    ],
)
def test_an_unknown_field_is_refused_by_its_name_at_every_level(fields, place):
    with pytest.raises(SpecError) as refused:
        resolve(**{"kind": "student", "objective": {"ce": {}}, **fields})
    assert place in refused.value.message
    assert "run.yaml" in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize("kind", MODEL_CONFIGS)
@pytest.mark.parametrize("field", sorted(DERIVED_FIELDS))
def test_what_the_data_decide_may_not_be_set(kind, field):
    with pytest.raises(SpecError, match=field):
        resolve(kind=kind, model={field: 3}, **({"objective": {"ce": {}}} if kind == "student" else {}))


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"kind": "professor"}, "kind"),
        ({"kind": "probe", "seed": -1}, "seed"),
        ({"kind": "probe", "loop": {"steps": -1}}, r"loop\.steps"),
        ({"kind": "probe", "loop": 5}, "loop"),
        ({"kind": "probe", "epochs": 0}, "epochs"),
        ({"kind": "probe", "pixel_std": [0, 0.5, 0.5]}, r"pixel_std\.0"),
        ({"kind": "probe", "pixel_std": [0.5, math.inf, 0.5]}, r"pixel_std\.1"),
        ({"kind": "probe", "pixel_mean": [0.5, 0.5, math.nan]}, r"pixel_mean\.2"),
        ({"kind": "probe", "device": "gpu 3"}, "`device`.*torch knows no device `gpu 3`"),
        ({"kind": "probe", "device": ""}, "`device`"),
        ({"kind": "probe", "roles": {"labelled": []}}, r"roles\.labelled"),
        ({"kind": "probe", "roles": {"test": ["validation"]}}, "one part only"),
    ],
)
def test_a_value_out_of_bounds_is_refused(fields, fault):
    with pytest.raises(SpecError, match=fault):
        resolve(**fields)


@pytest.mark.parametrize("name", ["store", "output"])
def test_a_run_without_a_place_is_refused(name):
    with pytest.raises(SpecError, match=f"`{name}`: Field required"):
        resolve_run({"kind": "probe", **{k: v for k, v in PLACES.items() if k != name}}, base=Path(), where="run.yaml")


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"roles": {"transfer": ["transfer"]}, "self_training": {}}, "go together"),
        ({"transfer_per_batch": 4, "self_training": {}}, "go together"),
        (
            {"roles": {"transfer": ["transfer"]}, "transfer_per_batch": 4},
            "nothing in this run learns from the transfer",
        ),
    ],
)
def test_the_transfer_role_and_its_part_of_a_batch_go_together(fields, fault):
    with pytest.raises(SpecError, match=fault):
        resolve(kind="probe", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "probe", "self_training": {}},
        {"kind": "student", "objective": {"ce": {}}, "self_training": {}},
        {"kind": "student", "objective": {"ce": {}}, "modalities": ["depth"]},
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(fields):
    with pytest.raises(SpecError, match="belongs to probes and teachers"):
        resolve(**fields)


def test_a_transfer_role_with_someone_who_learns_from_it_is_fine():
    transfer = {"roles": {"transfer": ["transfer"]}, "transfer_per_batch": 4}
    assert resolve(kind="probe", self_training={}, **transfer).images_per_step == 36
    assert resolve(kind="student", objective={"kd": {}}, teacher="t", **transfer).training_splits == (
        "labelled",
        "transfer",
    )


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        (
            {"kind": "student", "objective": {"ce": {}, "kd": {}}},
            "learns from a `teacher` or from its stored `targets`, and none",
        ),
        (
            {"kind": "student", "objective": {"messy": {}}},
            "learns from a `teacher` or from its stored `targets`, and none",
        ),
        (
            {"kind": "student", "objective": {"ce": {}}, "teacher": "t"},
            "`teacher` is named, and no objective learns from it",
        ),
        ({"kind": "teacher", "teacher": "t"}, "`teacher` is named, and no objective learns from it"),
        ({"kind": "student"}, "`objective` belongs to students"),
        ({"kind": "probe", "objective": {"ce": {}}}, "`objective` belongs to students"),
        ({"kind": "student", "objective": {}}, "no objective is active"),
    ],
)
def test_a_teacher_is_named_exactly_when_an_objective_learns_from_one(fields, fault):
    with pytest.raises(SpecError, match=fault):
        resolve(**fields)


@pytest.mark.parametrize(
    "fields", [{"preset": "big", "kind": "probe"}, {"preset": "paper", "kind": "probe"}, {"preset": "paper"}]
)
def test_a_preset_that_is_not_there_is_refused_with_those_that_are(fields):
    with pytest.raises(SpecError, match="preset") as refused:
        resolve(**fields)
    assert "paper, embedded" in refused.value.hint


def test_a_config_cannot_be_changed():
    config = resolve(kind="probe")
    assert isinstance(config, RunConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1


def test_one_split_of_a_role_may_be_given_without_a_list():
    roles = resolve(kind="probe", roles={"labelled": "train", "test": "held-out"}).roles
    assert (roles.labelled, roles.validation, roles.test) == (("train",), ("validation",), ("held-out",))


@pytest.mark.parametrize("kind", ["probe", "teacher"])
def test_a_run_without_transfer_images_drops_what_its_preset_says_of_them(kind):
    config = resolve(kind=kind, preset="embedded", roles={"transfer": []})
    assert (config.transfer_per_batch, config.self_training) == (0, None)
    alone = resolve(kind="student", preset="embedded", roles={"transfer": []}, objective={"ce": {}})
    assert (alone.teacher, alone.transfer_per_batch) == (None, 0)
