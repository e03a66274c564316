"""docs/start.md does what it says, on photos of which half are hostile."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.hostile import write_hostile_files

DOCS = Path(__file__).parents[1] / "docs"


def write_photos(folder: Path) -> None:
    """Three classes of forty photos of different sizes, and a fourth of hostile files."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(("cat", "dog", "owl")):
        (folder / name).mkdir(parents=True)
        for photo in range(40):
            size = (int(rng.integers(24, 60)), int(rng.integers(24, 60)), 3)
            pixels = rng.integers(0, 80, size, np.uint8)
            pixels[..., number] += 120
            Image.fromarray(pixels).save(folder / name / f"photo {photo}.jpg", quality=90)
    write_hostile_files(folder / "odd")


def files_of(text: str) -> list[tuple[str, str]]:
    return re.findall(r"<!-- file: ([\w.-]+) -->\n```\w+\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The guide's commands run one after another in a folder with `photos`; what each said."""
    folder = tmp_path_factory.mktemp("start")
    write_photos(folder / "photos")
    text = (DOCS / "start.md").read_text(encoding="utf-8")
    for name, content in files_of(text):
        (folder / name).write_text(content)
    said = {"folder": str(folder)}
    commands = [line for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    for command in commands:
        words = command.removeprefix("$ dla ").split(" ")
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *words],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(DOCS.parent), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        said[" ".join(words[:2])] = done.stdout
    return said


def test_the_guide_leads_from_photos_to_predictions(walked: dict[str, str]) -> None:
    answers = [json.loads(line) for line in walked["predict runs/student"].splitlines()]
    photos = [answer for answer in answers if "photo" in answer["path"]]
    assert len(photos) == 40
    folder = Path(walked["folder"])
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "student" / "model.safetensors").exists()
    assert all(f"\n{name} " in walked["evaluate runs/student"] for name in ("cat", "dog", "owl", "odd"))


def test_the_store_of_the_guide_trains_without_the_photos(walked: dict[str, str]) -> None:
    config = (Path(walked["folder"]) / "runs" / "student" / "config.yaml").read_text()
    assert "images: null" in config


def test_the_loop_of_the_guide_gets_its_pairs(walked: dict[str, str]) -> None:
    folder = Path(walked["folder"])
    for name, content in files_of((DOCS / "guides" / "own-loop.md").read_text(encoding="utf-8")):
        (folder / name).write_text(content)
    done = subprocess.run(
        [sys.executable, "own_loop.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(DOCS.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([8, 8, 4, 4])" in done.stdout
