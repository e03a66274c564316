"""Names in a store's folder that are the same in every layout and belong to no series."""

import os
from contextlib import suppress
from pathlib import Path

from dla_cache.errors import StoreError

CARD = "README.md"
"""The cache card, for people; it decides nothing."""

CARD_TITLE = "# Undecoded latents of "
"""What every card begins with: a README that begins otherwise is its owner's, and stays."""

UNFINISHED = "takedown.json"
"""What a removal of images still has to do; see `dla_cache.takedown`."""

STAGING = ".takedown"
"""Folder of what such a removal has read and not yet written back."""

ADOPTED = "adopted.json"
"""Changes of sources that were declared harmless; see `dla_cache.store.adopted`."""


QUARANTINE = "quarantine.json"
"""Images of which the last builds could make no latent, and why; see `dla_cache.quarantine`."""


def refuse_links(store: Path) -> None:
    """Passes a store with no link among its folders and the files beside them: what is written would lie elsewhere.

    Not looked for in the folders of shards, of which there may be a million: a shard is put there by a rename, which
    replaces a link of its name. The store's own folder may be reached by a link.

    Raises:
        StoreError: naming the first link.
    """
    for folder in (store, store / "commits", store / "latents", store / "rows"):
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                if entry.is_symlink():
                    raise StoreError(
                        f"`{entry.path}` is a link: nothing is written into a store with links",
                        hint="put what it leads to in its place; the store as a whole may be reached by a link",
                    )
