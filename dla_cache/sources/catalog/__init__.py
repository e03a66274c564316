"""The table of sources: one row of plain data each."""

from dla_cache.sources.catalog import depth, embedded
from dla_cache.sources.catalog.entry import SourceEntry

SOURCES: dict[str, SourceEntry] = {
    **embedded.ENTRIES,
    **depth.ENTRIES,
}
"""By the name that a cache spec says."""
