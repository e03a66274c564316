"""Who works at which shard: claims with a lease, in a folder or below a prefix alike.

A claim is an object that is created once, `claims/<series>/<shard>.<generation>.json`, and says until when it holds.
Whoever creates the next generation after the newest has expired holds the shard; to renew a claim its holder creates
the next one itself. So two processes never hold one shard, where their clocks agree to `CLOCK_SKEW_S`.

Correctness does not rest on it: a shard is committed once, whoever computed it. Claims avoid that two compute it.
"""

import re
import secrets
import time
from collections.abc import Callable
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator

from dla_cache.errors import StoreError
from dla_cache.remote.objects import MissingObjectError, ObjectStore
from dla_cache.spec import RecordModel, canonical_json

CLAIMS = "claims"
"""Folder of all claims in a store; it may be deleted while nobody writes to the store."""

CLOCK_SKEW_S = 60
"""A claim is left alone for so long after it has expired: the clocks of two machines may differ by as much. If they
differ by more, a shard may be computed twice; nothing else happens."""

LONGEST_LEASE_S = 24 * 60 * 60

_NAME = re.compile(r"(?P<shard>0|[1-9][0-9]{0,17})\.(?P<generation>[1-9][0-9]{0,17})\.json")


class Claim(RecordModel):
    """What the object of a claim says; times are seconds since 1970-01-01 UTC, by the clock of its owner."""

    owner: Annotated[str, Field(min_length=1, max_length=200)]
    """Unlike any other, and no secret: whoever can read the store sees it."""
    acquired: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """When this generation was created."""
    expires: Annotated[float, Field(ge=0, allow_inf_nan=False)]

    @model_validator(mode="after")
    def _lasts_a_while(self) -> Self:
        if not 0 < self.expires - self.acquired <= LONGEST_LEASE_S:
            raise ValueError(f"a lease lasts up to {LONGEST_LEASE_S} s, this one {self.expires - self.acquired}")
        return self


class Claims:
    """The claims of one process on the shards of one store."""

    def __init__(
        self,
        objects: ObjectStore,
        lease_s: float,
        *,
        owner: str | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            objects: the store's folder or prefix.
            lease_s: how long others wait for this process after it died; to be renewed well before.
            owner: of the claims; by default a random name.
        """
        self._objects = objects
        self.lease_s = lease_s
        self.owner = owner or secrets.token_hex(8)
        self._now = now

    def acquire(self, series: str, shard: int) -> int | None:
        """The generation of a new claim on a shard; None if another process holds it.

        Whoever gets one looks whether the shard is committed meanwhile before it computes it.

        Raises:
            StoreError: if claims cannot be read or written, or the newest is damaged.
        """
        generations = self._generations(series, shard)
        if generations:
            try:
                newest = self._read(series, shard, generations[-1])
            except MissingObjectError:
                return None  # released or renewed at this moment, so somebody was here: the next round shows
            if self._now() < newest.expires + CLOCK_SKEW_S:
                return None
        return self._create(series, shard, generations[-1] + 1 if generations else 1)

    def renew(self, series: str, shard: int, generation: int) -> int | None:
        """The generation that carries a claim of this process on; None if another one has taken the shard over.

        Raises:
            StoreError: as of `acquire`.
        """
        renewed = self._create(series, shard, generation + 1, after=generation)
        if renewed is not None:
            self._delete_up_to(series, shard, generation)
        return renewed

    def release(self, series: str, shard: int, generation: int) -> None:
        """Gives a shard back, committed or not; passes if another process has taken it over.

        Raises:
            StoreError: as of `acquire`.
        """
        self._delete_up_to(series, shard, generation)

    def holder(self, series: str, shard: int) -> Claim | None:
        """The claim that keeps others from a shard at this moment, if there is one.

        Raises:
            StoreError: as of `acquire`.
        """
        for generation in self._generations(series, shard)[-1:]:
            try:
                claim = self._read(series, shard, generation)
            except MissingObjectError:
                return None
            return claim if self._now() < claim.expires + CLOCK_SKEW_S else None
        return None

    def _create(self, series: str, shard: int, generation: int, after: int | None = None) -> int | None:
        """The generation, if it is a claim of this process now; None if it is not.

        Args:
            after: what this process held until now.
        """
        acquired = self._now()
        claim = Claim(owner=self.owner, acquired=acquired, expires=acquired + self.lease_s)
        content = canonical_json(claim.model_dump(mode="json")).encode()
        if not self._objects.create(_name(series, shard, generation), content):
            return None
        # While this process looked or slept others may have taken the shard over, given it back and counted from 1
        # again. Of two such claims who was later sees the other one.
        present = self._generations(series, shard)
        is_ours = present[-1:] == [generation] and (after is None or after in present)
        if not (is_ours and all(self._is_no_others(series, shard, older) for older in present[:-1])):
            self._objects.delete(_name(series, shard, generation))
            return None
        return generation

    def _is_no_others(self, series: str, shard: int, generation: int) -> bool:
        """Whether a generation that is not the newest leaves the shard to this process."""
        try:
            claim = self._read(series, shard, generation)
        except MissingObjectError:
            return True
        return claim.owner == self.owner or self._now() >= claim.expires + CLOCK_SKEW_S

    def _delete_up_to(self, series: str, shard: int, generation: int) -> None:
        # The oldest first: while the newest stands, no other is taken for the one that holds.
        for older in self._generations(series, shard):
            if older <= generation:
                self._objects.delete(_name(series, shard, older))

    def _generations(self, series: str, shard: int) -> list[int]:
        """Of all claims on a shard, in rising order."""
        folder = f"{CLAIMS}/{series}/"
        found = (_NAME.fullmatch(name.removeprefix(folder)) for name in self._objects.names(f"{folder}{shard}."))
        return sorted(int(match["generation"]) for match in found if match and int(match["shard"]) == shard)

    def _read(self, series: str, shard: int, generation: int) -> Claim:
        name = _name(series, shard, generation)
        content = self._objects.read(name)
        try:
            return Claim.model_validate_json(content)
        except ValidationError as error:
            raise StoreError(
                f"`{self._objects.url}/{name}` is no claim: {error.errors()[0]['msg']}",
                hint="remove it: claims only keep two processes from the same work",
            ) from error


def _name(series: str, shard: int, generation: int) -> str:
    return f"{CLAIMS}/{series}/{shard}.{generation}.json"
