"""Shares: what of the images goes where, and how many may be bad."""

import hashlib
from collections import Counter

import pytest

from dla_cache.shares import Shares, parse_allowance, parse_split

DIGESTS = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(2000)]


def test_each_split_gets_its_share() -> None:
    shares = parse_split("train=0.8, validation=.15, test=0.05")
    assert isinstance(shares, Shares)
    counts = Counter(shares.split_of(digest) for digest in DIGESTS)
    # Four standard deviations of the count of 2,000 hashes at a share of 0.8.
    assert dict(counts) == pytest.approx({"train": 1600, "validation": 300, "test": 100}, abs=72)


def test_every_hash_has_a_split() -> None:
    shares = parse_split("a=0.333,b=0.333,c=0.334")
    assert isinstance(shares, Shares)
    assert [shares.split_of(digit * 64) for digit in "0f"] == ["a", "c"]


def test_a_name_alone_is_one_split_for_all() -> None:
    assert parse_split("unlabelled") == "unlabelled"


@pytest.mark.parametrize(
    "text", ["", " ", "=1", "a=0.5,a=0.5", "a=0.5", "a=0,b=1", "a=1,b", "a=-1,b=2", "a=1e9", "a=0.5,b=0.6", "a=1/0"]
)
def test_shares_that_make_no_whole_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"split|share"):
        parse_split(text)


@pytest.mark.parametrize(
    ("text", "most"), [("0", 0), ("3", 3), ("2%", 2), ("2.5%", 2), ("0%", 0), ("100%", 100), ("101", 101)]
)
def test_as_many_may_be_bad_as_allowed_and_no_more(text: str, most: int) -> None:
    allowance = parse_allowance(text)
    assert allowance.covers(most, 100)
    assert not allowance.covers(most + 1, 100)


@pytest.mark.parametrize("text", ["", "-1", "1.5", "%", "two", "3 %", "1000%"])
def test_an_allowance_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="neither"):
        parse_allowance(text)
