"""The store bench itself: it runs, it checks what it measures, and its verdicts follow from its figures.

Peers need interpreters of their own, made with pip, so they do not take part here.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("stores")


def test_the_bench_measures_us_and_says_how_each_goal_came_out(tmp_path: Path) -> None:
    command = [
        *(sys.executable, ROOT / "bench" / "stores.py", "--folder", tmp_path, "--images", "64", "--rounds", "1"),
        *("--readers", "dla, zarr", "memcpy", "--tasks", "latents"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("64 samples")
    assert "WARM page cache" in lines[0]
    assert "load average" in lines[0]
    assert sum(line.startswith(("dla, zarr ", "memcpy of mapped files ")) for line in lines) == 2
    (goal,) = [line for line in lines if line.startswith("latents: dla, zarr / memcpy of mapped files")]
    assert goal.split()[-1] in ("reached", "MISSED")


@pytest.mark.parametrize("place", range(4))
def test_a_reader_that_hands_out_other_samples_stops_the_bench(bench: ModuleType, place: int) -> None:
    wanted = {"files": [64, 10, 20, 30]}
    bench.compare("some reader", "files", wanted["files"], wanted)
    found = list(wanted["files"])
    found[place] += 1
    with pytest.raises(RuntimeError, match="`some reader` hands out other samples"):
        bench.compare("some reader", "files", found, wanted)


def test_a_goal_is_held_against_the_fastest_reader_by_the_rounds_median_ratio(bench: ModuleType) -> None:
    report = importlib.import_module("store_report")
    rates = {
        report.OURS: [100.0, 60.0, 100.0],
        "litdata, tuned": [10.0, 10.0, 10.0],
        "safetensors, mapped": [40.0, 15.0, 25.0],
    }
    what, found, wanted, verdict = report.goal_rows("files", rates)[0]
    assert what == "files: dla, zarr / safetensors, mapped, the fastest"
    assert (found, wanted, verdict) == ("4.00 x", ">= 3 x", "reached")
    rates["safetensors, mapped"] = [40.0, 25.0, 40.0]
    assert report.goal_rows("files", rates)[0][3] == "MISSED"
