"""Parts of a study's spec: where latents come from, and the values that a setting may take."""

import math
from itertools import combinations
from typing import Annotated, Self

from pydantic import Field, JsonValue, model_validator

from dla_cache.spec import StrictModel

Seed = Annotated[int, Field(ge=0, lt=2**31)]


class StoreEntry(StrictModel):
    """One more store: a place, a control that is made from the study's own store, or another source's latents of
    the embedded data."""

    path: str | None = None
    """Where it lies; relative to the spec file."""
    control: str | None = None
    """Kind of control latents to make, as `dla cache control --kind` names it."""
    source: str | None = None
    """Of a study with `data`: an embedded source, whose modality is all that the store has."""
    seed: Seed = 0
    """Of a control: decides what is drawn or shuffled. Of a source: its recipe's."""
    modalities: tuple[str, ...] | None = None
    """Of a control: whose latents are replaced; all of the store when absent."""
    labels: str | None = None
    """Of a control that goes by class: table of image_id and label for images without one; relative to the spec
    file. Those of embedded `data` are known."""

    noise: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of a label embedding: the share of the variance that is noise."""
    features: str | None = None
    """Of fabricated latents: place of a store with another model's features; relative to the spec file."""

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        ways = [name for name in ("path", "control", "source") if getattr(self, name) is not None]
        if len(ways) != 1:
            raise ValueError("a store is either a `path` or a `control` or a `source`")
        if self.source is not None and self.model_fields_set - {"source", "seed"}:
            raise ValueError("all but `source` and `seed` belongs to a `path` or a `control`")
        if self.path is not None and self.model_fields_set - {"path"}:
            raise ValueError("all but `path` belongs to a `control`")
        return self


class Axis(StrictModel):
    """The values of one setting that are tried."""

    values: Annotated[tuple[JsonValue, ...], Field(min_length=1)]
    extend: bool = False
    """Numbers only: whether to go on beyond the grid where the best value lies at its edge, by the grid's own ratio (or
    its difference, where it has a number that is not above 0)."""
    low: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """No value below this is tried when extending."""
    high: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """No value above this is tried when extending."""

    @property
    def is_numeric(self) -> bool:
        """Whether all values are numbers, so that they have an order and edges."""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)

    @property
    def numbers(self) -> tuple[float, ...]:
        """The values of a numeric axis in rising order; none of another."""
        numbers = [value for value in self.values if isinstance(value, int | float) and not isinstance(value, bool)]
        return tuple(sorted(numbers)) if self.is_numeric else ()

    @model_validator(mode="after")
    def _can_be_tried(self) -> Self:
        if any(one == other for one, other in combinations(self.values, 2)):
            raise ValueError("a value stands twice in `values`")
        if any(isinstance(value, float) and not math.isfinite(value) for value in self.values):
            raise ValueError("a value in `values` is no finite number")
        if not self.extend:
            if self.low is not None or self.high is not None:
                raise ValueError("`low` and `high` are bounds of `extend: true`")
            return self
        if not self.is_numeric or len(self.values) < 2:
            raise ValueError("`extend` needs two numbers or more in `values`")
        if (self.low is not None and self.low > self.numbers[0]) or (
            self.high is not None and self.high < self.numbers[-1]
        ):
            raise ValueError("a value lies outside `low` and `high`")
        return self
