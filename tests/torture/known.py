"""What torture finds and the code does not notice yet; an entry goes with its cause; docs/torture.md has them."""

import re

KNOWN = (
    (r"deleted: \w+, a shard cut in place.*ended with -7", "a file that is cut in place while it is mapped: SIGBUS"),
)
"""A pattern of what is said of a failure, and why it is none for now."""


def known_gap(said: str) -> str | None:
    """The reason why a failure is known; None if it is not."""
    return next((why for pattern, why in KNOWN if re.search(pattern, said, re.DOTALL)), None)
