"""`dla doctor`: what it finds, what it says is missing, and that nothing broken breaks it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import cli.doctor
from cli.doctor import PACKAGES, release

ROOT = Path(__file__).parents[2]


def report_of(ended):
    assert "Traceback" not in ended.stderr
    return json.loads(ended.stdout)


def state_of(ended, name):
    return next(state for state in report_of(ended)["packages"] if state["name"] == name)


def test_doctor_knows_what_dla_depends_on_and_since_which_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for_users = {name: found for name, found in project["optional-dependencies"].items() if name != "dev"}
    wanted = {}
    for extra, requirements in {None: project["dependencies"], **for_users}.items():
        for requirement in requirements:
            name, _, minimum = requirement.partition(">=")
            if not name.startswith("dla["):
                wanted[name] = (extra, minimum)
    known = {package.name: (package.extra, package.minimum) for package in PACKAGES}
    assert {name: known.get(name) for name in wanted} == wanted
    required = {package.name for package in PACKAGES if package.is_required}
    assert required == {name for name, (extra, _) in wanted.items() if extra is None}


def test_where_all_is_well_it_says_so_and_ends_with_0(dla, tiny):
    ended = dla("doctor", "--store", tiny.store)
    assert ended.exit_code == 0, ended.stderr
    assert ended.stderr == ""
    assert ended.stdout.splitlines()[-1] == "dla works here"
    for line in (r"torch +\d+\.\d+\S* +2\.6 +ok", r"processor +\d+ cores usable, torch takes \d+ threads"):
        assert re.search(f"^{line}", ended.stdout, re.MULTILINE), line
    assert f"{tiny.store}: 24 images; depth 5/5 shards; whole" in ended.stdout
    assert f"are dla's own, in {ROOT}\n" in ended.stdout


def test_json_holds_all_that_is_shown(dla, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = report_of(dla("doctor", "--store", tiny.store, "--json"))
    assert report["works"]
    assert report["cpu_cores"] >= 1
    assert report["open_files"] > 0
    assert report["free_bytes"][str(tmp_path)] > 0
    assert set(report["ours"]) == {"dla_cache", "trainer", "cli"}
    assert report["store"]["modalities"] == {"depth": "5/5 shards"}
    assert report["store"]["splits"] == {"labelled": 6, "test": 4, "transfer": 8, "validation": 6}


@pytest.mark.parametrize("module", ["torch", "zarr", "PIL.Image"])
def test_without_a_package_that_all_needs_it_ends_with_1_and_the_line_that_mends_it(dla, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)  # as Python has it for a module that cannot be imported
    ended = dla("doctor")
    assert ended.exit_code == 1
    name = {"PIL.Image": "pillow"}.get(module, module)
    assert f"error: dla cannot work here: `{name}` is broken: ModuleNotFoundError" in ended.stderr
    assert re.search(rf"hint: pip install --force-reinstall '{name}>=[\d.]+'", ended.stderr)
    assert "dla works here" not in ended.stdout
    assert re.search(r"^numpy .* ok$", ended.stdout, re.MULTILINE)


def pretend(monkeypatch, name, answer):
    """Lets the package of that name have the version `answer`, or be absent."""
    known = cli.doctor.version

    def version(asked):
        if asked != name:
            return known(asked)
        if answer is None:
            raise PackageNotFoundError(name)
        return answer

    monkeypatch.setattr(cli.doctor, "version", version)


def test_what_is_optional_and_missing_is_said_with_the_commands_that_need_it(dla, monkeypatch):
    pretend(monkeypatch, "diffusers", None)
    ended = dla("doctor")
    assert ended.exit_code == 0
    assert "diffusers: needed for the embedded sources: `dla demo`" in ended.stdout
    assert "pip install 'dla[sources]'" in ended.stdout
    assert state_of(dla("doctor", "--json"), "diffusers")["fault"] == "not installed"


def test_a_version_that_is_too_old_is_a_fault(dla, monkeypatch):
    pretend(monkeypatch, "zarr", "3.0.9")
    ended = dla("doctor", "--json")
    assert ended.exit_code == 1
    assert state_of(ended, "zarr")["fault"] == "older than 3.1"
    pretend(monkeypatch, "zarr", "3.10.dev1+cpu")
    assert dla("doctor").exit_code == 0


@pytest.mark.parametrize(
    ("older", "newer"), [("3.9", "3.10"), ("2.13.0+cpu", "2.13.1"), ("0.4", "0.4.5"), ("17", "17.0.0rc1")]
)
def test_versions_are_compared_as_numbers(older, newer):
    assert release(older) < release(newer)


def test_a_distribution_that_lies_over_ours_is_pointed_out(dla, monkeypatch):
    pretend(monkeypatch, "trainer", "0.0.36")
    ended = dla("doctor")
    assert ended.exit_code == 0
    assert "note          distribution `trainer` 0.0.36 lies in the same folder" in ended.stdout
    assert "pip uninstall trainer" in ended.stdout


@pytest.mark.parametrize("place", ["nothing.zarr", "file"])
def test_a_store_that_cannot_be_used_is_said_and_no_fault_of_dla(dla, tmp_path, place):
    (tmp_path / "file").write_text("")
    ended = dla("doctor", "--store", tmp_path / place)
    assert ended.exit_code == 0
    assert "store         cannot be used: `" in ended.stdout
    assert report_of(dla("doctor", "--store", tmp_path / place, "--json"))["store"]["hint"]


def test_a_store_that_is_not_whole_says_how_to_go_on(dla, tiny, tmp_path):
    store = shutil.copytree(tiny.store, tmp_path / "cache.zarr")
    next(path for path in (store / "commits").rglob("*") if path.is_file()).unlink()
    ended = dla("doctor", "--store", store)
    assert re.search(r"depth [0-4]/5 shards; not whole: run `dla cache build` again", ended.stdout)


def test_packages_that_are_slow_to_import_are_looked_at_from_outside_however_broken(tmp_path):
    for name in ("transformers", "diffusers", "onnxruntime"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('it was imported')\n")
    code = "import typer; from cli.doctor import doctor; typer.run(doctor)"
    result = subprocess.run(
        [sys.executable, "-c", code, "--json"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["works"]
    assert [state for state in report["packages"] if "imported" in (state["fault"] or "")] == []
