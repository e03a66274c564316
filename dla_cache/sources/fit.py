"""How the embedded sources are made: an autoencoder, a flow and a ridge map over pairs of an image and its picture.

Nothing here trains. A stage is a task with batches and a score; the command line hands it to the
trainer's loop, so that there is one loop.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from dla_cache.durable import make_folder, write_durably, writing_to
from dla_cache.errors import CheckpointError
from dla_cache.sources.fit_card import model_card
from dla_cache.sources.fit_pairs import AudioPairs, DepthPairs, FitPairs, PairBatch, split_images
from dla_cache.sources.networks import (
    LATENT_SHAPE,
    RIDGE_FILTERS,
    RIDGE_PATCH,
    SIDE,
    LatentFlow,
    PictureAutoencoder,
    RidgeMap,
    load_weights,
    noise_for,
    read_weights,
)
from dla_cache.spec import StrictModel
from dla_cache.store.creation import changed_fields

Count = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class StageConfig(StrictModel):
    """One stage of training."""

    steps: Count
    batch_size: Count
    learning_rate: Rate
    ema_decay: Decay


class AutoencoderConfig(StageConfig):
    """The first stage; a field that a spec leaves out keeps its default."""

    steps: Count = 1500
    batch_size: Count = 32
    learning_rate: Rate = 2e-3
    ema_decay: Decay = 0.995


class FlowConfig(StageConfig):
    """The second stage, likewise."""

    steps: Count = 4000
    batch_size: Count = 64
    learning_rate: Rate = 1.5e-3
    ema_decay: Decay = 0.999


class FitSpec(StrictModel):
    """How a source of `relief-digits` and its cheap rival are fitted."""

    source: Literal["embedded-depth", "embedded-audio"] = "embedded-depth"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    held_out_digits: Count = 200
    """Digits of the generator's own split that are not fitted on. Their score chooses which step is kept."""
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    kl_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    """Weight of the latents' KL to a standard normal, beside a mean squared error per pixel."""
    flow: FlowConfig = FlowConfig()
    image_encoder: Literal["random", "embedded-depth"] = "random"
    """What the flow's image encoder starts from: nothing, or that of the shipped depth flow."""
    sampling_steps: Annotated[int, Field(ge=1, le=100)] = 5
    """Steps at which the flow is scored."""
    ridge_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    shift_pixels: Annotated[int, Field(ge=0, lt=SIDE)] = 2
    """Images and pictures are shifted by up to this much while fitting."""


def begin_fit(folder: Path, spec: FitSpec) -> None:
    """Saves the settings of a fit in its folder, or passes a folder that was begun with the same.

    What is trained there goes on from its checkpoints, and the card tells the settings of all of it.

    Raises:
        CheckpointError: if the folder was begun with other settings, or does not say with which.
        StoreError: if it cannot be written.
    """
    path = folder / "fit.json"
    hint = f"choose another --out, or remove `{folder}`"
    if not path.exists():
        if (folder / "stages").exists():
            raise CheckpointError(f"`{folder}` holds a fit but no `{path.name}` with its settings", hint=hint)
        with writing_to(folder):
            make_folder(folder)
            write_durably(path, spec.model_dump_json(indent=1).encode())
        return
    try:
        begun = FitSpec.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"`{path}` cannot be read: {error}", hint=hint) from error
    differences = list(changed_fields(begun.model_dump(), spec.model_dump()))
    if differences:
        raise CheckpointError(f"`{folder}` holds a fit with other settings: {'; '.join(differences)}", hint=hint)


@dataclass(frozen=True, slots=True)
class FitLosses:
    """Losses of one batch, as the loop wants them."""

    total: Tensor
    terms: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Stage:
    """What the loop needs to run one stage."""

    name: str
    task: "AutoencoderTask | FlowTask"
    config: StageConfig
    batches: Callable[[int], Generator[PairBatch, None, None]]
    score: Callable[[], Mapping[str, float]]


