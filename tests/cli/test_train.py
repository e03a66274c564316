"""`dla train`: what it takes, what it prints, how it ends, and that it can be interrupted and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import cli
from trainer.checkpoint import load_checkpoint
from trainer.config import PLACES
from trainer.run import train_run


@pytest.fixture
def run_file(tiny, tmp_path):
    """`runs/probe.yaml`: a probe of six steps, its paths relative to the file."""
    folder = tmp_path / "runs"
    folder.mkdir()
    value = tiny.describe("probe", "out") | {
        "store": os.path.relpath(tiny.store, folder),
        "images": os.path.relpath(tiny.images, folder),
    }
    (folder / "probe.yaml").write_text(yaml.safe_dump(value))
    return folder / "probe.yaml"


def assert_one_message(ended, *words):
    """One `error:` with a `hint:`, on stderr, without a traceback."""
    assert ended.exit_code == 1
    assert ended.stdout == ""
    assert ended.stderr.count("error: ") == ended.stderr.count("hint: ") == 1
    assert "Traceback" not in ended.stderr
    for word in words:
        assert word in ended.stderr


def test_a_run_file_is_trained_and_what_was_measured_is_shown(dla, run_file):
    ended = dla("train", run_file)
    assert ended.exit_code == 0
    assert "validation top-1" in ended.stdout
    assert "95 % interval" in ended.stdout
    assert "positions of" not in ended.stdout  # that is for `--json`
    assert f"run folder {run_file.parent / 'out'}" in ended.stdout
    assert "6/6 steps" in ended.stderr
    assert (run_file.parent / "out" / "result.json").exists()


def test_json_is_the_result_and_nothing_else(dla, run_file):
    ended = dla("train", run_file, "--json")
    assert json.loads(ended.stdout) == json.loads((run_file.parent / "out" / "result.json").read_text())


def test_a_kind_and_flags_make_a_run_without_a_file(dla, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ("image_size=8", "labelled_per_batch=3", "loop.steps=2", "model.hidden=8")
    places = ("--store", tiny.store, "--images", tiny.images, "--out", "here")
    ended = dla("train", "probe", *places, "--seed", 4, *(part for name in settings for part in ("--set", name)))
    assert ended.exit_code == 0, ended.stderr
    config = yaml.safe_load((tmp_path / "here" / "config.yaml").read_text())
    assert (config["kind"], config["seed"], config["loop"]["steps"]) == ("probe", 4, 2)


def test_a_flag_starts_from_here_and_a_path_in_the_file_from_the_file(dla, run_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(dla("train", "runs/probe.yaml", "--out", "elsewhere", "--dry-run").stdout)
    assert config["output"] == str(tmp_path / "elsewhere")
    assert (
        Path(config["store"]).resolve() == (run_file.parent / yaml.safe_load(run_file.read_text())["store"]).resolve()
    )


def test_set_comes_over_the_file_and_the_file_over_the_preset(dla, run_file):
    value = yaml.safe_load(run_file.read_text()) | {"preset": "embedded", "self_training": None}
    value["roles"], value["transfer_per_batch"] = {"transfer": []}, 0
    run_file.write_text(yaml.safe_dump(value))
    config = yaml.safe_load(dla("train", run_file, "--set", "loop.steps=9", "--dry-run").stdout)
    assert config["loop"]["steps"] == 9
    assert config["loop"]["evaluate_steps"] == 2
    assert config["loop"]["warmup_steps"] == 20


@pytest.mark.parametrize("order", [1, -1])
def test_one_field_of_the_objective_is_set_within_that_of_the_preset_or_of_the_command_line(dla, tmp_path, order):
    def objective_of(*settings):
        options = [one for setting in settings[::order] for one in ("--set", setting)]
        fixed = ("--preset", "embedded", "--store", tmp_path, "--out", tmp_path, "--teacher", tmp_path)
        shown = dla("train", "student", *fixed, *options, "--dry-run", "--json").stdout
        return {name: term for name, term in json.loads(shown)["objective"].items() if term is not None}

    of_preset = objective_of("seed=1", "objective.kd.temperature=4")
    assert of_preset == {"ce": {"weight": 0.25}, "kd": {"weight": 0.75, "temperature": 4}}
    said = objective_of("objective={kd: {}}", "objective.kd.temperature=4")
    assert said == {"kd": {"weight": 0.75, "temperature": 4}}


def test_a_dry_run_prints_a_config_that_resolves_to_itself_and_writes_nothing(dla, run_file):
    resolved = dla("train", run_file, "--dry-run")
    assert resolved.exit_code == 0
    assert not (run_file.parent / "out").exists()
    (run_file.parent / "resolved.yaml").write_text(resolved.stdout)
    assert dla("train", run_file.parent / "resolved.yaml", "--dry-run").stdout == resolved.stdout
    dla("train", run_file)
    saved, printed = (
        yaml.safe_load((run_file.parent / "out" / "config.yaml").read_text()),
        yaml.safe_load(resolved.stdout),
    )
    assert saved | dict.fromkeys(PLACES) == printed | dict.fromkeys(PLACES)


def test_a_dry_run_with_json_prints_the_same_as_one_json_object(dla, run_file):
    printed = dla("train", run_file, "--dry-run", "--json").stdout
    assert json.loads(printed) == yaml.safe_load(dla("train", run_file, "--dry-run").stdout)


def test_a_student_is_exported_without_a_second_progress_bar(dla, tiny, tmp_path):
    run_file = tmp_path / "student.yaml"
    run_file.write_text(yaml.safe_dump(tiny.describe("student", "out")))
    ended = dla("train", run_file)
    assert ended.exit_code == 0
    assert [line for line in ended.stderr.splitlines() if not line.startswith("train student: ")] == []


def test_a_device_that_is_not_here_is_one_message_and_no_run_is_begun(dla, run_file):
    assert_one_message(dla("train", run_file, "--set", "device=nonsense"), "device `nonsense`")
    assert not (run_file.parent / "out").exists()


def test_a_folder_in_use_is_one_message(dla, run_file):
    dla("train", run_file)
    assert_one_message(dla("train", run_file), "already holds a run", "--resume")
    assert dla("train", run_file, "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("loop.learning_rte=1", "`loop.learning_rte`"),
        ("store=nothing.zarr", "nothing.zarr"),
        ("roles.test=[nothing]", "`nothing`"),
        ("model.hidden=-1", "`hidden`"),
        ("labelled_per_batch", "is not `path=value`"),
    ],
)
def test_what_does_not_fit_is_one_message(dla, run_file, setting, word):
    assert_one_message(dla("train", run_file, "--set", setting), word)


def test_images_that_are_not_where_the_run_says_are_one_message(dla, tiny, tmp_path):
    run = tmp_path / "student.yaml"
    run.write_text(yaml.safe_dump(tiny.describe("student", "out") | {"store": str(tiny.store), "images": "nothing"}))
    assert_one_message(dla("train", run), "cannot be read")


def test_a_run_file_that_is_missing_or_no_mapping_is_one_message(dla, tmp_path):
    assert_one_message(dla("train", tmp_path / "nothing.yaml"), "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert_one_message(dla("train", tmp_path / "list.yaml"), "holds no mapping")


def test_an_output_that_cannot_be_written_is_one_message(dla, run_file):
    (run_file.parent / "out").write_text("a file")
    assert_one_message(dla("train", run_file), "cannot be written")


@pytest.mark.parametrize("arguments", [["train"], ["train", "probe", "--sede", "3"], ["train", "probe", "--seed", "x"]])
def test_wrong_usage_ends_with_2(dla, arguments):
    ended = dla(*arguments)
    assert ended.exit_code == 2
    assert ended.stdout == ""


def start(run_file, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "cli.main", "train", run_file, "--json", *options],
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def n_lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def test_ctrl_c_and_sigterm_keep_the_run_and_resume_ends_it_as_if_unbroken(dla, tiny, tmp_path):
    fields = {"loop": {"steps": 1200, "evaluate_steps": 50, "ema_decay": 0.9}}
    run_file = tmp_path / "probe.yaml"
    run_file.write_text(yaml.safe_dump(tiny.describe("probe", "run", **fields)))
    metrics = tmp_path / "run" / "metrics.jsonl"
    for options, number in (((), signal.SIGINT), (("--resume",), signal.SIGTERM)):
        lines = n_lines(metrics)
        process = start(run_file, *options)
        while n_lines(metrics) <= lines:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (1, "")
        assert "training stopped at step" in err
        assert "hint: run the same command with `--resume`" in err
        assert "Traceback" not in err
    ended = dla("train", run_file, "--resume", "--json")
    assert ended.exit_code == 0, ended.stderr
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [*range(50, 1201, 50)]
    train_run(tiny.run("probe", tmp_path / "unbroken", **fields))
    kept, expected = (load_checkpoint(tmp_path / name / "last.safetensors")[0] for name in ("run", "unbroken"))
    assert [name for name in expected if not torch.equal(kept[name], expected[name])] == []
