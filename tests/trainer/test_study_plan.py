"""Which runs a study is made of, and what makes one the same as another."""

import shutil
from collections import Counter
from dataclasses import replace

import pytest
from transformers import ViTConfig, ViTForImageClassification

from dla_cache.errors import SpecError
from tests.trainer.toy_study import ARMS, KD, make_plan


def all_runs(plan, validation=lambda key: 0.5):
    state = plan.state(validation)
    assert state.is_whole
    return state.runs


def keys(plan, arm, stage="final"):
    return [run.key for run in all_runs(plan) if (run.arm, run.stage) == (arm, stage)]


def test_arms_below_a_teacher_are_crossed_with_its_seeds_and_others_are_not(tiny):
    more = {"grandchild": {"run": ARMS["kd"]["run"], "learns_from": "kd"}}
    runs = all_runs(make_plan(tiny, None, more=more))
    final = {
        name: [(r.teacher_seed, r.seed) for r in runs if (r.arm, r.stage) == (name, "final")]
        for name in ("alone", "teacher", "kd", "grandchild")
    }
    crossed = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert final == {
        "alone": [(None, 0), (None, 1)],
        "teacher": [(None, 0), (None, 1)],
        "kd": crossed,
        "grandchild": crossed,
    }
    for run in runs:
        if run.arm == "kd":
            assert (run.upstream.arm, run.upstream.seed) == ("teacher", run.teacher_seed)
        if run.arm == "grandchild":
            assert (run.upstream.arm, run.upstream.teacher_seed, run.upstream.seed) == (
                "kd",
                run.teacher_seed,
                run.seed,
            )


def test_tuning_reads_no_test_split_and_has_seeds_and_a_teacher_of_its_own(tiny):
    runs = all_runs(make_plan(tiny, None))
    tuning = [run for run in runs if run.stage == "tuning"]
    assert {run.config.roles.test for run in tuning} == {()}
    assert {run.config.roles.test for run in runs if run.stage == "final"} == {("test",)}
    assert {run.seed for run in tuning} == {1000}
    assert Counter(run.arm for run in tuning) == {"teacher": 1, "kd": 2}
    assert not {run.key for run in tuning} & {run.key for run in runs if run.stage == "final"}


def test_final_runs_wait_for_tuning_and_have_what_it_chose(tiny):
    plan = make_plan(tiny, None)
    state = plan.state(lambda key: None)
    assert not state.is_whole
    assert [run for run in state.runs if (run.arm, run.stage) == ("kd", "final")] == []
    (second,) = {run.key for run in state.runs if run.settings == {"objective.kd.temperature": 2.0}}
    state = plan.state(lambda key: float(key == second))
    assert state.is_whole
    assert {r.config.objective.kd.temperature for r in state.runs if (r.arm, r.stage) == ("kd", "final")} == {2.0}


def test_an_arm_like_a_tuned_one_has_its_settings_over_its_own_fields(tiny):
    more = {"kd-long": {"like": "kd", "run": {"loop": {"steps": 5}}}}
    plan = make_plan(tiny, None, more=more)
    (second,) = {
        run.key for run in plan.state(lambda key: None).runs if run.settings == {"objective.kd.temperature": 2.0}
    }
    final = [run for run in all_runs(plan, lambda key: float(key == second)) if run.arm == "kd-long"]
    assert {(run.config.objective.kd.temperature, run.config.loop.steps) for run in final} == {(2.0, 5)}
    assert {run.stage for run in final} == {"final"}


def test_two_arms_that_ask_for_the_same_run_share_it_and_another_setting_is_another_run(tiny):
    run = ARMS["alone"]["run"]
    plan = make_plan(tiny, None, more={"twin": {"run": run}, "other": {"run": {**run, "labelled_per_batch": 2}}})
    assert keys(plan, "alone") == keys(plan, "twin")
    assert not set(keys(plan, "alone")) & set(keys(plan, "other"))


def test_runs_of_other_pretrained_weights_are_other_runs_wherever_these_lie(tiny, tmp_path):
    def students_of(place):
        run = {**ARMS["alone"]["run"], "model": {"pretrained": str(place)}}
        return keys(make_plan(tiny, None, more={"new": {"run": run}}), "new")

    for name in ("one", "other"):
        size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        ViTForImageClassification(ViTConfig(**size, image_size=8, patch_size=4)).save_pretrained(tmp_path / name)
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    assert students_of(tmp_path / "one") == students_of(tmp_path / "moved")
    assert not set(students_of(tmp_path / "one")) & set(students_of(tmp_path / "other"))
    # A dry run needs no weights.
    assert not set(students_of("owner/one")) & set(students_of("owner/other"))


def test_a_planned_pair_with_unequal_shares_of_the_labels_is_refused_before_anything_is_trained(tiny):
    few = {"few": {"run": {**ARMS["alone"]["run"], "label_fraction": 0.5}}}
    make_plan(tiny, None, more=few)
    with pytest.raises(SpecError, match=r"`alone` of 1 of the labels and `few` of 0\.5"):
        make_plan(tiny, None, more=few, comparisons=[["alone", "few"]])


def test_a_changed_teacher_changes_its_students_and_nobody_else(tiny):
    longer = {"teacher": {**ARMS["teacher"], "run": {"kind": "teacher", "loop": {"steps": 5}}}}
    plan, changed = make_plan(tiny, None), make_plan(tiny, None, more=longer)
    assert keys(plan, "alone") == keys(changed, "alone")
    for arm in ("teacher", "kd"):
        assert not set(keys(plan, arm)) & set(keys(changed, arm))