class AutoencoderTask:
    """A picture in, the picture out, through a latent near a standard normal."""

    def __init__(self, autoencoder: PictureAutoencoder, kl_weight: float) -> None:
        self.module = autoencoder
        self.kl_weight = kl_weight

    def losses(self, batch: PairBatch) -> FitLosses:
        """Reconstruction error per pixel and the weighted KL per latent number.

        Source: Auto-Encoding Variational Bayes, arXiv:1312.6114, equation 10.
        """
        mean, logvar = self.module.moments(batch.targets)
        latents = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        terms = {
            "reconstruction": functional.mse_loss(self.module.decode(latents), batch.targets),
            "kl": self.kl_weight * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(),
        }
        return FitLosses(terms["reconstruction"] + terms["kl"], terms)

    def taught_parameters(self) -> Sequence[nn.Parameter]:
        """The encoder's: the KL says nothing to the decoder."""
        return list(self.module.network.encoder.parameters())


class FlowTask:
    """Noise in, latent out, given the image."""

    def __init__(self, flow: LatentFlow, autoencoder: PictureAutoencoder) -> None:
        self.module = flow
        self.autoencoder = autoencoder.eval().requires_grad_(False)

    def losses(self, batch: PairBatch) -> FitLosses:
        """Mean squared error of the velocity on the straight line from latent to noise.

        Source: Flow Straight and Fast, arXiv:2209.03003, equation 1; logit-normal times as in
        arXiv:2403.03206, section 3.1.
        """
        with torch.no_grad():
            latents = standardise(self.module, self.autoencoder.moments(batch.targets)[0])
        noise = torch.randn_like(latents)
        time = torch.sigmoid(torch.randn(len(latents)))
        noisy = torch.lerp(latents, noise, time.view(-1, 1, 1, 1))
        velocity = self.module.velocity(noisy, time, self.module.encoder(batch.pixels))
        loss = functional.mse_loss(velocity, noise - latents)
        return FitLosses(loss, {"velocity": loss})

    def taught_parameters(self) -> Sequence[nn.Parameter]:
        """All of the flow's, the image encoder's with them."""
        return list(self.module.parameters())


