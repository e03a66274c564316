"""The bench of builds itself: it runs, it looks at all ways, and its verdicts follow from its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_bench_measures_three_ways_and_says_how_each_goal_came_out(tmp_path: Path) -> None:
    command = [
        *(sys.executable, ROOT / "bench" / "build.py", "--rounds", "1", "--seconds", "0.1", "--images", "3000"),
        *("--folder", tmp_path, "--json", tmp_path / "figures.json"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "load average" in lines[0]
    assert [line.split("  ")[0] for line in lines[2:8]] == ["JPEG, 20 ms a batch"] * 3 + ["raw, 5 ms a batch"] * 3
    found = json.loads((tmp_path / "figures.json").read_text())
    for task, goals in (("JPEG, 20 ms a batch", (0.98, 1.0)), ("raw, 5 ms a batch", (0.98, 0.2))):
        (line,) = [line for line in lines if line.startswith(task) and "  dla  " in line]
        (busy,), (cpu_ms,) = (found["ways"][task]["dla"][name] for name in ("busy", "cpu_ms"))
        is_reached = [busy >= goals[0], cpu_ms <= goals[1]]
        assert [word == "reached" for word in line.split() if word in ("reached", "MISSED")] == is_reached
    (ratio,) = found["two"]
    assert lines[8].endswith("reached" if ratio <= 1.05 else "MISSED")
    assert found["memory"]["at most"] >= found["memory"]["at a tenth"]
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
