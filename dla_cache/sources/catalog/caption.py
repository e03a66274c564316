"""What a captioning model says of an image."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dla_cache.modality import Modality
from dla_cache.sources.catalog.entry import CAPTIONER, TEXT_SETTINGS, Scalar, SourceEntry
from dla_cache.spec import Axis

TOKENS = TEXT_SETTINGS["caption_tokens"]


@dataclass(frozen=True, slots=True)
class CaptionRow:
    """A captioning model as a source of its own."""

    space: str
    """What the numbers are, and what makes words of them."""
    axes: tuple[Axis, ...] = ("codebook", "step")
    view_size: int = 384
    """Side in pixels of the square view, unless a spec says another `view_size`."""
    settings: Mapping[str, Scalar] = field(default_factory=lambda: {"caption_tokens": TOKENS})
    tolerance: float = 0.0


ENTRIES = {
    "blip-caption": SourceEntry(
        Modality.CAPTION,
        "dla_cache.sources.captions:CaptionSource",
        "the words of BLIP, always the most likely one next: what generators of sound are asked with",
        "BSD-3-Clause",
        "a caption may name the class: `dla cache audit` counts it, `--mask-class-names` takes it out",
        model=CAPTIONER,
        ignores_seed=True,
        size=f"1 x {TOKENS} int16",
        bytes_per_image=2 * int(TOKENS),
        row=CaptionRow(
            "codes of the captioner's tokenizer, filled up with that of padding; its `batch_decode` with"
            " `skip_special_tokens` makes words of them"
        ),
    ),
}
