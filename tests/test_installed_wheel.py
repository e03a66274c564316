"""The wheel alone is enough: installed elsewhere, it runs the demo without the checkout."""

import json
import os
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dla_cache", "trainer", "cli")

pytestmark = pytest.mark.slow


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The finished command, run in `folder` where no variable leads back to the checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip_wheel = (sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation")
    run(*pip_wheel, "--wheel-dir", folder, ROOT, folder=folder)
    (built,) = folder.glob("dla-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of an environment with this wheel and today's dependencies, but not the checkout.

    The `.pth` adds the folders of the dependencies to the path. Python does not read the `.pth`
    files in there, so an editable install of this project stays out of sight.
    """
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, folder=environment)
    (own_packages,) = environment.glob("lib/python*/site-packages")
    (own_packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--python", environment / "bin" / "python")
    run(*pip, "install", "--no-index", "--no-deps", "--ignore-installed", wheel, folder=environment)
    return environment / "bin"


def test_the_wheel_holds_the_three_packages_with_all_their_files_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    of_checkout = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == of_checkout
    assert {"dla_cache/data/digits.npz", "dla_cache/data/textures.png"} <= names
    assert any(name.startswith("dla_cache/sources/weights/") and name.endswith(".safetensors") for name in names)


def test_the_wheel_carries_every_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        carried = {Path(name).name for name in archive.namelist() if ".dist-info/licenses/" in name}
    assert carried == {path.name for path in (ROOT / "LICENSES").iterdir()}


def test_the_demo_runs_from_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    code = f"import {', '.join(PACKAGES)}; print({', '.join(f'{package}.__file__' for package in PACKAGES)}, sep='\\n')"
    origins = run(installed / "python", "-c", code, folder=tmp_path).stdout.splitlines()
    assert all(Path(origin).is_relative_to(installed.parent) for origin in origins), origins

    result = run(installed / "dla", "demo", "--quick", "--out", "demo", "--json", folder=tmp_path)
    assert json.loads(result.stdout)["rows"]
