"""What a contact sheet shows of cached images, gathered from store, sources and truth."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dla_cache.errors import SourceError, StoreError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dla_cache.store import LatentStore

N_CHANNELS = 8
"""Latent channels on a sheet, shared by the modalities."""


def draw_cache_sheet(store: "LatentStore", images: Path | None, image_ids: Sequence[str], path: Path) -> None:
    """Draws image | per modality: latent channels, decoded picture | true depth for some images.

    A latent is decoded only where its source's decoder is shipped; true depth is there only where
    `truth.parquet` lies beside the images.

    Args:
        images: folder that the images' paths start from; None takes them out of the store.

    Raises:
        SourceError: if no modality of the store has a grid of channels to draw.
        MissingLatentError: if an image is not in the store.
        StoreError: if no image is named, as of a store without any.
    """
    import numpy as np

    from cli.picture import TILE, draw_sheet, grey_picture
    from dla_cache.data.export import TRUTH_NAME, read_truth
    from dla_cache.images import decode_image
    from dla_cache.stored_images import image_contents

    drawn = [name for name in store.modalities if has_pictures(store, name)]
    if not drawn:
        raise SourceError(
            "no modality of this store has channels on a grid, so there is nothing to draw",
            hint="look at the numbers with `dla cache inspect` without `--picture`",
        )
    if not image_ids:
        raise StoreError("there is no image to draw", hint="the store is empty: build it from a manifest with images")
    rows = np.array([store.rows.row_of(image_id) for image_id in image_ids], dtype=np.int64)
    truth = read_truth(images / TRUTH_NAME) if images is not None and (images / TRUTH_NAME).exists() else {}
    contents = image_contents(store, images, rows)
    columns = {name: modality_pictures(store, name, rows, N_CHANNELS // len(drawn)) for name in drawn}

    headers = ["image", *(header for of_one in columns.values() for header, _ in of_one)]
    sheet = []
    for index, row in enumerate(rows.tolist()):
        listed = store.rows[row]
        pixels = decode_image(contents[index], listed.image_id, min_side=TILE)
        pictures = [pixels.transpose(1, 2, 0), *(column[index] for of_one in columns.values() for _, column in of_one)]
        if listed.image_id in truth:
            pictures.append(grey_picture(truth[listed.image_id].depth / 255))
        sheet.append((f"{listed.image_id} ({listed.split})", pictures))
    draw_sheet(path, [*headers, "true depth"] if truth else headers, sheet)


def has_pictures(store: "LatentStore", modality: str) -> bool:
    """Whether a latent of the modality is a stack of channels, each a picture."""
    axes = store.recipe(modality).format.axes
    return len(axes) == 3 and axes[0] == "channel"


def modality_pictures(
    store: "LatentStore", modality: str, rows: "NDArray[np.int64]", n_channels: int
) -> list[tuple[str, list[Any]]]:
    """The columns of a modality: a header and one picture an image, for its first channels and what they decode to."""
    import numpy as np

    from cli.picture import grey_picture, signed_picture

    latents = store.read(modality, rows).astype(np.float32)
    statistics = store.statistics(modality, sorted(store.rows.splits))
    std = np.where(statistics.std > 0, statistics.std, 1)
    standardised = (latents - statistics.mean[:, None, None]) / std[:, None, None]
    columns: list[tuple[str, list[Any]]] = [
        (f"{modality} {channel}", [signed_picture(sample[channel]) for sample in standardised])
        for channel in range(min(n_channels, latents.shape[1]))
    ]
    decode = decoder_of(store.recipe(modality).source)
    if decode is not None:
        header = "decoded depth" if modality == "depth" else "decoded sound"
        columns.append((header, [grey_picture(picture) for picture in decode(latents)]))
    return columns


def decoder_of(source: str) -> "Callable[[NDArray[np.floating]], NDArray[np.float32]] | None":
    """What turns latents of a source into pictures [B, H, W] in [0, 1], where it is shipped."""
    from dla_cache.sources.embedded import decode_audio, decode_depth

    if source.startswith("embedded-depth"):
        return decode_depth
    if source.startswith("embedded-audio"):
        return lambda latents: decode_audio(latents)[:, ::-1]  # low tones at the bottom, as a spectrogram is read
    return None
