"""The files that a study's report is made of, where no run is needed to tell."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dla_cache.errors import SpecError
from trainer.answers import Answers
from trainer.study_records import hits_text, image_lines

ANSWERS = Answers(("a", "b", "c"), ("0", "1", "2"), ("0", "0", "2"))


@given(hits=st.lists(st.booleans(), min_size=1, max_size=40))
def test_a_bit_an_image_stands_for_a_hit_the_first_the_most_significant(hits):
    text = hits_text(hits)
    assert len(text) == 2 * -(-len(hits) // 8)
    bits = f"{int(text, 16):0{4 * len(text)}b}"
    assert [bit == "1" for bit in bits[: len(hits)]] == hits
    assert set(bits[len(hits) :]) <= {"0"}


def test_images_have_the_groups_of_the_table_and_none_without_one(tmp_path):
    assert image_lines(ANSWERS, None) == [["a", "0", ""], ["b", "1", ""], ["c", "2", ""]]
    (tmp_path / "groups.csv").write_text("image_id,group\nc,g2\nb,g1\na,g1\n")
    assert image_lines(ANSWERS, tmp_path / "groups.csv") == [["a", "0", "g1"], ["b", "1", "g1"], ["c", "2", "g2"]]
    assert image_lines(None, None) == []


@pytest.mark.parametrize(
    ("table", "told"), [("image_id,group\na,g1\n", "no group of 2 test images: `b`, `c`"), ("id,g\na,1\n", "no table")]
)
def test_a_table_of_groups_that_is_none_or_lacks_images_is_refused(tmp_path, table, told):
    (tmp_path / "groups.csv").write_text(table)
    with pytest.raises(SpecError, match=told):
        image_lines(ANSWERS, tmp_path / "groups.csv")
