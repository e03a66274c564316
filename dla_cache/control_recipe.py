"""What a control is called, and how its recipe tells it from the real thing."""

from collections.abc import Mapping
from typing import Literal

from dla_cache.spec import Recipe

SOURCE = "control"
"""What the recipe of control latents names as its source; no spec can: nothing computes them from an image."""

Kind = Literal[
    "shuffled",
    "shuffled-within-class",
    "shuffled-across-classes",
    "gaussian",
    "gaussian-by-place",
    "label-embedding",
    "fabricated",
]

MEANINGS: Mapping[Kind, str] = {
    "shuffled": "the latent of another image, whatever its class",
    "shuffled-within-class": "the latent of another image of the same class",
    "shuffled-across-classes": "the latent of an image of another class",
    "gaussian": "noise with the mean and standard deviation of each channel",
    "gaussian-by-place": "noise with the mean and standard deviation of each number",
    "label-embedding": "a random vector of the image's class",
    "fabricated": "a random map of another model's features",
}
"""What stands in the place of an image's latent."""


def control_recipe(real: Recipe, kind: Kind, *, seed: int, made_of: Mapping[str, str | float]) -> Recipe:
    """The recipe of the control of real latents: the same format, so that a trainer notices nothing, and another hash.

    Args:
        made_of: whatever else decides the numbers, such as content hashes.
    """
    return Recipe(
        modality=real.modality,
        source=SOURCE,
        weights_sha256="",
        parameters={"kind": kind, "real_source": real.source, "real_recipe": real.hash, **made_of},
        seed=seed,
        source_view_size=real.source_view_size,
        format=real.format,
    )


def is_control(recipe: Recipe) -> bool:
    """Whether latents were composed of others, to be compared with them."""
    return recipe.source == SOURCE


def control_note(recipe: Recipe) -> str:
    """What must stand beside every figure of control latents; empty of others."""
    if not is_control(recipe):
        return ""
    kind, real = (str(recipe.parameters.get(name, "not known")) for name in ("kind", "real_source"))
    meaning = next((meaning for known, meaning in MEANINGS.items() if known == kind), "not the latent of this image")
    return f"control `{kind}` of `{real}`, seed {recipe.seed}: {meaning}"


def first_source(recipe: Recipe) -> str:
    """The source that latents, or those that they are a control of, came from: its licence is theirs."""
    return str(recipe.parameters.get("real_source", recipe.source)) if is_control(recipe) else recipe.source
