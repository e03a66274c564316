"""Names in a store's folder that are the same in every layout and belong to no series."""

CARD = "README.md"
"""The cache card, for people; it decides nothing."""

CARD_TITLE = "# Undecoded latents of "
"""What every card begins with: a README that begins otherwise is its owner's, and stays."""

UNFINISHED = "takedown.json"
"""What a removal of images still has to do; see `dla_cache.takedown`."""

STAGING = ".takedown"
"""Folder of what such a removal has read and not yet written back."""
