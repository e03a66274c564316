"""The table of sources: one row of plain data each."""

from dla_cache.sources.catalog import audio, caption, depth, embedded, encoders, motion, presets, shape, variation
from dla_cache.sources.catalog.entry import SourceEntry

SOURCES: dict[str, SourceEntry] = {
    **embedded.ENTRIES,
    **depth.ENTRIES,
    **caption.ENTRIES,
    **audio.ENTRIES,
    **shape.ENTRIES,
    **motion.ENTRIES,
    **variation.ENTRIES,
    **presets.ENTRIES,
    **encoders.ENTRIES,
}
"""By the name that a cache spec says."""
