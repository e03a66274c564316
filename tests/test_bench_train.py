"""The bench of training itself: it runs, and its ratios follow from its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_bench_reads_the_same_targets_four_ways_and_prints_ratios(tmp_path: Path) -> None:
    command = [
        *(sys.executable, ROOT / "bench" / "train.py", "--only", "rows", "--rounds", "1", "--images", "256"),
        *("--json", tmp_path / "figures.json"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "load" in done.stdout.splitlines()[0]
    found = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert list(found) == ["dla", ".pt", "safetensors", "npy"]
    for one in found.values():
        assert one["ratio"] == pytest.approx(one["us"] / found["dla"]["us"])
    assert found[".pt"]["ratio"] > 3  # many times that on a quiet machine
