"""A whole study on the tiny cache: what it leaves, what it does not do twice, and that deaths change nothing."""

import csv
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dla_cache.errors import CheckpointError, TrainingError, WorkInterrupted
from tests.trainer.toy_study import ARMS, describe, make_plan, write
from trainer.config import resolve_run
from trainer.run import train_run
from trainer.run_folder import read_result
from trainer.study import StudyFolder, run_statuses, run_study
from trainer.study_records import IMAGE_COLUMNS, RUN_COLUMNS

ROOT = Path(__file__).parents[2]
VARYING = {"train_seconds", "images_per_s", "upstream_seconds"}
STORED = {"stored": {"like": "kd", "targets": {"views": 2}, "seeds": 1}}


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def lines_of(place):
    """The lines of a `runs.csv` without what no two attempts have in common."""
    return [{name: cell for name, cell in line.items() if name not in VARYING} for line in read(place / "runs.csv")]


@pytest.fixture(scope="module")
def study(tiny, tmp_path_factory):
    """A finished study of 13 runs, two of them shared by two arms; its folder, and the files of what it found."""
    out = tmp_path_factory.mktemp("study")
    folder = StudyFolder(make_plan(tiny, out, more={**STORED, "twin": {"run": ARMS["alone"]["run"]}}))
    told = []
    run_study(folder, n_processes=1, on_progress=lambda *state: told.append(state))
    assert told[-1][:2] == (13, 13)
    return folder, write(tiny, folder)


def test_every_run_is_done_once_and_has_its_line(study):
    folder, place = study
    lines = read(place / "runs.csv")
    assert tuple(lines[0]) == RUN_COLUMNS
    assert [(line["arm"], line["stage"]) for line in lines] == [
        *[("alone", "final")] * 2,
        ("teacher", "tuning"),
        *[("teacher", "final")] * 2,
        *[("kd", "tuning")] * 2,
        *[("kd", "final")] * 4,
        *[("stored", "final")] * 2,
        *[("twin", "final")] * 2,
    ]
    runs = sorted(path.name for path in (folder.plan.out / "runs").iterdir())
    assert runs == sorted({line["run"] for line in lines})
    assert [line["run"] for line in lines if line["arm"] == "twin"] == [lines[0]["run"], lines[1]["run"]]


def test_a_line_says_what_its_run_folder_says_and_tuning_has_no_test_score(study):
    folder, place = study
    (images,) = {tuple(line["image_id"] for line in read(place / "images.csv"))}
    assert images == tuple(f"test-{number}" for number in range(4))
    for line in read(place / "runs.csv"):
        result = read_result(folder.plan.folder_of(line["run"]))
        assert float(line["validation"]) == result.validation_score
        assert (line["trial"] == "") == (line["stage"] == "final") == (line["test"] != "") == (line["test_hits"] != "")
        if line["test"]:
            hits = f"{int(line['test_hits'], 16):08b}"[: len(images)]
            assert hits.count("1") / len(images) == float(line["test"]) == result.test_score
        shares = json.loads(line["gradient_shares"])
        assert sum(shares.values()) == pytest.approx(1)
        assert (line["steps"], line["inert"]) == ("4", "[]")


def test_the_cost_of_what_a_run_learns_from_counts_latents_teachers_and_targets(study):
    _, place = study
    lines = read(place / "runs.csv")
    cost = {arm: {float(line["upstream_seconds"]) for line in lines if line["arm"] == arm} for arm in ("alone", "kd")}
    assert cost["alone"] == {0}
    teachers = {line["seed"]: line for line in lines if line["arm"] == "teacher"}
    for line in lines:
        if line["arm"] in ("kd", "stored"):
            teacher = teachers[line["teacher_seed"]]
            least = float(teacher["train_seconds"]) + float(teacher["upstream_seconds"])
            surplus = float(line["upstream_seconds"]) - least
            assert surplus > 0.001 if line["arm"] == "stored" else abs(surplus) < 0.01


def test_the_selection_says_what_was_tried_and_what_was_chosen(study):
    _, place = study
    said = json.loads((place / "selection.json").read_text())
    assert [trial["settings"] for trial in said["kd"]["trials"]] == [
        {"objective.kd.temperature": value} for value in (1.0, 2.0)
    ]
    best = max(said["kd"]["trials"], key=lambda trial: trial["validation"])
    assert said["kd"]["chosen"] == said["stored"]["chosen"] == best["settings"]
    assert said["stored"]["like"] == "kd"
    chosen = {line["settings"] for line in read(place / "runs.csv") if (line["arm"], line["stage"]) == ("kd", "final")}
    assert [json.loads(text) for text in chosen] == [best["settings"]]


