"""The calibration of studies, as small as it can be; in full size it is `make bench-study`."""

from pathlib import Path

import numpy as np
import pytest

from bench.calibrate_study import EFFECT, NULL, Calibration, Size, calibrate, plant, rows_of
from bench.trimodal import CLASSES, patterns, write_trimodal
from dla_cache.spec import Modality
from trainer.pool import WorkerPool
from trainer.records import read_record
from trainer.study import do_job

SHIPPED = Path(__file__).parents[1] / "docs" / "studies" / "calibration"


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    with WorkerPool(do_job, 1, tmp_path_factory.mktemp("logs")) as workers:
        yield workers


def test_planted_errors_are_noticed(pool, tmp_path):
    dropped, shifted = plant(tmp_path, pool, Size(seeds=1, teacher_seeds=1))
    assert any(note.startswith("Inert term. rkd") for note in dropped.notes)
    assert any(note.startswith("Test lies far below validation.") for note in shifted.notes)
    assert not any("validation" in note for note in dropped.notes)


def test_a_study_finds_what_latents_add_and_nothing_where_they_add_nothing(pool, tmp_path):
    told, once, size = [], {EFFECT: 1, NULL: 1}, Size(seeds=2, teacher_seeds=1)
    something, nothing = calibrate(tmp_path, pool, once, size, on_found=told.append)
    assert calibrate(tmp_path / "again", pool, once, size, told[-1]) == [something, nothing]
    assert not (tmp_path / "again").exists()
    assert something.points > 5
    assert not nothing.is_found
    assert nothing.low < 0 < nothing.high


@pytest.mark.parametrize("world", [1, 2])
def test_a_source_that_knows_other_patterns_is_told_nothing_of_the_class(world):
    own, other = (patterns(number).reshape(len(CLASSES), -1) for number in (0, world))
    assert np.allclose(np.std([own, other], axis=-1), 1)
    assert np.abs(other @ own.T / own.shape[1]).max() < 1e-12


def test_a_made_data_set_is_the_same_to_the_byte_when_it_is_written_again(tmp_path):
    sources = {Modality.DEPTH: "patterns-0"}
    for name in ("one", "other"):
        write_trimodal(tmp_path / name, 3, sources)
    one, other = (sorted((tmp_path / name / "data").rglob("*")) for name in ("one", "other"))
    assert [path.read_bytes() for path in one if path.is_file()] == [
        path.read_bytes() for path in other if path.is_file()
    ]


def test_the_page_of_the_calibration_in_full_size_says_what_its_record_says():
    record = read_record(SHIPPED / "calibration.json", Calibration)
    page = " ".join((SHIPPED / "README.md").read_text(encoding="utf-8").split())
    for row in rows_of(record.findings):
        assert f"| {' | '.join(row)} |" in page
    for planted in record.planted:
        assert planted.notes
        assert [note for note in planted.notes if note not in page] == []
    nothing = [one.is_found for one in record.findings if one.regime == NULL]
    assert len(nothing) == 40
    assert sum(nothing) <= 2
    assert all(one.is_found for one in record.findings if one.regime == EFFECT)
