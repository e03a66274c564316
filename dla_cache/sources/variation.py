"""Variations of an image: what settings of few steps cannot be, and arguments that depend on the view."""

from collections.abc import Mapping
from typing import Any

from dla_cache.errors import SourceError
from dla_cache.sources.diffusers_source import FixUp


class ImageToImage(FixUp):
    """Begins at the image with some noise instead of at noise: the first steps are left out."""

    @classmethod
    def check(cls, source: str, settings: Mapping[str, Any]) -> None:
        """Refuses settings that leave no step: some pipelines put the noisy image out then, others fail late."""
        steps, strength = check_strength(source, settings)
        if int(steps * strength) < 1:
            raise SourceError(
                f"`{source}` has no step left: `num_inference_steps` {steps} times `strength` {strength} is"
                f" {steps * strength:g}, and less than one",
                hint=f"set `strength` to {1 / steps:.2g} or more, or take more steps",
            )


class ConsistencyImageToImage(FixUp):
    """A latent consistency model: all of its steps lie in the part of the schedule that the strength leaves."""

    SCHEDULE = 50
    """Steps of the schedule that these models were distilled on, `original_inference_steps`."""

    @classmethod
    def check(cls, source: str, settings: Mapping[str, Any]) -> None:
        steps, strength = check_strength(source, settings)
        n_left = int(cls.SCHEDULE * strength)
        if n_left < steps:
            raise SourceError(
                f"`{source}` cannot take {steps} steps at `strength` {strength:g}: it leaves {n_left} of the"
                f" {cls.SCHEDULE} that the model knows",
                hint=f"set `strength` to {steps / cls.SCHEDULE:g} or more, or take fewer steps",
            )


class FlowImageToImage(FixUp):
    """Flux: rounds the number of steps that are left out down, and begins at noise alone if that is none."""

    @classmethod
    def check(cls, source: str, settings: Mapping[str, Any]) -> None:
        steps, strength = check_strength(source, settings)
        if int(steps - steps * strength) < 1:
            raise SourceError(
                f"`{source}` would see nothing of its image: of {steps} steps, `strength` {strength:g} leaves none out,"
                " and the first begins at noise",
                hint=(
                    f"set `strength` to {1 - 1 / steps:.2g} or less"
                    if steps > 1
                    else "take two steps or more, and a `strength` of 0.5 or less"
                ),
            )


def check_strength(source: str, settings: Mapping[str, Any]) -> tuple[int, float]:
    """Number of steps and strength.

    Raises:
        SourceError: if there is no step, or the strength is not in (0, 1].
    """
    steps, strength = int(settings["num_inference_steps"]), float(settings["strength"])
    if steps < 1:
        raise SourceError(f"`num_inference_steps` of `{source}` is {steps}", hint="set it to 1 or more")
    if not 0 < strength <= 1:
        raise SourceError(
            f"`strength` of `{source}` is {strength:g}",
            hint="it says how far from its image a variation may go: above 0, and 1 at most",
        )
    return steps, strength


class OwnArea(FixUp):
    """Flux Kontext resizes every image to about a megapixel unless it is told the area of the view."""

    def arguments(self, n_images: int) -> Mapping[str, Any]:
        return {"max_area": self.view_size**2, "_auto_resize": False}
