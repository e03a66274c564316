"""A folder of files that image folders really hold, and what must become of each."""

import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ORIENTATION = 0x0112  # the EXIF tag
SIZE = (40, 20)


@dataclass(frozen=True, slots=True)
class HostileFile:
    """One entry of the folder."""

    name: str
    outcome: str
    """`listed`, `quarantined` or `skipped`."""
    detail: str = ""
    """A part of the reason of a quarantined one, the kind of a skipped one."""
    size: tuple[int, int] = SIZE
    """Width and height of a listed one, upright."""


def write_hostile_files(folder: Path) -> list[HostileFile]:
    """Writes the files into `folder`, which is made, and one that a link leads to beside it.

    There is no subfolder with an image, so the folder's layout is flat.
    """
    folder.mkdir(parents=True)
    outside = folder.resolve().with_name(f"{folder.name}-outside")
    outside.mkdir()
    (outside / "secret.jpg").write_bytes(encoded("JPEG"))
    written = [
        *_write_unusual_images(folder),
        *_write_unusual_names(folder),
        *_write_broken_files(folder),
        *_write_what_is_no_file(folder, outside),
        *_write_what_is_no_image(folder),
    ]
    assert len({entry.name for entry in written}) == len(written)
    return written


def encoded(format_name: str, image: Image.Image | None = None, **settings: object) -> bytes:
    """A picture, by default of 40 x 20 pixels, in a file format of Pillow's."""
    buffer = io.BytesIO()
    (image or picture()).save(buffer, format=format_name, **settings)
    return buffer.getvalue()


