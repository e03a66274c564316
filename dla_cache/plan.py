"""A plan of a build: what it will do and cost, as a file that can be read, kept and applied."""

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import yaml
from pydantic import Field

from dla_cache.durable import make_folder, write_durably, writing_to
from dla_cache.errors import ManifestError, RecipeMismatchError, SpecError, StoreError, name_some
from dla_cache.manifest import Manifest, read_manifest
from dla_cache.passes import series_of
from dla_cache.spec import CacheSpec, Finite, LatentSpec, Recipe, StrictModel, read_yaml
from dla_cache.store.creation import changed_fields
from dla_cache.store.layout import IMAGES
from dla_cache.survey import survey_build

if TYPE_CHECKING:
    from dla_cache.sources import LatentSource

Positive = Annotated[int, Field(ge=1)]
Amount = Annotated[Finite, Field(ge=0)]


class SeriesPlan(StrictModel):
    """What is to be done of a modality, or of the images' own bytes."""

    images: Annotated[int, Field(ge=0)]
    reasons: dict[str, int]
    """Images by the reason why they are to be done."""
    size_bytes: int
    """On disk; of stored images an estimate from a few of them."""
    bytes_per_image: Amount


class ModalityPlan(SeriesPlan):
    """The same of a modality, and what its source takes."""

    source: str
    licence: str
    is_gated: bool
    recipe: Recipe
    batch_size: Positive
    """Images per call: fewer than asked for if the device ran out of memory."""
    batch_seconds: tuple[Amount, ...]
    """Of each timed batch, on one device; none if there is nothing to do."""
    read_seconds: Amount
    """To read and decode one image, on one core."""

    @property
    def seconds_per_image(self) -> tuple[float, float, float]:
        """Least, median and most of the timed batches; zeros without one."""
        if not self.batch_seconds:
            return 0.0, 0.0, 0.0
        seconds = min(self.batch_seconds), statistics.median(self.batch_seconds), max(self.batch_seconds)
        least, median, most = (value / self.batch_size for value in seconds)
        return least, median, most


class CachePlan(StrictModel):
    """A build that has been looked at and not begun: what `dla cache build --plan` does."""

    version: Literal[1] = 1
    made: str
    """UTC, ISO 8601."""
    dla: str
    """Version."""
    manifest: str
    manifest_sha256: str
    """Of the manifest's file."""
    images: str | None
    """Folder that the images' paths start from; None for the manifest's."""
    store: str
    is_there: bool
    """Whether the store existed when the plan was made."""
    append: bool
    repair: bool
    """Whether shards were found damaged, which a build makes again only if it is told to."""
    device: str
    batch_size: Positive
    devices: Positive
    price_per_hour: Amount
    """Of one device."""
    epochs: Positive
    students: Positive
    n_images: int
    """Of the store as it will be."""
    free_bytes: int | None
    """Of the disk of the store; None for an object store."""
    spec: CacheSpec
    latents: dict[str, ModalityPlan]
    stored_images: SeriesPlan | None = None

    @property
    def size_bytes(self) -> int:
        """That are to be written."""
        return sum(part.size_bytes for part in self.series.values())

    @property
    def series(self) -> dict[str, SeriesPlan]:
        """The modalities, and `images` if the store is to hold them."""
        return {**self.latents, **({} if self.stored_images is None else {IMAGES: self.stored_images})}

    @property
    def device_hours(self) -> tuple[float, float, float]:
        """Of all devices together: least, expected and most by the spread of the timed batches."""
        return _hours([(part, part.images) for part in self.latents.values()])

    @property
    def wall_hours(self) -> tuple[float, float, float]:
        """With all devices at work: least, expected, most."""
        least, expected, most = (hours / self.devices for hours in self.device_hours)
        return least, expected, most

    @property
    def cost(self) -> tuple[float, float, float]:
        """Least, expected and most, in what `price_per_hour` is in."""
        least, expected, most = (hours * self.price_per_hour for hours in self.device_hours)
        return least, expected, most

    @property
    def online_hours(self) -> float | None:
        """Device hours of running the sources in training in place of a cache, for all students.

            students x epochs x images x seconds of all sources for an image

        None if a source was not timed, for there was nothing to do.
        """
        per_student = self._online_hours_per_student
        return None if per_student is None else self.students * per_student

    @property
    def break_even_students(self) -> int | None:
        """The number of student runs from which the cache is cheaper than running the sources in every epoch.

        The least n with n x epochs x images x seconds > what is to be computed x seconds. A cache costs its sources
        once; what it costs to read is left out, and so are the bytes it takes. A run that reads it has one draw of an
        image where sources in training could make a new one in every epoch.
        """
        per_student = self._online_hours_per_student
        return None if not per_student else math.floor(self.device_hours[1] / per_student) + 1

    @property
    def _online_hours_per_student(self) -> float | None:
        if any(not part.batch_seconds for part in self.latents.values()):
            return None
        return self.epochs * _hours([(part, self.n_images) for part in self.latents.values()])[1]

    @property
    def is_short_of_disk(self) -> bool:
        return self.free_bytes is not None and self.free_bytes < self.size_bytes