def test_other_latents_change_who_reads_them_and_other_rows_everyone(tiny, tmp_path):
    plan = make_plan(tiny, tmp_path)
    seeded = make_plan(tiny, tmp_path, store=tiny.build(tiny.manifest, tmp_path / "seeded.zarr", seed=1))
    assert keys(plan, "alone") == keys(seeded, "alone")
    for arm in ("teacher", "kd"):
        assert not set(keys(plan, arm)) & set(keys(seeded, arm))
    turned = make_plan(tiny, tmp_path, store=tiny.build(tiny.reverse(tiny.manifest), tmp_path / "turned.zarr"))
    assert not set(keys(plan, "alone")) & set(keys(turned, "alone"))


def test_label_fractions_multiply_final_runs_of_teachers_too_and_leave_tuning_alone(tiny):
    runs = all_runs(make_plan(tiny, None, label_fractions=[0.5, 1.0]))
    final = [run for run in runs if run.stage == "final"]
    assert Counter((run.arm, run.config.label_fraction) for run in final) == {
        (arm, share): n for arm, n in (("alone", 2), ("teacher", 2), ("kd", 4)) for share in (0.5, 1.0)
    }
    assert all(run.upstream.config.label_fraction == run.config.label_fraction for run in final if run.upstream)
    assert {run.config.label_fraction for run in runs if run.stage == "tuning"} == {1.0}


def test_students_of_stored_targets_share_those_of_a_teacher_and_name_no_teacher(tiny):
    more = {"stored": {"like": "kd", "targets": {"views": 2}}}
    runs = [run for run in all_runs(make_plan(tiny, None, more=more)) if (run.arm, run.stage) == ("stored", "final")]
    assert len(runs) == 4
    assert len({run.targets.key for run in runs}) == 2
    for run in runs:
        assert (run.config.teacher, run.config.targets) == (None, run.targets.config.output)
        assert run.targets.config.teacher == run.upstream.config.output
        assert run.targets.config.view.count == 2
        assert run.targets.config.view.scale_min == 0.5


def test_targets_of_other_latents_are_other_targets_and_their_students_other_runs(tiny, tmp_path):
    """The teacher is that of the real store in both: it is asked about the latents of the student's store."""
    stored = {"like": "kd", "targets": {"views": 2}}
    more = {"stored": stored, "of-noise": {**stored, "store": "noise"}}
    plan = make_plan(tiny, tmp_path, more=more, stores={"noise": {"control": "gaussian"}})
    plan.stores["noise"] = replace(plan.stores[None], latents_sha256={"depth": "other"})
    assert not set(keys(plan, "stored")) & set(keys(plan, "of-noise"))
    targets = {(run.arm, run.targets.key) for run in all_runs(plan) if run.targets is not None}
    assert len({key for _, key in targets}) == len(targets)


def test_settings_that_do_not_fit_an_arm_that_takes_them_are_refused_before_anything_is_trained(tiny):
    tuned = {"run": ARMS["alone"]["run"], "tune": {"view.scale_min": {"values": [0.5, 0.9]}}}
    more = {"tuned": tuned, "narrow": {"like": "tuned", "run": {"view": {"scale_max": 0.7}}}}
    with pytest.raises(SpecError, match=r"arm `narrow` may try view.scale_min = 0.9"):
        make_plan(tiny, None, more=more)


@pytest.mark.parametrize(
    ("arm", "told"),
    [
        ({"run": {"kind": "student", "objective": {"ce": {}}, "lop": {}}}, "did you mean `loop`"),
        ({"run": {"kind": "teacher"}, "learns_from": "teacher"}, "no objective learns from it"),
        ({"run": {"kind": "student", "objective": KD}}, "the objective learns from a `teacher`"),
        (
            {"run": ARMS["kd"]["run"], "learns_from": "teacher", "tune": {"loop.stepz": {"values": [1, 2]}}},
            "may try loop.stepz = 1: ",
        ),
        (
            {
                "run": ARMS["kd"]["run"],
                "learns_from": "teacher",
                "tune": {"objective.messy.weight": {"values": [1, 2]}},
            },
            "the run has no `objective.messy`",
        ),
        (
            {
                "run": {"kind": "student", "objective": {"ce": {}}},
                "tune": {"loop.warmup_steps": {"values": [1, 3], "extend": True}},
            },
            "may try loop.warmup_steps = 0.333",
        ),
        ({"run": {"kind": "student", "objective": {"ce": {}}, "roles": {"test": ["validation"]}}}, "plays two"),
        ({"run": {**ARMS["alone"]["run"], "roles": {"test": ["transfer"]}}}, "arm `new` is tested on ['transfer']"),
    ],
)
def test_an_arm_that_makes_no_run_is_refused_with_its_name_and_why(tiny, arm, told):
    with pytest.raises(SpecError) as refused:
        make_plan(tiny, None, more={"new": arm}, tuning={"trials": 2, "seeds": 1, "extensions": 1})
    assert told in refused.value.message
    assert "new" in refused.value.message
    assert refused.value.hint


def test_a_preset_s_views_give_way_to_those_of_stored_targets(tiny):
    more = {
        "teacher": {"run": {"kind": "teacher", "preset": "embedded"}, "role": "teacher"},
        "new": {"run": {"kind": "student", "preset": "embedded"}, "learns_from": "teacher", "targets": {"views": 3}},
    }
    more |= {name: {"run": {"kind": "probe"}} for name in ("alone", "kd")}
    run = next(run for run in all_runs(make_plan(tiny, None, base={}, more=more)) if run.arm == "new")
    assert "view" not in run.config.model_fields_set
    assert run.targets.config.view.scale_min == 0.75
