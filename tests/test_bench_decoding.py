"""The bench of what decoding costs: it builds with all three sources and tells their times."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_bench_tells_the_rate_of_the_plain_source_and_of_both_that_decode() -> None:
    command = [sys.executable, ROOT / "bench" / "decoding.py", "--rounds", "1", "--images", "5"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["embedded-depth", "embedded-depth-decoded", "embedded-depth-reencoded"]
    assert rows[0][4] == "1.00"
    assert all(float(row[1]) > 0 for row in rows)
