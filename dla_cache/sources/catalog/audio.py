"""What an image may sound like: generators that take text, asked with a caption of it."""

from collections.abc import Mapping
from dataclasses import dataclass

from dla_cache.modality import Modality
from dla_cache.sources.catalog.entry import CAPTIONER, PipelineRow, Scalar, SourceEntry
from dla_cache.spec import Axis

DIFFUSERS = "dla_cache.sources.diffusers_source:DiffusersSource"
CODES = "dla_cache.sources.code_source:MusicGenSource"
VIEW = 384
"""What the captioner sees."""
NAMES_CLASSES = (
    "made from a caption, which may name the class: `dla cache audit` counts it, `--mask-class-names` cures it"
)


@dataclass(frozen=True, slots=True)
class CodesRow:
    """A model of codes, asked with a text."""

    space: str
    """What the codes are, and what makes sound of them."""
    settings: Mapping[str, Scalar]
    """What a spec may set beside the text, and defaults. They decide the numbers, so all are in a recipe."""
    axes: tuple[Axis, ...] = ("codebook", "time")
    view_size: int = VIEW
    """Side in pixels of the square view, unless a spec says another `view_size`."""
    captioner: str = CAPTIONER
    """Repository of the captioning model that the prompt, as it is by default, needs."""
    guard: tuple[str, ...] = ("audio_encoder.decode",)
    """Methods that decode, in whose place something else stands."""
    decodes: bool = False
    """Whether codes are made sound and that is made codes again: a control, which shows what such a detour costs."""
    tolerance: float = 0.0


MUSICGEN_SETTINGS: Mapping[str, Scalar] = {
    "guidance_scale": 3.0,
    "frames": 250,
    "temperature": 1.0,
    "top_k": 250,
    "text_tokens": 64,
}
MUSICGEN_SPACE = (
    "codes of MusicGen's codec, EnCodec at 32 kHz, 50 frames a second; `audio_encoder.decode` of the model makes sound"
)
MUSICGEN_LICENCE = "CC-BY-NC-4.0: no commercial use"


def musicgen(summary: str, note: str, row: CodesRow) -> SourceEntry:
    """MusicGen in its smallest size, which the paper takes its codes from."""
    return SourceEntry(
        Modality.AUDIO,
        CODES,
        summary,
        MUSICGEN_LICENCE,
        note,
        model="facebook/musicgen-small",
        size="4 x 250 int16",
        bytes_per_image=2 * 4 * 250,
        row=row,
    )


ENTRIES = {
    "musicgen": musicgen(
        "five seconds of music by MusicGen from the image's caption, as codes, stopped before the codec's decoder",
        NAMES_CLASSES,
        CodesRow(MUSICGEN_SPACE, MUSICGEN_SETTINGS),
    ),
    "musicgen-reencoded": musicgen(
        "control: the codes of `musicgen` made sound by the codec, and that made codes again",
        f"decodes, as other sources must not: it shows what that costs, and loses; {NAMES_CLASSES}",
        CodesRow(
            f"{MUSICGEN_SPACE}; these are what the codec makes of that sound", MUSICGEN_SETTINGS, guard=(), decodes=True
        ),
    ),
    "audioldm2": SourceEntry(
        Modality.AUDIO,
        DIFFUSERS,
        "ten seconds of sound by AudioLDM 2 from the image's caption, 200 steps, stopped before the VAE's decoder",
        "CC-BY-NC-SA-4.0: no commercial use; see model card",
        NAMES_CLASSES,
        model="cvssp/audioldm2",
        size="8 x 256 x 16 float16",
        bytes_per_image=2 * 8 * 256 * 16,
        row=PipelineRow(
            pipeline="AudioLDM2Pipeline",
            output="audios",
            axes=("channel", "time", "frequency"),
            space=(
                "a mel spectrogram in the VAE's space, scaled by its `scaling_factor`; divide by it, then `vae.decode`"
                " of the pipeline gives the spectrogram, and `vocoder` its sound"
            ),
            view_size=VIEW,
            settings={"num_inference_steps": 200, "guidance_scale": 3.5, "audio_length_in_s": 10.24},
            call={"output_type": "latent"},
            image_form="none",
            text_argument="prompt",
            captioner=CAPTIONER,
            schedulers=("DDIMScheduler",),
            guard=("vae.decode", "mel_spectrogram_to_waveform"),
            fix_up="dla_cache.sources.audioldm2:EachTextAlone",
            tolerance=1e-4,
        ),
    ),
    "stable-audio": SourceEntry(
        Modality.AUDIO,
        DIFFUSERS,
        "ten seconds of sound by Stable Audio Open from the image's caption, 100 steps, stopped before the decoder",
        "Stability AI Community License; see model card",
        NAMES_CLASSES,
        model="stabilityai/stable-audio-open-1.0",
        is_gated=True,
        size="64 x 1024 float16",
        bytes_per_image=2 * 64 * 1024,
        row=PipelineRow(
            pipeline="StableAudioPipeline",
            output="audios",
            axes=("channel", "time"),
            space=(
                "sound at 44.1 kHz in the VAE's space, 21.5 steps a second, unscaled; those behind `audio_end_in_s` are"
                " silence; `vae.decode` of the pipeline gives stereo"
            ),
            view_size=VIEW,
            settings={"num_inference_steps": 100, "guidance_scale": 7.0, "audio_end_in_s": 10.0},
            call={"output_type": "latent"},
            image_form="none",
            text_argument="prompt",
            captioner=CAPTIONER,
            # The model's own, which needs `torchsde`, tells it the arc tangent of the noise, and EDM's the logarithm.
            schedulers=("CosineDPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"),
            keeps_scheduler=True,
            tolerance=1e-4,
        ),
    ),
}
