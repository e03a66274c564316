"""Several runs side by side, each a real process."""

import pytest
import yaml

from cli.arms import Arm, run_arms
from dla_cache.errors import TrainingError, WorkInterrupted


def write_arm(tiny, folder, name, kind, *, teacher=None, **fields):
    """A run file on the tiny cache, and the arm that trains it into `folder/name`."""
    learns_from = folder / teacher if teacher is not None else None
    described = tiny.describe(kind, folder / name, teacher=learns_from, **fields)
    folder.mkdir(exist_ok=True)
    run_file = folder / f"{name}.yaml"
    run_file.write_text(yaml.safe_dump({key: value for key, value in described.items() if value is not None}))
    return Arm(name, run_file, folder / name, 6, learns_from)


def never():
    return False


def test_a_student_waits_for_the_run_it_learns_from_and_results_come_in_the_order_asked_for(tiny, tmp_path):
    student = write_arm(tiny, tmp_path, "kd", "student", teacher="probe", objective=tiny.objectives["kd"])
    probe = write_arm(tiny, tmp_path, "probe", "probe")
    told = []
    results = run_arms(
        [student, probe], n_processes=2, on_progress=lambda *state: told.append(state), should_stop=never
    )
    assert [result.kind for result in results] == ["student", "probe"]
    assert not any("kd" in names and "probe" in names for _, _, names in told)
    assert told[-1][:2] == (12, 12)


def test_a_run_that_fails_ends_the_comparison_with_what_it_said(tiny, tmp_path):
    arm = write_arm(tiny, tmp_path, "probe", "probe", roles={"test": ["no-such-split"]})
    with pytest.raises(TrainingError, match="no-such-split") as caught:
        run_arms([arm], n_processes=1, on_progress=lambda *_: None, should_stop=never)
    assert "dla train" in (caught.value.hint or "")


def test_after_a_stop_the_next_call_goes_on(tiny, tmp_path):
    arm = write_arm(tiny, tmp_path, "probe", "probe")
    with pytest.raises(WorkInterrupted):
        run_arms([arm], n_processes=1, on_progress=lambda *_: None, should_stop=lambda: True)
    (result,) = run_arms([arm], n_processes=1, on_progress=lambda *_: None, should_stop=never)
    assert result.kind == "probe"
