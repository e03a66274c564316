"""Whole runs with everything on that could make a resumed one differ: killed, and trained by two processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import trainer
from dla_cache.errors import CheckpointError, SpecError
from tests.trainer.test_processes import finish, free_port
from tests.trainer.toy import assert_same_run
from trainer.checkpoint import load_checkpoint
from trainer.config import resolve_run
from trainer.run import check_one_run, load_run, train_run
from trainer.run_folder import read_facts

ROOT = Path(trainer.__file__).parents[1]
LOOP = {"steps": 9, "evaluate_steps": 4, "checkpoint_steps": 3, "learning_rate": 0.01, "ema_decay": 0.5}
KILLED_AFTER = (2, 3, 5, 8)
TIMES = ("train_seconds", "images_per_s")


@pytest.fixture(scope="module")
def described(tiny, tmp_path_factory):
    """A student with dropout, crops, flips, averaged weights and accumulation, whose epochs end between checkpoints."""
    folder = tmp_path_factory.mktemp("resume")
    train_run(tiny.run("teacher", folder / "teacher"))

    def describe(output, **fields):
        run = tiny.describe("student", output, teacher=folder / "teacher", objective=tiny.objectives["messy"], **fields)
        return run | {"labelled_per_batch": 4, "loop": {**LOOP, "accumulation": 2, **fields.get("loop", {})}}

    return describe


@pytest.fixture(scope="module")
def unbroken(described, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    result = train_run(resolve_run(described(folder), base=Path(), where="test"))
    return folder, result.model_dump(exclude=set(TIMES))


@pytest.fixture(scope="module")
def killed(described, tmp_path_factory):
    """The same run in processes that SIGKILL ended after several steps."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "run.yaml").write_text(yaml.safe_dump(described(folder / "run")))
    # Another number of threads of torch's rounds differently.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    script = Path(__file__).with_name("resume_process.py")
    ended = subprocess.run(
        [sys.executable, script, folder / "run.yaml", *map(str, KILLED_AFTER)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.mark.parametrize("step", KILLED_AFTER)
def test_a_run_killed_after_any_step_resumes_bitwise_with_another_number_of_threads(described, unbroken, killed, step):
    folder, expected = unbroken
    run = described(killed / f"run-{step}", threads=3)
    result = train_run(resolve_run(run, base=Path(), where="test"), resume=True)
    assert result.model_dump(exclude=set(TIMES)) == expected
    assert_same_run(killed / f"run-{step}", folder)


def weights_of(path):
    """Of a checkpoint, trained and averaged. The keys' biases cancel in the softmax: their gradient is rounding, and
    Adam makes steps of it."""
    tensors = load_checkpoint(path)[0].items()
    return {name: value for name, value in tensors if "optimizer" not in name and "k_proj.bias" not in name}


def test_two_processes_of_the_command_make_the_run_of_one_and_the_first_alone_speaks(described, unbroken, tmp_path):
    folder, expected = unbroken
    run = described(tmp_path / "run", loop={"accumulation": 1})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "cli.main", "train", tmp_path / "run.yaml", "--json"],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    (said, progress, code), other = finish(started)
    assert code == 0, progress
    assert other == ("", "", 0)
    result = json.loads(said)
    assert "9/9 steps" in progress
    assert result["branches"] == expected["branches"]
    assert result["validation_score"] == expected["validation_score"]
    for name in ("best", "last"):
        ours, theirs = (weights_of(path / f"{name}.safetensors") for path in (tmp_path / "run", folder))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # float32 sums in another order, nine steps
    files = [{path.name for path in run.iterdir()} for run in (tmp_path / "run", folder)]
    assert files[0] == files[1]


def test_processes_that_were_started_with_different_runs_are_refused(described, unbroken, tmp_path):
    class Two:
        def gather(self, value):
            return [value, value | {"seed": 9, "loop": {**value["loop"], "steps": 8}}]

    config = resolve_run(described(tmp_path / "run"), base=Path(), where="test")
    with pytest.raises(SpecError, match="started with different `loop`, `seed`") as refused:
        check_one_run(Two(), config, read_facts(unbroken[0]))
    assert refused.value.hint


def test_a_run_whose_last_checkpoint_is_gone_is_not_begun_anew(described, unbroken, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unbroken[0], folder)
    for name in ("result.json", "last.safetensors"):
        (folder / name).unlink()
    told = (folder / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*last\.safetensors") as refused:
        train_run(resolve_run(described(folder), base=Path(), where="test"), resume=True)
    assert "previous.safetensors" in refused.value.hint
    assert (folder / "metrics.jsonl").read_text() == told


def test_batches_that_cannot_be_cut_into_equal_parts_are_refused_before_anything_is_written(described, tmp_path):
    run = described(tmp_path / "run", loop={"accumulation": 3})
    with pytest.raises(SpecError, match=r"4 images of `labelled`, which make no 3 equal parts") as refused:
        train_run(resolve_run(run, base=Path(), where="test"))
    assert refused.value.hint
    assert not (tmp_path / "run").exists()


def test_a_pickle_in_place_of_kept_weights_is_refused_and_never_run(unbroken, tmp_path):
    shutil.copytree(unbroken[0], tmp_path / "run")
    path = tmp_path / "run" / "best.safetensors"
    path.write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "ran").encode())
    with pytest.raises(CheckpointError, match=r"best\.safetensors` is no checkpoint of dla") as refused:
        load_run(tmp_path / "run")
    assert f"remove `{tmp_path / 'run'}`" in refused.value.hint
    assert not (tmp_path / "ran").exists()
