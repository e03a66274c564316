"""The confusion matrix as a picture: which classes are taken for which."""

import io
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cli.picture import INK, PAPER

LARGEST_CELL, LARGEST_MATRIX = 56, 1200
"""Pixels."""
SMALLEST_NAMED, SMALLEST_NUMBERED = 12, 30
"""Cells so small, in pixels, still get a name at their row, or their number."""
LONGEST_NAME = 24
RIGHT, WRONG = np.array([8, 81, 156]), np.array([165, 15, 21])
MARGIN = 12
CAPTION = "rows: the class, columns: what was predicted; right blue, wrong red, darker with the share of the row"


def draw_confusion(counts: NDArray[np.int64], class_names: Sequence[str], title: str) -> bytes:
    """A PNG of the counts [K, K], class by prediction; names and numbers where there is room."""
    cell = max(1, min(LARGEST_CELL, LARGEST_MATRIX // len(counts)))
    size = cell * len(counts)
    font = ImageFont.load_default(size=15 if cell >= 20 else 11)
    names = [drawable(*numbered) for numbered in enumerate(class_names)] if cell >= SMALLEST_NAMED else []
    left = MARGIN + max((round(font.getlength(name)) + MARGIN for name in names), default=0)
    top = 4 * MARGIN + 24 + (left - MARGIN)
    shares = [
        f"{100 * row[number] / row.sum():.0f} % of {row.sum()}" if row.any() else "no image"
        for number, row in enumerate(counts)
    ]
    right = max((round(font.getlength(share)) + MARGIN for share in shares), default=0) if names else 0
    width = max(left + size + right + MARGIN, 2 * MARGIN + round(ImageFont.load_default(size=13).getlength(CAPTION)))
    picture = Image.new("RGB", (width, top + size + MARGIN), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((MARGIN, MARGIN), title, INK, ImageFont.load_default(size=17))
    pen.text((MARGIN, MARGIN + 24), CAPTION, INK, ImageFont.load_default(size=13))
    cells = Image.fromarray(colours_of(counts)).resize((size, size), Image.Resampling.NEAREST)
    picture.paste(cells, (left, top))
    for number, name in enumerate(names):
        middle = number * cell + cell // 2
        pen.text((left - MARGIN // 2, top + middle), name, INK, font, anchor="rm")
        pen.text((left + size + MARGIN // 2, top + middle), shares[number], INK, font, anchor="lm")
        upright = sideways(name, font)
        picture.paste(upright, (left + middle - upright.width // 2, top - MARGIN // 2 - upright.height))
    if cell >= SMALLEST_NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                dark = count > 0.3 * counts[row].sum()
                place = (left + column * cell + cell // 2, top + row * cell + cell // 2)
                pen.text(place, str(count), PAPER if dark else INK, font, anchor="mm")
    pen.rectangle((left - 1, top - 1, left + size, top + size), outline=(160, 160, 160))
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()


def colours_of(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """uint8 [K, K, 3], one pixel a cell; the root of the share, so that one image in a hundred is seen."""
    strength = np.sqrt(counts / np.maximum(1, counts.sum(axis=1, keepdims=True)))[..., None]
    full = np.where(np.eye(len(counts), dtype=bool)[..., None], RIGHT, WRONG)
    colours: NDArray[np.uint8] = np.rint(255 + (full - 255) * strength).astype(np.uint8)
    return colours


def sideways(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    """The text on paper, to be read from below."""
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("RGB", (round(right - left) + 2, round(bottom - top) + 2), PAPER)
    ImageDraw.Draw(image).text((1 - left, 1 - top), text, INK, font)
    return image.rotate(90, expand=True)


def drawable(number: int, name: str) -> str:
    """A class's name in the letters that Pillow's font has, which are ASCII, without accents; else its number."""
    bare = "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))
    if not bare.isascii() or not bare.isprintable():
        return f"class {number}"
    return bare if len(bare) <= LONGEST_NAME else f"{bare[: LONGEST_NAME - 3]}..."
