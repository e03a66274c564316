"""Several runs side by side, in real processes."""

import shutil

import pytest
import yaml

from cli.arms import Arm, plan_arms, run_arms
from cli.demo import read_arms
from dla_cache.errors import CheckpointError, TrainingError, WorkInterrupted
from trainer.config import resolve_run


def write_arm(tiny, folder, name, kind, *, teacher=None, **fields):
    """A run file on the tiny cache, and the arm that trains it into `folder/name`."""
    learns_from = folder / teacher if teacher is not None else None
    described = tiny.describe(kind, folder / name, teacher=learns_from, **fields)
    folder.mkdir(exist_ok=True)
    run_file = folder / f"{name}.yaml"
    run_file.write_text(yaml.safe_dump({key: value for key, value in described.items() if value is not None}))
    config = resolve_run(yaml.safe_load(run_file.read_text()), base=folder, where=name)
    return Arm(name, run_file, folder / name, config, learns_from)


def run_all(arms, *, n_processes=1, on_progress=lambda *_: None, should_stop=lambda: False):
    logs = arms[0].folder.parent / "logs"
    return run_arms(arms, logs=logs, n_processes=n_processes, on_progress=on_progress, should_stop=should_stop)


def test_a_student_waits_for_the_run_it_learns_from_and_results_come_in_the_order_asked_for(tiny, tmp_path):
    student = write_arm(tiny, tmp_path, "kd", "student", teacher="probe", objective=tiny.objectives["kd"])
    probe = write_arm(tiny, tmp_path, "probe", "probe")
    told = []
    results = run_all([student, probe], n_processes=2, on_progress=lambda *state: told.append(state))
    assert [result.kind for result in results] == ["student", "probe"]
    assert not any("kd" in names and "probe" in names for _, _, names in told)
    assert told[-1][:2] == (12, 12)


def test_a_run_that_fails_ends_the_comparison_with_what_it_said(tiny, tmp_path):
    arm = write_arm(tiny, tmp_path, "probe", "probe", roles={"test": ["no-such-split"]})
    with pytest.raises(TrainingError, match="no-such-split") as caught:
        run_all([arm])
    assert str(arm.run_file) in caught.value.message


def test_a_run_folder_that_cannot_be_made_is_one_error(tiny, tmp_path):
    arm = write_arm(tiny, tmp_path, "probe", "probe")
    arm.folder.write_text("a file")
    with pytest.raises(TrainingError, match="cannot be written") as caught:
        run_all([arm])
    assert caught.value.hint


def test_after_a_stop_the_next_call_goes_on(tiny, tmp_path):
    arm = write_arm(tiny, tmp_path, "probe", "probe")
    with pytest.raises(WorkInterrupted):
        run_all([arm], should_stop=lambda: True)
    (result,) = run_all([arm])
    assert result.kind == "probe"


def begin(folder, *, seed=0, steps=None):
    """The demo's planned arms, of which probe and teacher have been begun."""
    arms = plan(folder, seed=seed, steps=steps)
    for arm in arms[:2]:
        arm.folder.mkdir(parents=True)
        shutil.copy(arm.run_file, arm.folder / "config.yaml")
    return arms


def plan(folder, *, seed=0, steps=None):
    return plan_arms(read_arms(), folder, store=folder / "cache.zarr", images=folder / "data", seed=seed, steps=steps)


def test_arms_begun_with_other_settings_are_refused_and_no_run_file_is_changed(tmp_path):
    arms = begin(tmp_path, steps=20)
    before = [arm.run_file.read_bytes() for arm in arms]
    with pytest.raises(CheckpointError, match="`seed` is 0 there, 5 here") as refused:
        plan(tmp_path, seed=5, steps=20)
    assert f"`{arms[0].folder}`, `{arms[1].folder}` hold a run with other settings" in refused.value.message
    assert "another `--out`" in refused.value.hint
    with pytest.raises(CheckpointError, match=r"`loop\.steps` is 20 there, 960 here"):
        plan(tmp_path)
    assert [arm.run_file.read_bytes() for arm in arms] == before


def test_arms_begun_with_the_same_settings_go_on_wherever_their_folder_and_device_are(tmp_path):
    begin(tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    config = tmp_path / "after" / "runs" / "probe" / "config.yaml"
    config.write_text(config.read_text() + "device: cuda\n")
    assert [arm.name for arm in plan(tmp_path / "after")] == [*read_arms()]
