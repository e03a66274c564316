"""What torture finds and the code does not notice yet; an entry goes with its cause; docs/torture.md has them."""

import re

KNOWN = (
    (r"verify found nothing at Damage\(.*'README\.md'", "verify does not read the card, which decides nothing"),
    (r"verify found nothing at Damage\(.*\.json'", "white space between the values of a JSON file is not compared"),
    (r"leads out: .*files outside of the store were changed", "writing follows links that lead out of the store"),
    (r"tar's member, webdataset, verify|member that is a link, \w+, verify", "names in a tar are not compared"),
    (r"never ends: .*(no answer|MemoryError|ended with)", "a part of a store may be a pipe or a device"),
    (r"deleted: \w+, a shard cut in place.*ended with -7", "a file that is cut in place while it is mapped: SIGBUS"),
)
"""A pattern of what is said of a failure, and why it is none for now."""


def known_gap(said: str) -> str | None:
    """The reason why a failure is known; None if it is not."""
    return next((why for pattern, why in KNOWN if re.search(pattern, said, re.DOTALL)), None)
