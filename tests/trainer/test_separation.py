"""Training needs the cache and nothing that made it: no generator, no embedded data, no truth."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import trainer
from trainer.run_folder import read_result

SCRIPT = Path(__file__).with_name("separation_process.py")


@pytest.fixture(scope="module")
def separated(tiny, tmp_path_factory):
    """A probe, a teacher and a student, trained in a process in which sources cannot be imported."""
    folder = tmp_path_factory.mktemp("separated")
    data = shutil.copytree(tiny.images, folder / "data")
    # Whoever reads it, by whatever way past the hook on `open`, fails.
    (data / "truth.parquet").write_bytes(b"no Parquet file")
    student = tiny.describe(
        "student", folder / "student", teacher=folder / "teacher", objective=tiny.objectives["messy"]
    )
    runs = [tiny.describe("probe", folder / "probe"), tiny.describe("teacher", folder / "teacher"), student]
    (folder / "runs.json").write_text(json.dumps([{**run, "images": str(data)} for run in runs]))
    process = subprocess.run(
        [sys.executable, SCRIPT, folder / "runs.json"],
        env={**os.environ, "PYTHONPATH": str(Path(trainer.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return SimpleNamespace(folder=folder, **json.loads(process.stdout))


@pytest.mark.parametrize("name", ["probe", "teacher", "student"])
def test_a_run_trains_where_no_generator_can_be_imported(separated, name):
    assert separated.importable == []
    assert read_result(separated.folder / name).test_images == 4


def test_no_run_opens_the_truth(separated):
    assert [path for path in separated.opened if path.endswith("truth.parquet")] == []
    # The hook was awake: it saw the images.
    assert {Path(path).stem for path in separated.opened if path.endswith(".png")} >= {"labelled-0", "test-3"}
