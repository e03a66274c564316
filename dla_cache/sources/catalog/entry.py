"""What the catalog says of a source: plain data, which no generator's library is imported for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dla_cache.modality import Modality
from dla_cache.spec import Axis

Scalar = str | int | float | bool

CAPTION = "{caption}"
"""What stands for the caption in a prompt."""

CAPTIONER = "Salesforce/blip-image-captioning-base"
"""Repository of the captioning model, unless a spec names another."""

TEXT_SETTINGS: dict[str, Scalar] = {"prompt": CAPTION, "caption_tokens": 30}
"""What a spec may set on any generator that takes a text: the text, and how many tokens a caption has at most."""


@dataclass(frozen=True, slots=True)
class PipelineRow:
    """A pipeline of diffusers, stopped before its decoder: everything that sets it apart from the others."""

    pipeline: str
    """Name of the class in diffusers."""
    output: str
    """Field of what a call returns that holds the latents; dots lead on, as `prediction.latent`."""
    axes: tuple[Axis, ...]
    """Of one latent."""
    space: str
    """What the numbers are: scaled, packed, normalised; and what decodes them."""
    view_size: int
    """Side in pixels of the square view, unless a spec says another `view_size`."""
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    """Arguments of a call that a spec may set, and their defaults. They decide the numbers, so all are in a recipe."""
    fix_up_settings: Mapping[str, Scalar] = field(default_factory=dict)
    """Further settings, which the fix-up knows and a call does not."""
    side_arguments: tuple[str, ...] = ()
    """Arguments that are told the side of the view in pixels, as `height` and `width`."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of every call."""
    load: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `from_pretrained`; a component that is None is neither loaded nor part of the weights' hash."""
    image_argument: str = "image"
    image_form: Literal["pil", "tensor", "unit", "fix-up", "none"] = "pil"
    """What a call takes: PIL images, float tensors [B, 3, S, S] in [-1, 1] (`tensor`) or in [0, 1] (`unit`), what the
    fix-up's `images` makes of the pixels, or no image: then the caption is all that the pipeline knows of it."""
    text_argument: str = ""
    """The argument that takes one text an image, made of the setting `prompt`; empty for a pipeline without text."""
    captioner: str = ""
    """Repository of the captioning model that the prompt, as it is by default, needs; empty if it needs none."""
    batch_argument: str = ""
    """An argument that must be told the number of images."""
    schedulers: tuple[str, ...] = ()
    """Classes that are known to draw from the generators they are given and from nothing else. The checkpoint's own
    must be one of them, or the spec's `scheduler`. Empty for a pipeline without scheduler."""
    keeps_scheduler: bool = False
    """Whether a spec may put no other scheduler in the place of the checkpoint's: they differ in how they tell a model
    how noisy its input is, and it would put out noise."""
    guard: tuple[str, ...] = ("vae.decode",)
    """Methods that decode, from the pipeline on: each is replaced by one that raises."""
    fix_up: str = ""
    """`module:Class` of what a row of data cannot say, see `dla_cache.sources.diffusers_source.FixUp`."""
    largest_batch: int = 0
    """Images that one call can take; 0 for any number."""
    tolerance: float = 1e-4
    """Largest absolute difference that other images in the batch made when it was measured, on a CPU in float32 with
    tiny random weights, rounded up."""
    components: Mapping[str, str] = field(default_factory=dict)
    """Components in place of the checkpoint's own, for few-step presets: `unet` or `transformer`, and `lora`, each a
    repository, maybe followed by `#` and a file in it. A spec may name others by the same words."""
    lora_scale: float = 1.0
    """How much of the LoRA is added, unless a spec says otherwise."""
    scheduler: str = ""
    """Class that a preset puts in place of the checkpoint's."""
    scheduler_settings: Mapping[str, Scalar] = field(default_factory=dict)
    """Of its configuration, those that differ from the checkpoint's: `timestep_spacing` of most few-step presets."""


@dataclass(frozen=True, slots=True)
class SourceEntry:
    """A source that can be named in a cache spec."""

    modality: Modality
    location: str
    """`module:class`, imported when the source is opened; the class takes (spec, device)."""
    summary: str
    licence: str = ""
    """What its weights may be used for."""
    note: str = ""
    """What whoever reads a figure must know of how the source was made; shown beside every figure."""
    saw_labels: bool = False
    """Whether labels took part in how its weights were made, so that its latents may tell them."""
    model: str = ""
    """Repository on the Hugging Face hub that its weights come from unless a spec names another `model`."""
    is_gated: bool = False
    """Whether the hub asks for an account and an accepted licence."""
    ignores_seed: bool = False
    """Whether nothing is drawn: another seed gives the same latent."""
    size: str = ""
    """Shape and dtype of a latent with the default model and view, for tables: `4 x 96 x 96 float16`."""
    bytes_per_image: int = 0
    """With the default model and view, as the store holds it; 0 where only a look at the weights tells."""
    row: Any = None
    """What the class of `location` needs to know of this source, such as a `PipelineRow`."""