class EmbeddedFit:
    """The stages in their order; each starts from what the one before has trained.

    Raises:
        SpecError: if holding out so many digits leaves none to fit on.
    """

    def __init__(self, spec: FitSpec) -> None:
        self.spec = spec
        images = split_images(spec.held_out_digits)
        kind = DepthPairs if spec.source == "embedded-depth" else AudioPairs
        self.pairs: FitPairs = kind(images, spec.shift_pixels)
        torch.manual_seed(spec.seed)
        self.autoencoder = PictureAutoencoder()
        self.flow = LatentFlow()
        self.ridge = RidgeMap()
        if spec.image_encoder != "random":
            load_weights(self.flow.encoder, load(read_weights(spec.image_encoder)[0]), "flow.encoder")

    def autoencoder_stage(self) -> Stage:
        """Gives the pictures their latent space."""
        task = AutoencoderTask(self.autoencoder, self.spec.kl_weight)
        return self._stage("autoencoder", task, self.spec.autoencoder, self._score_autoencoder)

    def flow_stage(self) -> Stage:
        """Fills that space from images; the latents' mean and spread are taken over the fitted pairs first."""
        self.autoencoder.eval()
        with torch.inference_mode():
            means = torch.cat([self._encode(targets) for targets in torch.split(self.pairs.targets(), 256)])
        self.flow.latent_mean.copy_(means.mean(dim=(0, 2, 3)))
        self.flow.latent_std.copy_(means.std(dim=(0, 2, 3)))
        return self._stage("flow", FlowTask(self.flow, self.autoencoder), self.spec.flow, self._score_flow)

    def fit_ridge(self, on_progress: Callable[[int, int], None] = lambda _done, _total: None) -> None:
        """Closed form, no steps: random patches of fitted images as filters, then ridge regression.

        Args:
            on_progress: takes images whose features are computed, most of the work, and images in all.
        """
        images = self.pairs.fitted_pixels
        generator = torch.Generator().manual_seed(self.spec.seed)
        rows = torch.randint(len(images), (RIDGE_FILTERS,), generator=generator).tolist()
        corners = torch.randint(SIDE - RIDGE_PATCH + 1, (RIDGE_FILTERS, 2), generator=generator).tolist()
        places = zip(rows, corners, strict=True)
        patches = torch.stack([images[row, :, y : y + RIDGE_PATCH, x : x + RIDGE_PATCH] for row, (y, x) in places])
        patches = patches - patches.mean(dim=(1, 2, 3), keepdim=True)
        self.ridge.filters.copy_(patches / patches.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
        with torch.inference_mode():
            parts: list[Tensor] = []
            for first in range(0, len(images), 512):
                parts.append(self.ridge.features(images[first : first + 512]))
                on_progress(min(first + 512, len(images)), len(images))
            features = torch.cat(parts)
            latents = self.pairs.mean_latents(self._encode)
            centred = features - features.mean(dim=0)
            gram = centred.T @ centred + self.spec.ridge_penalty * torch.eye(features.shape[1])
            weight = torch.linalg.solve(gram, centred.T @ (latents - latents.mean(dim=0)))
        self.ridge.weight.copy_(weight)
        self.ridge.bias.copy_(latents.mean(dim=0) - features.mean(dim=0) @ weight)

    def scores(self) -> dict[str, dict[str, float]]:
        """Held-out scores: of the latent space itself, of the generator, and of the ridge map."""
        with torch.inference_mode():
            scores = {
                self.spec.source: self._score_flow(),
                f"{self.spec.source}-ridge": self._score_latents(self.ridge(self.pairs.held_out_pixels)),
                "the autoencoder alone": self._score_autoencoder(),
            }
        return {name: {key: score[key] for key in score if key != "selection"} for name, score in scores.items()}

    def export(self, folder: Path) -> dict[str, dict[str, float]]:
        """Writes float16 weights and a model card into `folder`; returns the scores after rounding to float16."""
        for module in (self.autoencoder, self.flow, self.ridge):
            module.load_state_dict({name: value.half().float() for name, value in module.state_dict().items()})
        scores = self.scores()
        parts: dict[str, dict[str, nn.Module]] = {
            self.spec.source: {"autoencoder": self.autoencoder, "flow": self.flow},
            f"{self.spec.source}-ridge": {"ridge": self.ridge},
        }
        with writing_to(folder):
            make_folder(folder)
            for name, modules in parts.items():
                tensors = {
                    f"{prefix}.{key}": value.half().contiguous()
                    for prefix, module in modules.items()
                    for key, value in module.state_dict().items()
                }
                write_durably(folder / f"{name}.safetensors", save(tensors))
            card = model_card(self.spec.model_dump(), len(self.pairs.fitted_pixels), scores)
            write_durably(folder / f"{self.spec.source}.md", card.encode())
        return scores

    def _stage(
        self,
        name: str,
        task: AutoencoderTask | FlowTask,
        config: StageConfig,
        score: Callable[[], Mapping[str, float]],
    ) -> Stage:
        def batches(step: int) -> Generator[PairBatch, None, None]:
            while True:
                yield self.pairs.batch(self.spec.seed, step, config.batch_size)
                step += 1

        return Stage(name, task, config, batches, score)

    def _encode(self, targets: Tensor) -> Tensor:
        return self.autoencoder.moments(targets)[0]

    def _score_autoencoder(self) -> dict[str, float]:
        return self.pairs.score_autoencoder(self._encode, self.autoencoder.decode)

    def _score_flow(self) -> dict[str, float]:
        noise = noise_for(range(len(self.pairs.held_out_pixels)), LATENT_SHAPE)
        return self._score_latents(self.flow.sample(self.pairs.held_out_pixels, noise, self.spec.sampling_steps))

    def _score_latents(self, latents: Tensor) -> dict[str, float]:
        return self.pairs.score_latents(latents, self._encode, self.autoencoder.decode)


def standardise(flow: LatentFlow, latents: Tensor) -> Tensor:
    """Latents of the autoencoder in the flow's unit scale."""
    return (latents - flow.latent_mean.view(1, -1, 1, 1)) / flow.latent_std.view(1, -1, 1, 1)
