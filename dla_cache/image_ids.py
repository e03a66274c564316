"""Image IDs: names that are safe in file names and URLs, made of any text and, but for very long ones, reversible."""

import hashlib
import re

from dla_cache.errors import ManifestError

MAX_LENGTH = 200
"""Characters, which are bytes too. A file name may have 255, and needs room for a suffix."""

DIGEST_LENGTH = 32
"""Hexadecimal digits of the SHA-256 that stands for the end of a text too long."""

ESCAPES = {"-": "--", "/": "-_", ".": "-p"}
"""The commonest have short escapes; another character is `-<its code point in hexadecimal>-`."""

ESCAPE = re.compile("-(?:([-_p])|([0-9a-f]{1,6})-)")


def escape_id(text: str) -> str:
    """The image ID `[A-Za-z0-9_-]+` of a path or name; different texts have different IDs.

    Letters, digits and `_` stay as they are, so that `cat/a_1.jpg` becomes `cat-_a_1-pjpg`. An ID longer than
    `MAX_LENGTH` is cut, and its end is `-h` and a hash of the whole text: the one case that does not reverse.
    Texts that differ in upper and lower case alone do so as IDs.

    Raises:
        ManifestError: if the text is empty.
    """
    if not text:
        raise ManifestError("an empty text makes no image ID", hint="name each image")
    image_id = re.sub("[^A-Za-z0-9_]", lambda found: ESCAPES.get(found[0], f"-{ord(found[0]):x}-"), text)
    if len(image_id) <= MAX_LENGTH:
        return image_id
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST_LENGTH]
    return f"{image_id[: MAX_LENGTH - len(digest) - 2]}-h{digest}"


def unescape_id(image_id: str) -> str:
    """The text that `escape_id` made the ID of.

    Raises:
        ManifestError: if the ID was cut, or is none that `escape_id` makes.
    """
    shortcuts = {escape[1]: character for character, escape in ESCAPES.items()}
    try:
        text = ESCAPE.sub(lambda found: shortcuts[found[1]] if found[1] else chr(int(found[2], 16)), image_id)
        is_ours = escape_id(text) == image_id
    except (ValueError, OverflowError):
        is_ours = False
    if is_ours:
        return text
    if len(image_id) == MAX_LENGTH and re.search(f"-h[0-9a-f]{{{DIGEST_LENGTH}}}$", image_id):
        raise ManifestError(f"image ID `{image_id}` was cut: its text was too long", hint="the manifest has its `uri`")
    raise ManifestError(f"image ID `{image_id}` was not made of a text by escaping", hint="it stands for itself")
