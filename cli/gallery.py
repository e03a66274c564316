"""Pictures of what students see of a modality that they never saw: image, true latent and predicted ones, decoded."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from trainer.alignment_study import AlignmentPlan
    from trainer.gallery import Gallery

LONGEST_HEADER = 15
"""Characters over a column of the sheet."""


@dataclass(frozen=True, slots=True)
class GalleryPicture:
    """One modality's contact sheet, as it was written."""

    path: Path
    gallery: "Gallery"


def draw_galleries(plan: "AlignmentPlan", out: Path) -> tuple[list[GalleryPicture], list[str]]:
    """One PNG for each modality whose decoder is shipped, as `out/gallery-MODALITY.png`; and why others have none."""
    from cli.sheet import decoder_of
    from trainer.gallery import show_gallery

    drawn, without = [], []
    for modality in plan.modalities:
        recipe = plan.store.recipe(modality)
        decode = decoder_of(recipe.source)
        if decode is None:
            without.append(f"no picture of {modality} is drawn: dla has no decoder of `{recipe.source}` at hand")
            continue
        if recipe.format.kind == "codes":
            without.append(f"no picture of {modality} is drawn: a linear probe gives numbers, and these are codes")
            continue
        gallery = show_gallery(plan, modality)
        path = out / f"gallery-{modality}.png"
        draw_gallery(path, gallery, plan, decode)
        drawn.append(GalleryPicture(path, gallery))
    return drawn, without


def draw_gallery(
    path: Path,
    gallery: "Gallery",
    plan: "AlignmentPlan",
    decode: "Callable[[NDArray[np.floating]], NDArray[np.float32]]",
) -> None:
    """Writes the contact sheet of one modality.

    Args:
        decode: latents [G, *shape] to pictures [G, H, W] in [0, 1].

    Raises:
        StoreError: if the file cannot be written.
        ImageError: if an image cannot be read.
    """
    import numpy as np

    from cli.page_charts import shorten
    from cli.picture import TILE, draw_sheet, grey_picture
    from dla_cache.images import centre_square, decode_image
    from dla_cache.stored_images import image_contents

    rows = np.array([plan.store.rows.row_of(image_id) for image_id in gallery.image_ids], np.int64)
    contents = image_contents(plan.store, plan.images, rows)
    columns = [gallery.truth, *(one.latents for one in gallery.seen), gallery.null.latents]
    decoded = [decode(latents) for latents in columns]
    sheet = []
    for number, (image_id, label) in enumerate(zip(gallery.image_ids, gallery.labels, strict=True)):
        pixels = centre_square(decode_image(contents[number], image_id), TILE)
        pictures = [pixels.transpose(1, 2, 0), *(grey_picture(column[number]) for column in decoded)]
        sheet.append((f"{label}: {image_id}", pictures))
    headers = ["image", "true latent", *(one.arm for one in gallery.seen), "null"]
    draw_sheet(path, [shorten(header, LONGEST_HEADER) for header in headers], sheet)
