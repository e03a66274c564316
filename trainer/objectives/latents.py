"""Heads that predict the latents themselves: what MESSy's heads do, with no teacher between them and the cache.

Dimensions: B images, N latent tokens (steps, or places of a grid), C channels, K codebooks, V codes of a vocabulary.
"""

from itertools import product
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from dla_cache.errors import SpecError
from dla_cache.spec import LatentFormat
from trainer.adapters import LatentScaler, n_tokens, tokens_of
from trainer.features import Layer, resolve_layer
from trainer.heads import LearnedQuery, Reading, read_block, reading_of
from trainer.objectives.distances import TEMPERATURE, Distance, distance_between
from trainer.objectives.objective import Need, Objective, ObjectiveInputs, Parties, TermConfig
from trainer.objectives.projectors import make_projector
from trainer.precision import at_least_float32

MAX_OUTPUTS = 2**20
"""Of one head: codes of a long sequence, each predicted by itself, would make a layer of gigabytes."""

What = Literal["flattened", "pooled"]


class LatentsConfig(TermConfig):
    """Weight of the term, which latents are predicted, and from where; the layers are those of MESSy."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.LATENTS, Need.STUDENT_BLOCKS})
    modalities: Annotated[tuple[str, ...], Field(min_length=1)]
    """Whose latents, of the store that the student is trained on."""
    layers: Annotated[tuple[Layer, ...], Field(min_length=1)] = (0.83, 0.91, 1.0)
    """Blocks of the student that have heads, each counted from 0, a fraction of the depth, or a name; those that fall
    together in a shallow model count once."""
    what: What = "flattened"
    """What of a latent: all of its numbers, or the mean over its tokens. Of codes: each code of each step, or how often
    each occurs, codebook by codebook."""
    read: Reading | None = None
    """What a head sees of the block: `cls`, `pooled` (the mean of the image tokens), or `spatial` (what a learned query
    picks of these). When absent `cls`, or `pooled` of a student without one."""
    hidden: Annotated[int, Field(gt=0)] = 512
    """Hidden width of a head."""
    distance: Distance = "mse"
    """Between prediction and standardised latent; codes have the cross entropy."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = TEMPERATURE
    """Of `infonce`."""

    @property
    def latents(self) -> tuple[str, ...]:
        return self.modalities

    def build(self, parties: Parties) -> Objective:
        return Latents(self, parties)


class Latents(Objective):
    """A head Linear → GELU → Linear for each layer and modality, and the standardising of what they predict.

    Source: METHOD, "heads that predict standardised latents without a teacher": a control of MESSy, arXiv:2606.08336,
    with its heads, its sum over terms and its layers, and another target.
    """

    def __init__(self, config: LatentsConfig, parties: Parties) -> None:
        """
        Raises:
            SpecError: if the student has no such layer or CLS, or a head would be too large.
        """
        super().__init__()
        self.config = config
        self.formats = {name: parties.formats[name] for name in config.modalities}
        student = parties.student
        self.blocks = tuple(dict.fromkeys(resolve_layer(layer, student.names, "student") for layer in config.layers))
        self.read = reading_of(config.read, student.spans, "latents")
        for name, latent_format in self.formats.items():
            check_head(name, latent_format, config.what)
        self.scalers = nn.ModuleDict({name: LatentScaler(one) for name, one in self.formats.items()})
        self.heads = nn.ModuleDict(
            {
                head_name(block, name): make_projector(
                    student.width(block), n_outputs(self.formats[name], config.what), "mlp", hidden=config.hidden
                )
                for block, name in product(self.blocks, self.formats)
            }
        )
        self.queries = nn.ModuleDict(
            {name: LearnedQuery(student.width(block)) for block in self.blocks for name in self._heads_of(block)}
            if self.read == "spatial"
            else {}
        )

    def set_statistics(self, modality: str, mean: Tensor, std: Tensor) -> None:
        scaler: LatentScaler = self.scalers[modality]  # type: ignore[assignment]
        scaler.set_statistics(mean, std)

    def forward(self, inputs: ObjectiveInputs) -> dict[str, Tensor]:
        """The loss of each modality []: a modality that is cut off must be seen."""
        return {name: self._loss_of(name, inputs) for name in self.formats}

    def _loss_of(self, name: str, inputs: ObjectiveInputs) -> Tensor:
        latent_format, what = self.formats[name], self.config.what
        target = tokens_of(self.scalers[name](inputs.latents[name]), latent_format)
        losses = []
        for block in self.blocks:
            head = head_name(block, name)
            query = self.queries[head] if self.read == "spatial" else None
            prediction = self.heads[head](read_block(inputs.student, block, self.read, query))
            if latent_format.kind == "codes":
                losses.append(code_loss(prediction, target, latent_format.vocabulary or 0, what))
                continue
            wanted = target.mean(dim=1) if what == "pooled" else target.flatten(1)
            losses.append(distance_between(prediction, wanted, self.config.distance, self.config.temperature))
        return torch.stack(losses).sum()

    def _heads_of(self, block: int) -> list[str]:
        return [head_name(block, name) for name in self.formats]


def head_name(block: int, modality: str) -> str:
    """Of a head among the parameters."""
    return f"{block}-{modality}"


def n_outputs(latent_format: LatentFormat, what: What) -> int:
    """Numbers that a head puts out."""
    n_channels = latent_format.shape[latent_format.channel_axis]
    per_token = n_channels * (latent_format.vocabulary or 1)
    return per_token if what == "pooled" else n_tokens(latent_format) * per_token


def check_head(name: str, latent_format: LatentFormat, what: What) -> None:
    """Passes latents that a head of a sane size can predict.

    Raises:
        SpecError: for others.
    """
    outputs = n_outputs(latent_format, what)
    if outputs > MAX_OUTPUTS:
        raise SpecError(
            f"a head that predicts all of a latent of `{name}` would have {outputs:,} outputs, more than"
            f" {MAX_OUTPUTS:,}",
            hint="set `objective.latents.what: pooled`",
        )


def code_loss(prediction: Tensor, codes: Tensor, vocabulary: int, what: What) -> Tensor:
    """Cross entropy of predicted codes, mean over images, codebooks and steps.

    `flattened`: -log softmax(z[n, k])[c[n, k]] of each step n and codebook k. `pooled`: one distribution for all steps
    of a codebook, so the cross entropy with how often each code occurs: -Σ_v h[k, v]·log softmax(z[k])[v].

    Args:
        prediction: [B, N·K·V], or [B, K·V] when pooled; any float dtype.
        codes: [B, N, K], 0 to V - 1, any integer dtype.

    Returns:
        [], float32 or wider.
    """
    n_images, n_steps, n_codebooks = codes.shape
    codes = codes.long()
    if what == "flattened":
        logits = at_least_float32(prediction).view(n_images, n_steps, n_codebooks, vocabulary)
        return functional.cross_entropy(logits.flatten(0, -2), codes.flatten())
    log_p = at_least_float32(prediction).view(n_images, n_codebooks, vocabulary).log_softmax(dim=-1)
    # The log-probability of each step's code: its mean over steps is the sum over codes, and no histogram is made.
    return -log_p.gather(2, codes.transpose(1, 2)).mean()
