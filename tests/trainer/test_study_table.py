"""A report is made of three plain files that agree, or not at all."""

import csv
import re

import numpy as np
import pytest

from dla_cache.errors import SpecError, StudyError
from tests.trainer.made_study import SPEC, write_lines, write_study
from trainer.study_table import COLUMNS, read_study

TRUTH = {"image-only": 0.6, "teacher": 0.9, "kd": 0.8, "messy": 0.8}


@pytest.fixture
def made(tmp_path):
    return write_study(tmp_path / "made", SPEC, truth=TRUTH, n_images=60)


def change(folder, stage, alter):
    """Writes runs.csv again with its first line of a stage altered; `alter` gives the lines that take its place."""
    with (folder / "runs.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    place = next(number for number, line in enumerate(lines) if line["stage"] == stage)
    lines[place : place + 1] = alter(dict(lines[place]))
    write_lines(folder / "runs.csv", lines)


def test_what_was_written_is_read(made):
    table = read_study(made)
    runs = table.final("kd", None)
    assert sorted(runs, key=str) == sorted(table.planned("kd"), key=str)
    assert len(table.tuning("kd")) == 6
    assert table.missing() == []
    hits = table.hits(runs[0, 0])
    assert hits.mean() == pytest.approx(runs[0, 0].test)
    assert len(hits) == 60
    assert tuple(read_study(made).runs[0].model_dump()) == COLUMNS


def test_hits_are_read_the_most_significant_bit_first(made):
    bits = np.arange(60) % 3 == 0
    text = "".join(f"{int(''.join('1' if bit else '0' for bit in part), 2):02x}" for part in
                   np.pad(bits, (0, 4)).reshape(-1, 8))  # fmt: skip
    change(made, "final", lambda line: [line | {"test_hits": text, "test": bits.mean()}])
    table = read_study(made)
    assert table.hits(table.final("image-only", None)[None, 0]).tolist() == bits.tolist()


REFUSED = {
    "a tuning run has a test score": ("tuning", lambda line: [line | {"test": 0.8}]),
    "has no `test`": ("final", lambda line: [line | {"test": ""}]),
    "lists runs twice: `image-only, seed 0`": ("final", lambda line: [line, line]),
    "arms that the spec has not": ("final", lambda line: [line, line | {"arm": "other"}]),
    "other than the 60 images": ("final", lambda line: [line | {"test_hits": line["test_hits"] + "00"}]),
    "do not make the `test`": ("final", lambda line: [line | {"test": 0.123}]),
    "of seeds that the spec has not: `image-only, seed 77`": ("final", lambda line: [line | {"seed": 77}]),
    "has a teacher seed beside": ("final", lambda line: [line | {"teacher_seed": 0}]),
    "another metric than": ("final", lambda line: [line | {"metric": "mAP", "test_hits": ""}]),
    "line 2: `settings`": ("tuning", lambda line: [line | {"settings": "{"}]),
    "line 2: `validation`": ("tuning", lambda line: [line | {"validation": "nan"}]),
    "line 2: `run`": ("tuning", lambda line: [line | {"run": "../../x"}]),
}


@pytest.mark.parametrize(
    ("message", "stage", "alter"), [(said, *what) for said, what in REFUSED.items()], ids=[*REFUSED]
)
def test_runs_that_contradict_themselves_or_the_spec_are_refused(made, message, stage, alter):
    change(made, stage, alter)
    with pytest.raises(StudyError, match=re.escape(message)) as caught:
        read_study(made)
    assert caught.value.hint


def test_a_bit_behind_the_last_image_is_refused(made):
    change(made, "final", lambda line: [line | {"test_hits": line["test_hits"][:-1] + "f"}])
    with pytest.raises(StudyError, match="other than the 60 images"):
        read_study(made)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("images.csv", "image_id,label,group\n", "lists no image"),
        ("images.csv", "image_id,label,group\na,0,\na,1,\n", "lists images twice: `a`"),
        ("images.csv", "image_id,label,group\na,0,x\nb,1,\n", "gives no group to `b`"),
        ("images.csv", "image_id,label\na,0\n", "has the columns"),
        ("runs.csv", ",".join(COLUMNS) + "\n", "has no final run"),
        ("runs.csv", ",".join(COLUMNS) + "\n1,2\n", "another number of cells in line 2"),
        ("runs.csv", "\0", "is no table|has the columns"),
        ("images.csv", None, "cannot be read"),
        ("runs.csv", None, "cannot be read"),
    ],
)
def test_a_file_that_is_damaged_or_missing_is_named(made, name, content, message):
    (made / name).unlink()
    if content is not None:
        (made / name).write_text(content)
    with pytest.raises(StudyError, match=message) as caught:
        read_study(made)
    assert name in caught.value.message


def test_a_spec_that_is_none_is_named(made):
    (made / "spec.yaml").write_text("name: made\n")
    with pytest.raises(SpecError, match=r"spec\.yaml"):
        read_study(made)


def test_runs_that_are_not_there_are_listed(tmp_path):
    folder = write_study(tmp_path, SPEC, truth=TRUTH, n_images=40, drop={("kd", 1, 3), ("image-only", None, 9)})
    assert read_study(folder).missing() == ["image-only, seed 9", "kd, teacher seed 1, seed 3"]


def test_images_of_a_group_are_one_thing_that_is_drawn(made):
    with (made / "images.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    write_lines(made / "images.csv", [line | {"group": f"g{number % 7}"} for number, line in enumerate(lines)])
    images = read_study(made).images
    hits = np.random.default_rng(0).random((2, 3, 60)).round()
    units = images.by_unit(hits)
    assert units.shape == (2, 3, 7)
    assert units.mean(axis=-1) == pytest.approx(hits.mean(axis=-1))
    assert units[0, 0, 2] == pytest.approx(hits[0, 0, 2::7].sum() * 7 / 60)
