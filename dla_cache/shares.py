"""Shares of images: which part goes to which split, and how many may be bad."""

import re
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Shares:
    """Which share of the images each split gets; an image's own hash decides, so that no other image matters."""

    of_split: dict[str, Fraction]

    def split_of(self, sha256: str) -> str:
        """The split of an image; equal bytes come into the same one."""
        position = Fraction(int(sha256[:16], 16), 2**64)
        end = Fraction(0)
        for split, share in self.of_split.items():
            end += share
            if position < end:
                return split
        raise AssertionError(f"the shares end at {end}")  # parse_split lets only those pass that end at 1


@dataclass(frozen=True, slots=True)
class Allowance:
    """How many images may be bad: a number, or percent of those that were checked."""

    limit: Fraction
    is_percent: bool

    def covers(self, n_bad: int, n_checked: int) -> bool:
        """Whether so many bad images of so many are allowed."""
        return n_bad <= (self.limit * n_checked / 100 if self.is_percent else self.limit)


NOTHING_BAD = Allowance(Fraction(0), is_percent=False)


def parse_split(text: str) -> str | Shares:
    """A split's name, or shares as `train=0.8,validation=0.1,test=0.1`.

    Raises:
        ValueError: if names repeat or are empty, or the shares are not above 0 and 1 in sum.
    """
    if "=" not in text:
        if not text.strip():
            raise ValueError("a split has a name")
        return text
    shares: dict[str, Fraction] = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        if not name.strip() or name.strip() in shares:
            raise ValueError(f"`{part}` names no split, or one that stands before")
        if not re.fullmatch(r"[0-9]{0,9}\.?[0-9]{1,9}", share.strip()) or not Fraction(share.strip()):
            raise ValueError(f"`{part}` is not `name=share` with a share above 0, as `test=0.1`")
        shares[name.strip()] = Fraction(share.strip())
    if sum(shares.values()) != 1:
        raise ValueError(f"the shares make {float(sum(shares.values())):g}, not 1")
    return Shares(shares)


def parse_allowance(text: str) -> Allowance:
    """`3` images or `2%` of them.

    Raises:
        ValueError: if the text is neither.
    """
    if not re.fullmatch(r"[0-9]{1,12}|[0-9]{1,3}(\.[0-9]{1,9})?%", text):
        raise ValueError(f"`{text}` is neither a number of images, as `3`, nor a share of them, as `2%`")
    return Allowance(Fraction(text.removesuffix("%")), is_percent=text.endswith("%"))
