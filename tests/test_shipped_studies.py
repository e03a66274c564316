"""The studies in `docs/studies` say what their plain files say: tables, verdicts, and the numbers of their pages."""

import csv
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app

ROOT = Path(__file__).parents[1]
STUDIES = sorted(path.parent for path in (ROOT / "docs" / "studies").glob("*/runs.csv"))
PLAIN_FILES = ("spec.yaml", "runs.csv", "images.csv", "audit.json")

each_study = pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Study → a folder with what the one command makes of its plain files alone, and what it says as JSON."""
    made = {}
    for study in STUDIES:
        folder = tmp_path_factory.mktemp(study.name)
        for name in PLAIN_FILES:
            shutil.copy(study / name, folder)
        result = CliRunner().invoke(app, ["study", "report", str(folder), "--json"])
        assert result.exit_code == 0, result.output
        made[study.name] = folder, json.loads(result.stdout)
    return made


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_registered_study_ships() -> None:
    assert "relief-digits" in [study.name for study in STUDIES]


@each_study
def test_a_shipped_study_is_the_one_that_was_registered(study: Path) -> None:
    assert (study / "spec.yaml").read_bytes() == (ROOT / "manifests" / "studies" / f"{study.name}.yaml").read_bytes()


@each_study
def test_one_command_makes_the_table_of_a_shipped_study_from_its_runs(study: Path, reports: Any) -> None:
    shipped, made = lines_of(study / "tables.csv"), lines_of(reports[study.name][0] / "tables.csv")
    assert len(shipped) == len(made) > 0
    for there, here in zip(shipped, made, strict=True):
        values = there.pop("value"), here.pop("value")
        assert there == here
        try:
            numbers = [float(value) for value in values]
        except ValueError:
            assert values[0] == values[1], there
        else:  # another processor may round the last digits in another way
            assert math.isclose(*numbers, rel_tol=1e-6, abs_tol=1e-9), there
    assert (study / "report.html").stat().st_size > 10_000


@each_study
def test_the_page_of_a_shipped_study_has_every_verdict_word_for_word(study: Path, reports: Any) -> None:
    page = " ".join((study / "README.md").read_text(encoding="utf-8").split())
    verdicts = reports[study.name][1]["verdicts"]
    assert [verdict for verdict in verdicts if " ".join(verdict.split()) not in page] == []


@each_study
def test_every_row_of_an_arm_on_the_page_of_a_shipped_study_is_what_the_report_says(study: Path, reports: Any) -> None:
    said = {arm["arm"]: arm for arm in reports[study.name][1]["arms"]}
    row = re.compile(r"^\| `([\w-]+)` \|.*\| ([\d.]+) \| ([\d.]+) to ([\d.]+) \|$", re.MULTILINE)
    shown = row.findall((study / "README.md").read_text(encoding="utf-8"))
    assert len(shown) >= 5
    for name, *numbers in shown:
        assert numbers == [f"{said[name][field]:.1f}" for field in ("test", "low", "high")], name
