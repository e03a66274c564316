"""The bytes of a tar file that are a function of names and contents and nothing else.

USTAR, owned by nobody, of the beginning of time. A name that does not fit is told by a PAX header before, as
stock tar readers know it.
"""

import re
from collections.abc import Sequence

from dla_cache.errors import StoreError, name_some

BLOCK_BYTES = 512
"""Headers and contents begin at multiples of this."""

NAME_BYTES = 100
"""Longer names do not fit the header: ours have no folder that could go into its prefix."""

END = bytes(2 * BLOCK_BYTES)

IMAGE_SUFFIXES = {
    suffix: re.compile(start, re.DOTALL)
    for suffix, start in {
        "jpg": rb"\xff\xd8\xff",
        "png": rb"\x89PNG\r\n\x1a\n",
        "gif": rb"GIF8[79]a",
        "webp": rb"RIFF....WEBP",
        "tif": rb"II\*\0|MM\0\*",
        "bmp": rb"BM",
        "jp2": rb"\0{3}\x0cjP  ",
        "avif": rb".{4}ftypavif",
        "ppm": rb"P[36]\s",
        "pgm": rb"P[25]\s",
    }.items()
}
"""Suffix of a member by its first bytes: the content decides, as it does when an image is decoded."""


def image_suffix(content: bytes) -> str:
    """`jpg`, `png` and so on; `img` for what is none of the usual formats."""
    return next((suffix for suffix, start in IMAGE_SUFFIXES.items() if start.match(content)), "img")


def encode_tar(names: Sequence[str], contents: Sequence[bytes]) -> tuple[bytes, list[int]]:
    """A tar of these members, and the byte at which each one's content begins.

    Raises:
        StoreError: if a name is more than `<image ID>.<suffix>`.
    """
    unsafe = [name for name in names if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[a-z0-9-]+)+", name)]
    if unsafe:
        raise StoreError(
            f"names that a tar of ours cannot hold: {name_some(unsafe)}",
            hint="image IDs are letters, digits, `_` and `-`: make the manifest and the store again",
        )
    parts: list[bytes] = []
    offsets = []
    end = 0
    for name, content in zip(names, contents, strict=True):
        header = _header(name, len(content))
        offsets.append(end + len(header))
        parts += [header, content, _padding(len(content))]
        end += len(header) + len(content) + len(parts[-1])
    return b"".join([*parts, END]), offsets


def _header(name: str, size: int) -> bytes:
    if len(name) <= NAME_BYTES:
        return _block(name, size, b"0")
    record = _pax_record(name)
    long_name = _block("././@PaxHeader", len(record), b"x") + record + _padding(len(record))
    return long_name + _block(name[:NAME_BYTES], size, b"0")


def _pax_record(name: str) -> bytes:
    """`<length> path=<name>` and a line feed, the length being that of all of it."""
    rest = f" path={name}\n"
    length = len(rest) + len(str(len(rest)))
    return f"{len(rest) + len(str(length))}{rest}".encode()


def _block(name: str, size: int, kind: bytes) -> bytes:
    """One header.

    Source: POSIX.1-2017, pax, "ustar Interchange Format".
    """
    fields = [
        name.encode().ljust(NAME_BYTES, b"\0"),
        b"0000644\0" + b"0000000\0" * 2,  # mode, user, group
        b"%011o\0" % size,
        b"%011o\0" % 0,  # time
        b" " * 8,  # the checksum counts as spaces
        kind.ljust(101, b"\0"),  # and no link's name
        b"ustar\x0000".ljust(72, b"\0"),  # and no user's or group's name
        b"0000000\0" * 2,  # device
    ]
    block = b"".join(fields).ljust(BLOCK_BYTES, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK_BYTES)
