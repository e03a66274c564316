"""The contact sheet: what went into the cache, what came out, and what it would decode to."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dla_cache.durable import writing_to

TILE = 96
"""Side of a picture on the sheet, in pixels."""
GAP = 6
HEADER = 20
INK = (30, 30, 30)
PAPER = (255, 255, 255)

Picture = NDArray[np.uint8]
"""uint8 [H, W, 3]."""


def draw_sheet(path: Path, headers: Sequence[str], rows: Sequence[tuple[str, Sequence[Picture]]]) -> None:
    """Writes a PNG: one row an image with its name below, one column a kind of picture.

    Raises:
        StoreError: if the file cannot be written.
    """
    font = ImageFont.load_default(size=12)
    row_height = TILE + HEADER + GAP
    width = len(headers) * (TILE + GAP) + GAP
    sheet = Image.new("RGB", (width, HEADER + GAP + len(rows) * row_height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, header in enumerate(headers):
        pen.text((GAP + column * (TILE + GAP), GAP // 2), header, INK, font)
    for index, (name, pictures) in enumerate(rows):
        top = HEADER + GAP + index * row_height
        for column, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (GAP + column * (TILE + GAP), top))
        pen.text((GAP, top + TILE + 2), name, INK, font)
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, format="PNG")


def grey_picture(values: NDArray[np.floating]) -> Picture:
    """[H, W] in [0, 1] as grey."""
    return np.repeat(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)


def signed_picture(values: NDArray[np.floating]) -> Picture:
    """[H, W] standardised: blue below the mean, white at it, red above; full colour at 2.5 deviations."""
    strength = np.clip(values / 2.5, -1, 1)[..., None]
    red, blue, white = np.array([178, 24, 43]), np.array([33, 102, 172]), np.array([247, 247, 247])
    target = np.where(strength > 0, red, blue)
    picture: Picture = np.rint(white + (target - white) * np.abs(strength)).astype(np.uint8)
    return picture
