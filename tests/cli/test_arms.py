"""Several runs side by side, each a real process."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cli.arms import Arm, plan_arms, run_arms
from cli.demo import read_arms
from dla_cache.errors import CheckpointError, StoreError, TrainingError, WorkInterrupted

ROOT = Path(__file__).parents[2]


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


@pytest.fixture
def child(monkeypatch, tmp_path):
    """`child(code)`: from now on a run is a process that does `code` in its folder, by our own command line's name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.chdir(tmp_path)  # `python -m` looks here first

    def write(code):
        (tmp_path / "fake" / "cli").mkdir(parents=True)
        (tmp_path / "fake" / "cli" / "__init__.py").touch()  # without it an installed `cli` would come before ours
        start = "import os, signal, sys, time\nos.chdir(sys.argv[2].removesuffix('.yaml'))\n"
        (tmp_path / "fake" / "cli" / "main.py").write_text(start + code)

    return write


def make_arm(folder, name="probe"):
    return Arm(name, folder / f"{name}.yaml", folder / name, 6, None)


def failure_of(arm):
    with pytest.raises(TrainingError) as caught:
        run_arms([arm], n_processes=1, on_progress=lambda *_: None, should_stop=never)
    return caught.value


def test_a_run_that_ends_with_an_error_of_ours_is_told_in_its_own_words(child, tmp_path):
    child("print('train: 1/9 steps\\nerror: another process trains here\\nhint: wait for it'); sys.exit(1)")
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "train.log").write_text("error: of the attempt before\n")
    error = failure_of(make_arm(tmp_path))
    assert error.message == "run `probe`: another process trains here"
    assert error.hint.startswith("wait for it (the run is `dla train ")
    assert (tmp_path / "probe" / "train.log").read_text().startswith("error: of the attempt before\n")


def test_a_run_that_ends_with_a_bug_is_told_by_its_last_line_and_where_the_others_are(child, tmp_path):
    child("raise RuntimeError('no such luck')")
    error = failure_of(make_arm(tmp_path))
    assert error.message == "run `probe` ended with exit code 1: RuntimeError: no such luck"
    assert str(tmp_path / "probe" / "train.log") in error.hint


def test_a_run_that_is_killed_is_told_by_the_signal(child, tmp_path):
    child("os.kill(os.getpid(), signal.SIGKILL)")
    assert failure_of(make_arm(tmp_path)).message == "run `probe` was killed by SIGKILL"


def test_a_run_folder_that_cannot_be_made_is_one_error(child, tmp_path):
    (tmp_path / "probe").write_text("a file")
    with pytest.raises(StoreError, match="cannot be written"):
        run_arms([make_arm(tmp_path)], n_processes=1, on_progress=lambda *_: None, should_stop=never)


def test_a_run_that_the_same_signal_ended_has_not_failed(child, tmp_path):
    child("open('ended', 'w').close(); sys.exit(1)")
    answers = iter([False])

    def should_stop():
        until = time.monotonic() + 30
        while not (tmp_path / "probe" / "ended").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        return next(answers, True)

    with pytest.raises(WorkInterrupted):
        run_arms([make_arm(tmp_path)], n_processes=1, on_progress=lambda *_: None, should_stop=should_stop)


def test_ctrl_c_asks_each_run_once_and_waits_until_it_has_saved(child, tmp_path):
    child("""
asked = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: asked.append(signal.Signals(number).name))
open("started", "w").close()
while not asked:
    time.sleep(0.01)
time.sleep(0.3)  # time for a second signal to come, and to save
with open("checkpoint", "w") as file:
    file.write(" ".join(asked))
sys.exit(1)
""")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import cli.main
from pathlib import Path
from cli.arms import Arm, run_arms
from cli.signals import stop_on_signals
def compare():
    arms = [Arm(name, Path(name + ".yaml").absolute(), Path(name), 6, None) for name in ("probe", "teacher")]
    with stop_on_signals() as should_stop:
        run_arms(arms, n_processes=2, on_progress=lambda *_: None, should_stop=should_stop)
cli.main.app.command()(compare)
cli.main.main()
"""
    command = [sys.executable, "-c", code, "compare"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    folders = [tmp_path / name for name in ("probe", "teacher")]
    while not all((folder / "started").exists() for folder in folders):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all that the command has started in its session
    _, err = process.communicate(timeout=30)
    assert [(folder / "checkpoint").read_text() for folder in folders] == ["SIGTERM", "SIGTERM"]
    assert (process.returncode, err.count("error: interrupted"), err.count("hint: ")) == (1, 1, 1)
    assert "Traceback" not in err


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
