"""What a contact sheet shows of a cached image, gathered from store, source and truth."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dla_cache.errors import SourceError, StoreError

if TYPE_CHECKING:
    from dla_cache.store import LatentStore


def draw_cache_sheet(store: "LatentStore", images: Path, image_ids: Sequence[str], path: Path) -> None:
    """Draws image | latent channels | decoded depth | true depth for some images of the `depth` modality.

    The last column is there only where `truth.parquet` lies beside the images.

    Raises:
        SourceError: if the store's depth comes from a source whose decoder is not at hand.
        MissingLatentError: if an image is not in the store.
        StoreError: if no image is named, as of a store without any.
    """
    import numpy as np

    from cli.picture import draw_sheet, grey_picture, signed_picture
    from dla_cache.data.export import TRUTH_NAME, read_truth
    from dla_cache.images import decode_image, read_image_bytes
    from dla_cache.manifest import path_of
    from dla_cache.sources.embedded import decode_depth

    if "depth" not in store.modalities or not store.recipe("depth").source.startswith("embedded-depth"):
        raise SourceError(
            "a picture needs `depth` latents of an embedded source, whose decoder is shipped",
            hint="look at the numbers with `dla cache inspect` without `--picture`",
        )
    if not image_ids:
        raise StoreError("there is no image to draw", hint="the store is empty: build it from a manifest with images")
    rows = np.array([store.rows.row_of(image_id) for image_id in image_ids], dtype=np.int64)
    latents = store.read("depth", rows).astype(np.float32)
    statistics = store.statistics("depth", sorted({store.rows[row].split for row in range(len(store.rows))}))
    std = np.where(statistics.std > 0, statistics.std, 1)
    standardised = (latents - statistics.mean[:, None, None]) / std[:, None, None]
    decoded = decode_depth(latents)
    truth = read_truth(images / TRUTH_NAME) if (images / TRUTH_NAME).exists() else {}

    headers = ["image", *(f"latent {channel}" for channel in range(latents.shape[1])), "decoded depth"]
    sheet = []
    for index, row in enumerate(rows.tolist()):
        listed = store.rows[row]
        pixels = decode_image(read_image_bytes(path_of(images, listed.uri), listed), listed.image_id)
        pictures = [pixels.transpose(1, 2, 0)]
        pictures += [signed_picture(channel) for channel in standardised[index]]
        pictures.append(grey_picture(decoded[index]))
        if listed.image_id in truth:
            pictures.append(grey_picture(truth[listed.image_id].depth / 255))
        sheet.append((f"{listed.image_id} ({listed.split})", pictures))
    draw_sheet(path, [*headers, "true depth"] if truth else headers, sheet)