def _hours(parts: Sequence[tuple[ModalityPlan, int]]) -> tuple[float, float, float]:
    """Least, median and most for so many images of each."""
    least, median, most = (sum(part.seconds_per_image[at] * images for part, images in parts) / 3600 for at in range(3))
    return least, median, most


def write_plan(plan: CachePlan, path: Path, comments: Sequence[str] = ()) -> None:
    """The plan as YAML, whole or not at all.

    Args:
        comments: lines for who opens the file, which nothing reads.

    Raises:
        StoreError: if it cannot be written.
    """
    text = yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    head = "".join(f"# {' '.join(line.splitlines())}\n" for line in comments)
    with writing_to(path):
        make_folder(path.parent)
        write_durably(path, (head + text).encode())


def read_plan(path: Path) -> CachePlan:
    """The plan in a file.

    Raises:
        SpecError: if the file is missing or no plan of this version.
    """
    return read_yaml(path, CachePlan)


def read_listed(manifest_path: Path, image_root: Path | None) -> tuple[Manifest, str]:
    """A manifest, its images below another folder if one is named, and the sha256 of its file.

    Raises:
        ManifestError: if it cannot be read.
    """
    manifest = read_manifest(manifest_path)
    digest = hashlib.sha256(manifest_path.read_bytes()).hexdigest()
    return (manifest if image_root is None else replace(manifest, root=image_root)), digest


def planned_manifest(plan: CachePlan) -> Manifest:
    """The manifest that a plan was made of, if everything is still as it was then: its file, and what is to be done.

    Raises:
        ManifestError: if the manifest cannot be read or is another one.
        SpecError: if it is of other modalities than its spec.
        StoreError: if the store now lacks more than was planned, or was built from something else meanwhile.
    """
    manifest, digest = read_listed(Path(plan.manifest), None if plan.images is None else Path(plan.images))
    if digest != plan.manifest_sha256:
        raise ManifestError(
            f"`{plan.manifest}` is not the manifest of the plan: sha256 `{plan.manifest_sha256[:16]}…` →"
            f" `{digest[:16]}…`",
            hint="restore it, or run `dla cache plan` again",
        )
    planned, series = plan.series, series_of(plan.spec)
    if set(planned) != set(series):
        raise SpecError(
            f"the plan is of {name_some(list(planned))}, its spec of {name_some(series)}",
            hint="it was edited: run `dla cache plan` again",
        )
    recipes = {name: part.recipe for name, part in plan.latents.items()}
    survey = survey_build(manifest, plan.spec, plan.store, recipes, append=plan.append)
    for name, todo in survey.todo.items():
        if todo.n_images > planned[name].images:
            raise StoreError(
                f"the plan is of {planned[name].images} images of `{name}`, and `{plan.store}` now lacks"
                f" {todo.n_images}: {', '.join(f'{count} {reason}' for reason, count in todo.reasons.items())}",
                hint="it has changed since: run `dla cache plan` again",
            )
    if survey.has_damage and not plan.repair:
        raise StoreError(
            f"`{plan.store}` was damaged after the plan was made",
            hint="run `dla cache plan` again: it plans the repair",
        )
    return manifest


@dataclass(frozen=True, slots=True)
class PlannedSources:
    """Opens sources as `open_source` does, and no others than a plan was made with. It travels to other processes."""

    plan: CachePlan

    def __call__(self, spec: LatentSpec, device: str) -> "LatentSource":
        """
        Raises:
            RecipeMismatchError: if the source would make other latents than those planned.
        """
        from dla_cache.sources import open_source

        source = open_source(spec, device)
        planned = self.plan.latents[spec.modality.value].recipe
        if source.recipe != planned:
            source.close()
            old, new = (recipe.model_dump(mode="json") for recipe in (planned, source.recipe))
            raise RecipeMismatchError(
                f"`{spec.source}` is another source than the one that was planned with:"
                f" {'; '.join(changed_fields(old, new))}",
                hint="install the weights and version of then, or run `dla cache plan` again",
            )
        return source
