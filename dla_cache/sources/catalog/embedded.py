"""The sources that are shipped with their weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dla_cache.modality import Modality
from dla_cache.sources.catalog.entry import Scalar, SourceEntry
from dla_cache.spec import Axis

LICENCE = "Apache-2.0; fitted on renderings of MNIST digits (CC BY-SA 3.0) over photo textures (CC BY 2.0)"
FRIENDLY_CASE = "fitted on images of the very renderer that made relief-digits: a friendly case"
SAW_LABELS = "paired with sounds by class, so it has seen the labels of 2,500 other digits"
CHEAP_MAP = "ridge regression from random image features to the same latents: the cheap map to beat"
DECODED_SPACE = "the decoded picture, 0 to 1: 4 x 4 patches row by row, each of 8 x 8 pixels row by row"


@dataclass(frozen=True, slots=True)
class EmbeddedRow:
    """What whoever reads the catalog may want to know of one; its class knows it by itself."""

    space: str
    axes: tuple[Axis, ...]
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    view_size: int = 32
    tolerance: float = 0.0
    decodes: bool = False
    """Whether it decodes on purpose, as a control, where other sources must not."""


AXES: dict[Modality, tuple[Axis, ...]] = {
    Modality.DEPTH: ("channel", "height", "width"),
    Modality.AUDIO: ("channel", "frequency", "time"),
}


def embedded(modality: Modality, name: str, summary: str, note: str, *, ignores_seed: bool = False) -> SourceEntry:
    """A source of `dla_cache.sources.embedded`."""
    return SourceEntry(
        modality,
        f"dla_cache.sources.embedded:{name}",
        summary,
        LICENCE,
        note,
        saw_labels=SAW_LABELS in note,
        ignores_seed=ignores_seed,
        size="8 x 4 x 4 float16",
        bytes_per_image=256,
        row=EmbeddedRow(
            f"latent of the embedded {modality} autoencoder, unscaled; decode with `decode_{modality}`",
            AXES[modality],
            {} if ignores_seed else {"sampling_steps": 5},
        ),
    )


def decoded(modality: Modality, name: str, note: str) -> SourceEntry:
    """The control of an embedded flow that decodes its latent: what a teacher of raw synthetic pictures sees."""
    return SourceEntry(
        modality,
        f"dla_cache.sources.embedded:{name}",
        f"control: the picture that the latent of `embedded-{modality}` decodes to, in patches",
        LICENCE,
        f"decodes, as other sources must not: it shows what that costs; {note}",
        saw_labels=SAW_LABELS in note,
        size="16 x 64 float16",
        bytes_per_image=2048,
        row=EmbeddedRow(DECODED_SPACE, ("token", "channel"), {"sampling_steps": 5}, decodes=True),
    )


def reencoded(modality: Modality, name: str, note: str) -> SourceEntry:
    """The control of an embedded flow whose latent is decoded and encoded again."""
    plain = embedded(modality, name, f"control: the latent of `embedded-{modality}` decoded, and encoded again", note)
    note = f"decodes, as other sources must not: it shows what that costs, and loses; {note}"
    return replace(plain, note=note, row=replace(plain.row, decodes=True))


ENTRIES = {
    "embedded-depth": embedded(
        Modality.DEPTH,
        "EmbeddedDepth",
        "image-conditioned rectified flow in the latent space of a depth autoencoder, stopped before the decoder",
        FRIENDLY_CASE,
    ),
    "embedded-depth-ridge": embedded(Modality.DEPTH, "EmbeddedDepthRidge", CHEAP_MAP, FRIENDLY_CASE, ignores_seed=True),
    "embedded-audio": embedded(
        Modality.AUDIO,
        "EmbeddedAudio",
        "the same in the latent space of spoken digits: what a digit in an image is called, stopped before the decoder",
        f"{FRIENDLY_CASE}, and {SAW_LABELS}",
    ),
    "embedded-audio-ridge": embedded(
        Modality.AUDIO, "EmbeddedAudioRidge", CHEAP_MAP, f"{FRIENDLY_CASE}, and {SAW_LABELS}", ignores_seed=True
    ),
    "embedded-depth-decoded": decoded(Modality.DEPTH, "EmbeddedDepthDecoded", FRIENDLY_CASE),
    "embedded-depth-reencoded": reencoded(Modality.DEPTH, "EmbeddedDepthReencoded", FRIENDLY_CASE),
    "embedded-audio-decoded": decoded(Modality.AUDIO, "EmbeddedAudioDecoded", f"{FRIENDLY_CASE}, and {SAW_LABELS}"),
    "embedded-audio-reencoded": reencoded(
        Modality.AUDIO, "EmbeddedAudioReencoded", f"{FRIENDLY_CASE}, and {SAW_LABELS}"
    ),
}
