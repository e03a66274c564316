"""Image IDs: safe whatever the text, different for different texts, and reversible."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dla_cache.errors import ManifestError
from dla_cache.image_ids import MAX_LENGTH, escape_id, unescape_id

ANY_CHARACTER = st.characters(exclude_categories=())
ANY_TEXT = st.text(ANY_CHARACTER, min_size=1)
# Few characters, those that escapes are made of among them: here two texts would collide if any did.
TRICKY_TEXT = st.text("-_./phabcf2é猫", min_size=1, max_size=8)


def test_a_path_stays_readable() -> None:
    assert escape_id("cat/IMG_1.jpg") == "cat-_IMG_1-pjpg"
    assert escape_id("A-b ü") == "A--b-20--fc-"


@given(text=ANY_TEXT | st.text(ANY_CHARACTER, min_size=60))
def test_an_id_is_safe_and_short_whatever_the_text(text: str) -> None:
    assert re.fullmatch("[A-Za-z0-9_-]+", escape_id(text))
    assert len(escape_id(text)) <= MAX_LENGTH


@given(text=(ANY_TEXT | TRICKY_TEXT).filter(lambda text: len(text) <= MAX_LENGTH // 8))
def test_an_id_is_turned_back_into_its_text(text: str) -> None:
    assert unescape_id(escape_id(text)) == text


@given(name=st.from_regex("[A-Za-z0-9_]{1,200}", fullmatch=True))
def test_a_safe_name_stays_as_it_is(name: str) -> None:
    assert escape_id(name) == name


@given(one=TRICKY_TEXT, other=TRICKY_TEXT)
def test_different_texts_have_different_ids(one: str, other: str) -> None:
    assert (escape_id(one) == escape_id(other)) == (one == other)


@given(image_id=st.text("-_./phabcf2é", max_size=12))
def test_what_unescapes_is_an_id_of_ours(image_id: str) -> None:
    try:
        text = unescape_id(image_id)
    except ManifestError:
        return
    assert escape_id(text) == image_id


def test_a_long_text_is_cut_and_still_has_its_own_id() -> None:
    one, other = (escape_id(f"{'long/' * 100}{end}.jpg") for end in "\ud800\ud801")
    assert one != other
    assert len(one) == MAX_LENGTH
    with pytest.raises(ManifestError, match="was cut"):
        unescape_id(one)


@pytest.mark.parametrize("stranger", ["", "a-", "-zz-", "-61-", "-0fc-", "-FC-", "-110000-", "a.b"])
def test_what_is_no_id_of_ours_is_refused(stranger: str) -> None:
    with pytest.raises(ManifestError, match="not made of a text"):
        unescape_id(stranger)


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(ManifestError, match="empty"):
        escape_id("")