def picture(size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    """Coloured lines that tell up from down, other ones for each seed."""
    image = Image.new("RGB", size, (200, 200, 210))
    draw = ImageDraw.Draw(image)
    for start, end in np.random.default_rng(seed).integers(0, min(size), (4, 2, 2)).tolist():
        draw.line([*start, *end], fill=(start[0] * 5 % 256, end[1] * 9 % 256, 90), width=2)
    return image


def _write_unusual_images(folder: Path) -> list[HostileFile]:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    two = {"save_all": True, "append_images": [picture(seed=9)]}
    sixteen = Image.fromarray(np.arange(800, dtype=np.uint16).reshape(20, 40) * 80)
    alpha = picture(seed=5)
    alpha.putalpha(Image.linear_gradient("L").resize(SIZE))
    contents = {
        "exif-turned.jpg": encoded("JPEG", picture(seed=1), exif=exif),
        "cmyk.jpg": encoded("JPEG", picture(seed=2).convert("CMYK")),
        "grey.jpg": encoded("JPEG", picture(seed=3).convert("L")),
        "sixteen-bit.png": encoded("PNG", sixteen),
        "palette.png": encoded("PNG", picture(seed=4).convert("P"), transparency=0),
        "alpha.png": encoded("PNG", alpha),
        "animated.gif": encoded("GIF", picture(seed=6), **two),
        "animated.webp": encoded("WEBP", picture(seed=7), **two),
        "one-bit.bmp": encoded("BMP", picture(seed=8).convert("1")),
        "pages.tiff": encoded("TIFF", picture(seed=10), **two),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [HostileFile(name, "listed", size=(20, 40) if name.startswith("exif") else SIZE) for name in contents]


def _write_unusual_names(folder: Path) -> list[HostileFile]:
    listed = [
        "UPPER.JPG",
        "png-named.jpg",
        "no extension",
        "photo.jpg_large",
        "with  spaces (1).jpg",
        "ünïcödé-猫-🐱.jpg",
        "new\nline.jpg",
        "\x1b[31mred.jpg",
        "[bold]markup[red].jpg",
        "-rf.jpg",
        "$(touch pwned).jpg",
        "%s{0}.jpg",
        "a.b.c.jpg",
        f"{'long' * 60}.jpg",
    ]
    for seed, name in enumerate(listed):
        format_name = "PNG" if name == "png-named.jpg" else "JPEG"
        (folder / name).write_bytes(encoded(format_name, picture(seed=20 + seed)))
    quarantined = {
        os.fsdecode(b"caf\xe9.jpg"): "UTF-8",
        "back\\slash.jpg": "backslash",
        "part.jpg#1+2": "byte range",
        "camera.dng": "raw",
    }
    for name in quarantined:
        (folder / name).write_bytes(encoded("TIFF" if name.endswith("dng") else "JPEG"))
    return [
        *(HostileFile(name, "listed") for name in listed),
        *(HostileFile(name, "quarantined", reason) for name, reason in quarantined.items()),
    ]


def _write_broken_files(folder: Path) -> list[HostileFile]:
    png, jpeg = encoded("PNG"), encoded("JPEG", picture((200, 100)))
    bomb = struct.pack(">4sIIBBBBB", b"IHDR", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = png.index(b"IDAT") + 10
    contents = {
        "empty.jpg": (b"", "empty"),
        "cut-off.jpg": (jpeg[: len(jpeg) // 2], "cannot be decoded"),
        "cut-off.png": (png[: len(png) // 2], "cannot be decoded"),
        "garbled.png": (png[:pixels] + bytes(reversed(png[pixels:])), "cannot be decoded"),
        "bomb.png": (png[:12] + bomb + struct.pack(">I", zlib.crc32(bomb)) + png[33:], "pixels"),
        "text.jpg": (b"to be downloaded later\n", "no known image format"),
        "page.png": (b"<!DOCTYPE html><title>404</title>", "HTML"),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "cannot be decoded"),
        "zeros.jpg": (bytes(4096), "cannot be decoded"),
        "float.tif": (encoded("TIFF", Image.new("F", SIZE)), "no known range"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    with (folder / "terabyte.jpg").open("wb") as file:  # sparse: it takes no room
        file.truncate(2**40)
    unreadable = folder / "unreadable.jpg"
    unreadable.write_bytes(b"no image either, for root may read it\n")
    unreadable.chmod(0)
    return [
        *(HostileFile(name, "quarantined", reason) for name, (_, reason) in contents.items()),
        HostileFile("terabyte.jpg", "quarantined", "bytes"),
        HostileFile("unreadable.jpg", "quarantined", "cannot be"),
    ]


def _write_what_is_no_file(folder: Path, outside: Path) -> list[HostileFile]:
    (folder / "folder.jpg").mkdir()  # and nothing in it, so it is nowhere counted
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "nowhere.jpg").symlink_to("gone.jpg")
    (folder / "leads-out.jpg").symlink_to(outside / "secret.jpg")
    (folder / "leads-out").symlink_to(outside)
    (folder / "leads-out.v2").symlink_to(outside)
    (folder / "nowhere").symlink_to("gone")
    (folder / "nowhere.txt").symlink_to("gone.txt")
    (folder / "up").symlink_to(".")
    (folder / "inside.jpg").symlink_to("grey.jpg")
    os.mkfifo(folder / "pipe.jpg")
    return [
        HostileFile("loop.jpg", "quarantined", "cannot be read"),
        HostileFile("nowhere.jpg", "quarantined", "cannot be read"),
        HostileFile("leads-out.jpg", "quarantined", "leads out"),
        HostileFile("leads-out", "quarantined", "leads out"),
        HostileFile("leads-out.v2", "quarantined", "leads out"),
        HostileFile("nowhere", "quarantined", "cannot be read"),
        HostileFile("nowhere.txt", "skipped", ".txt"),
        HostileFile("pipe.jpg", "quarantined", "pipe"),
        HostileFile("up", "skipped", "link to a folder"),
        HostileFile("inside.jpg", "listed"),
    ]


def _write_what_is_no_image(folder: Path) -> list[HostileFile]:
    skipped = {
        "notes.txt": ".txt",
        "Thumbs.db": ".db",
        "clip.MP4": ".mp4",
        "LICENSE": "of other names",
        ".hidden.jpg": "hidden",
        "._apple.jpg": "hidden",
    }
    for name in skipped:
        (folder / name).write_bytes(b"something else\n")
    (folder / ".git").mkdir()
    (folder / ".git" / "object.jpg").write_bytes(encoded("JPEG"))
    return [HostileFile(name, "skipped", kind) for name, kind in {**skipped, ".git": "hidden"}.items()]
