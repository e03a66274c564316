"""`dla study alignment`: its tables, its page, its pictures, and what it will not answer."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tests.alignment_world import make_arms, make_world

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """The words of a page and the places that it would load; fails on a tag that is not closed in its place."""

    def __init__(self, content):
        super().__init__()
        self.open, self.words, self.loads = [], [], []
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("alignment"))
    world.arms = make_arms(world)
    return world


@pytest.fixture
def ask(dla, world):
    """Runs the command on both arms."""

    def run(out, *options):
        arms = [f"--arm={name}={','.join(map(str, folders))}" for name, folders in world.arms.items()]
        return dla("study", "alignment", *arms, "--out", out, "--shuffles", 3, *options)

    return run


def lines_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_tables_page_and_pictures_are_written(ask, world, tmp_path, monkeypatch):
    decoders = {"seeing": lambda latents: np.clip(latents[:, 0], 0, 1)}
    monkeypatch.setattr("cli.sheet.decoder_of", decoders.get)
    ended = ask(tmp_path / "out", "--other-draw", world.other, "--target", f"probe={world.folder / 'runs' / 'probe'}")
    assert ended.exit_code == 0, ended.stderr
    lines = lines_of(tmp_path / "out" / "alignment.csv")
    # two arms of two blocks: depth and audio in seven metrics each, what the probe says in six, all of it twice
    assert len(lines) == 2 * 2 * (7 + 7 + 6) * 2
    depth = [line for line in lines if (line["target"], line["metric"]) == ("depth", "r2-flattened")]
    assert all(float(line["low"]) <= float(line["value"]) <= float(line["high"]) for line in depth)
    assert {line["taught"] for line in depth if line["arm"] == "image-only"} == {"false"}
    assert len(depth[0]["values"].split()) == 2
    matched = [line for line in lines_of(tmp_path / "out" / "differences.csv") if line["is_matched"] == "true"]
    assert {(line["arm"], line["other"]) for line in matched} == {("kd", "image-only")}
    with Image.open(tmp_path / "out" / "gallery-depth.png") as sheet:
        assert sheet.size[0] == 5 * 102 + 6  # image, true latent, two arms, null
    assert "no picture of audio is drawn" in ended.stderr
    assert "within a class the image fixes next to nothing of audio" in ended.stderr
    assert "next to nothing of depth" not in ended.stderr
    page = Page((tmp_path / "out" / "alignment.html").read_text(encoding="utf-8"))
    assert [place for place in page.loads if not place.startswith("data:")] == []
    words = " ".join(" ".join(page.words).split())
    assert words.count("What it does not mean.") == 7
    assert "kd knows depth beyond the class" in words
    assert "dla study alignment --store" in words
    assert re.search(r"depth +kd +\S+ +yes", ended.stdout)


def test_names_are_escaped_and_what_is_unknown_is_said(dla, world, tmp_path):
    student = world.arms["image-only"][0]
    ended = dla(
        "study", "alignment", f"--arm=<b>kd={world.arms['kd'][0]}", f"--arm=plain={student}", "--out", tmp_path,
        "--shuffles", 2, "--modality", "depth", "--json",
    )  # fmt: skip
    assert ended.exit_code == 0, ended.stderr
    content = (tmp_path / "alignment.html").read_text(encoding="utf-8")
    assert "<b>" not in content
    assert "&lt;b&gt;kd" in content
    facts = json.loads(ended.stdout)
    assert facts["images"] == facts["fitted_images"] == 60
    assert any(note.startswith("one run stands behind <b>kd, plain") for note in facts["notes"])
    assert any(note.startswith("the noise ceiling of depth is unknown") for note in facts["notes"])
    assert {line["ceiling"] for line in facts["alignment"]} == {None}


def test_a_split_that_was_learned_from_is_said(ask, tmp_path):
    ended = ask(tmp_path, "--split", "test", "--fit-split", "validation", "--fit-split", "labelled", "--modality=depth")
    assert ended.exit_code == 0, ended.stderr
    assert "split `labelled` was learned from by kd, image-only" in ended.stderr


def test_without_a_run_that_never_saw_the_modality_there_is_no_control_and_it_is_said(dla, world, tmp_path):
    ended = dla(
        "study", "alignment", f"--arm=kd={world.arms['kd'][0]}", "--out", tmp_path, "--shuffles=2", "--modality=depth"
    )
    assert ended.exit_code == 0, ended.stderr
    assert "kd has no control for depth" in ended.stderr


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (["--arm", "messy"], 2, "NAME=RUN"),
        (["--modality", "shape"], 1, "has no modality `shape`"),
        (["--split", "labelled"], 1, "too few to say anything"),
        (["--control", "kd"], 1, "arm `kd` is no control for `depth`"),
        (["--store", "nowhere.zarr"], 1, "say with `--store` where it is now"),
    ],
    ids=["no run", "no modality", "too few images", "no control", "no store"],
)
def test_what_cannot_be_asked_is_refused_and_nothing_is_written(ask, tmp_path, options, exit_code, message):
    ended = ask(tmp_path / "out", *options)
    assert ended.exit_code == exit_code
    assert message in ended.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_no_students_is_refused(dla, world, tmp_path):
    ended = dla("study", "alignment", f"--arm=probe={world.folder / 'runs' / 'probe'}", "--out", tmp_path / "out")
    assert ended.exit_code == 1
    assert "is a probe, which sees latents" in ended.stderr


def test_a_run_whose_upbringing_cannot_be_followed_is_refused(dla, world, tmp_path):
    pupil = world.train(
        "pupil", "student", objective={"kd": {}}, teacher=str(world.arms["kd"][0]),
        roles={"transfer": ["unlabelled"]}, transfer_per_batch=2,
    )  # fmt: skip
    shutil.copytree(pupil, tmp_path / "pupil")
    (tmp_path / "pupil" / "config.yaml").write_text(
        (pupil / "config.yaml")
        .read_text(encoding="utf-8")
        .replace("../kd-0", "../gone")
        .replace("../../", f"{world.folder}/")
    )
    followed = dla("study", "alignment", f"--arm=pupil={pupil}", "--out", tmp_path / "a", "--shuffles=2", "--json")
    assert followed.exit_code == 0, followed.stderr
    assert json.loads(followed.stdout)["runs"][0]["taught"] == ["depth"]
    ended = dla(
        "study", "alignment", f"--arm=pupil={tmp_path / 'pupil'}", "--out", tmp_path / "b", "--images", world.folder
    )
    assert ended.exit_code == 1
    assert "gone` is no run folder" in ended.stderr