def test_a_study_that_is_done_does_nothing_and_a_changed_one_what_changed(tiny, study, tmp_path):
    folder, place = study
    times = {path: path.stat().st_mtime_ns for path in (folder.plan.out / "runs").rglob("*") if path.is_file()}
    assert run_study(StudyFolder(folder.plan), n_processes=1).is_whole
    assert {path: path.stat().st_mtime_ns for path in times} == times
    again = StudyFolder(make_plan(tiny, folder.plan.out, seeds=3, more={"twin": {"run": ARMS["alone"]["run"]}}))
    missing = [run.arm for run in again.state().runs if again.result(run.key) is None]
    assert missing == ["alone", "kd", "kd", "twin"]
    assert lines_of(write(tiny, folder)) == lines_of(place)


def weights_sha256(folder):
    return hashlib.sha256((folder / "best.safetensors").read_bytes()).hexdigest()


def test_a_run_is_the_same_to_the_byte_alone_and_after_others_in_a_worker(tiny, study, tmp_path, monkeypatch):
    folder, _ = study
    for run in folder.state().runs:
        if (run.arm, run.stage, run.seed, run.teacher_seed) in [("kd", "final", 1, 1), ("teacher", "final", 1, None)]:
            said = run.config.model_dump(mode="json", exclude_none=True) | {"output": str(tmp_path / run.arm)}
            train_run(resolve_run(said, base=Path(), where="test"))
            assert weights_sha256(tmp_path / run.arm) == weights_sha256(Path(run.config.output))


def test_a_run_that_fails_ends_the_study_with_its_name_and_the_others_stay(tiny, study, tmp_path):
    out = tmp_path / "study"
    shutil.copytree(study[0].plan.out, out)
    broken = {"run": {**ARMS["alone"]["run"], "labelled_per_batch": 99}}
    folder = StudyFolder(make_plan(tiny, out, more={"broken": broken}))
    with pytest.raises(TrainingError, match=r"run `broken, seed 0`: `roles.labelled` has 6 images") as failed:
        run_study(folder, n_processes=1)
    assert "--set arms.broken.run.labelled_per_batch=1" in failed.value.hint
    plan, statuses, failures = run_statuses(out)
    by_name = {line.name: statuses[line.key] for line in plan.runs}
    assert (by_name["broken, seed 0"], by_name["broken, seed 1"]) == ("failed", "waiting")
    assert [(one.message, one.hint) for one in failures.values()] == [(failed.value.message, failed.value.hint)]
    assert set(by_name.values()) == {"done", "failed", "waiting"}


def test_the_status_of_a_study_names_a_result_that_is_damaged(tiny, study, tmp_path):
    out = tmp_path / "study"
    shutil.copytree(study[0].plan.out, out)
    damaged = next((out / "runs").glob("*/result.json"))
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=str(damaged)):
        run_statuses(out)


def test_a_stop_is_no_failure_and_leaves_what_is_done(tiny, study, tmp_path):
    folder = StudyFolder(make_plan(tiny, tmp_path / "study"))
    with pytest.raises(WorkInterrupted) as stopped:
        run_study(folder, n_processes=1, should_stop=lambda: True)
    assert "same command" in stopped.value.hint
    _, statuses, failures = run_statuses(tmp_path / "study")
    assert not failures
    assert set(statuses.values()) <= {"waiting", "under way"}


def test_a_study_that_is_killed_and_then_one_of_its_workers_finds_the_same(tiny, study, tmp_path):
    more = {**STORED, "twin": {"run": ARMS["alone"]["run"]}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(describe(tiny, more=more), sort_keys=False))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cli.main", "study", "run", tmp_path / "study.yaml", "--out", out]
    killed = subprocess.Popen([*command, "--processes", "1"], env={**os.environ, "PYTHONPATH": str(ROOT)})
    until = time.monotonic() + 400
    while len(list((out / "runs").glob("*/result.json"))) < 3:
        assert killed.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    workers = []

    def kill_one(done, total, note):
        if done >= 6 and not workers:
            workers.extend(multiprocessing.active_children())
            os.kill(workers[0].pid, signal.SIGKILL)

    folder = StudyFolder(make_plan(tiny, out, more=more))
    assert run_study(folder, n_processes=1, on_progress=kill_one).is_whole
    assert workers
    assert lines_of(write(tiny, folder)) == lines_of(study[1])
    assert (out / "study" / "images.csv").read_bytes() == (study[1] / "images.csv").read_bytes()


def test_the_columns_are_those_that_the_report_reads():
    assert RUN_COLUMNS.index("label_fraction") == RUN_COLUMNS.index("trial") + 1
    assert IMAGE_COLUMNS == ("image_id", "label", "group")
