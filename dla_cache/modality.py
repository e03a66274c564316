"""The one vocabulary of modalities: a kind of latent, and a label where a store holds several of a kind."""

import re
from typing import Any, ClassVar, Self

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

KINDS = {
    "depth": "how far things are",
    "normals": "which way surfaces face",
    "intrinsics": "what surfaces are made of, and how they are lit",
    "audio": "what it may sound like",
    "shape": "its form in three dimensions",
    "motion": "how it may move",
    "video": "what may happen next, as a text-guided video",
    "variation": "another picture of the same",
    "features": "what an encoder makes of it: a control, or a teacher",
    "caption": "what a text says of it",
    "target": "what a trained teacher answers to a view of it",
}
"""Every kind, and what it tells of an image."""

PICTURES = frozenset({"depth", "normals", "intrinsics", "motion", "video", "variation", "features"})
"""Kinds whose numbers lie over the image, place by place, unless they were pooled."""

DIRECTIONS = frozenset({"normals", "motion"})
"""Kinds whose numbers may point left or right."""

KINDS_OF_V1 = ("depth", "audio", "shape", "motion", "normals")
"""What readers of format v1 know without being told that a store requires more of them."""

NAME = re.compile(rf"({'|'.join(KINDS)})((?:-[a-z0-9]+)*)")

LONGEST_NAME = 48
"""Characters: it becomes part of paths."""


class Modality(str):
    """A modality's name, as `depth` or `features-dinov2`: a kind, and maybe a label of the user's after a hyphen.

    Raises:
        ValueError: if the kind is unknown, or a label is not small letters and digits.
    """

    DEPTH: ClassVar["Modality"]
    NORMALS: ClassVar["Modality"]
    INTRINSICS: ClassVar["Modality"]
    AUDIO: ClassVar["Modality"]
    SHAPE: ClassVar["Modality"]
    MOTION: ClassVar["Modality"]
    VIDEO: ClassVar["Modality"]
    VARIATION: ClassVar["Modality"]
    FEATURES: ClassVar["Modality"]
    CAPTION: ClassVar["Modality"]
    TARGET: ClassVar["Modality"]

    __slots__ = ()

    def __new__(cls, name: str) -> Self:
        if not isinstance(name, str) or not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
            kinds = ", ".join(f"`{kind}`" for kind in KINDS)
            raise ValueError(
                f"`{name}` is no modality: it is one of {kinds}, maybe with a label of at most"
                f" {LONGEST_NAME} small letters and digits, as `features-dinov2`"
            )
        return super().__new__(cls, name)

    @property
    def value(self) -> str:
        """The name as a plain text."""
        return str.__str__(self)

    @property
    def kind(self) -> str:
        """Its name without the label."""
        return self.partition("-")[0]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())


def is_modality(name: str) -> bool:
    """Whether a text is the name of a modality."""
    return NAME.fullmatch(name) is not None and len(name) <= LONGEST_NAME


for _kind in KINDS:
    setattr(Modality, _kind.upper(), Modality(_kind))
