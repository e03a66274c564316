"""How the embedded sources are made: three stages over pairs of an image and its true depth.

Nothing here trains. A stage is a task with batches and a score; the command line hands it to the
trainer's loop, so that there is one loop. No stage sees a label.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from dla_cache.data.relief_digits import render_split
from dla_cache.durable import make_folder, write_durably, writing_to
from dla_cache.errors import CheckpointError, SpecError
from dla_cache.sources.embedded import (
    LATENT_SHAPE,
    RIDGE_FILTERS,
    RIDGE_PATCH,
    SIDE,
    DepthAutoencoder,
    DepthFlow,
    DepthRidge,
    noise_for,
    to_model_range,
)
from dla_cache.spec import StrictModel
from dla_cache.store.metadata import changed_fields

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
    """How `embedded-depth` and its cheap rival are fitted."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    held_out_digits: Count = 200
    """Digits of the generator's own split that are not fitted on. Their score chooses which step is kept."""
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    kl_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    """Weight of the latents' KL to a standard normal, beside a mean squared error per pixel."""
    flow: FlowConfig = FlowConfig()
    sampling_steps: Annotated[int, Field(ge=1, le=100)] = 5
    """Steps at which the flow is scored."""
    ridge_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    shift_pixels: Annotated[int, Field(ge=0, lt=SIDE)] = 2
    """Image and depth are shifted together by up to this much while fitting."""


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
class DepthPairs:
    """Pixels float32 [N, 3, 32, 32] and true depth float32 [N, 1, 32, 32], both in [-1, 1]."""

    pixels: Tensor
    depth: Tensor

    def batch(self, seed: int, step: int, size: int, shift: int) -> "DepthPairs":
        """A batch that depends on (seed, step) only, image and depth shifted together."""
        rng = np.random.Generator(np.random.PCG64([seed, step]))
        rows = torch.from_numpy(rng.integers(len(self.pixels), size=size))
        both = torch.cat([self.pixels[rows], self.depth[rows]], dim=1)
        if shift:
            side = both.shape[-1]
            padded = functional.pad(both, (shift,) * 4, mode="replicate")
            corners = rng.integers(2 * shift + 1, size=(size, 2)).tolist()
            both = torch.stack([p[:, y : y + side, x : x + side] for p, (y, x) in zip(padded, corners, strict=True)])
        return DepthPairs(both[:, :3].contiguous(), both[:, 3:].contiguous())


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
    batches: Callable[[int], Generator[DepthPairs, None, None]]
    score: Callable[[], Mapping[str, float]]


class AutoencoderTask:
    """Depth in, depth out, through a latent near a standard normal."""

    def __init__(self, autoencoder: DepthAutoencoder, kl_weight: float) -> None:
        self.module = autoencoder
        self.kl_weight = kl_weight

    def losses(self, batch: DepthPairs) -> FitLosses:
        """Reconstruction error per pixel and the weighted KL per latent number.

        Source: Auto-Encoding Variational Bayes, arXiv:1312.6114, equation 10.
        """
        mean, logvar = self.module.moments(batch.depth)
        latents = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        terms = {
            "reconstruction": functional.mse_loss(self.module.decode(latents), batch.depth),
            "kl": self.kl_weight * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(),
        }
        return FitLosses(terms["reconstruction"] + terms["kl"], terms)

    def taught_parameters(self) -> Sequence[nn.Parameter]:
        """The encoder's: the KL says nothing to the decoder."""
        return list(self.module.network.encoder.parameters())


class FlowTask:
    """Noise in, latent out, given the image."""

    def __init__(self, flow: DepthFlow, autoencoder: DepthAutoencoder) -> None:
        self.module = flow
        self.autoencoder = autoencoder.eval().requires_grad_(False)

    def losses(self, batch: DepthPairs) -> FitLosses:
        """Mean squared error of the velocity on the straight line from latent to noise.

        Source: Flow Straight and Fast, arXiv:2209.03003, equation 1; logit-normal times as in
        arXiv:2403.03206, section 3.1.
        """
        with torch.no_grad():
            latents = standardise(self.module, self.autoencoder.moments(batch.depth)[0])
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
        plan, pixels, depth = render_split("generator")
        digits = sorted({rendering.image_id.rsplit("-render-", 1)[0] for rendering in plan})
        if spec.held_out_digits >= len(digits):
            raise SpecError(
                f"`held_out_digits` is {spec.held_out_digits}, the generator's split has {len(digits)} digits in all",
                hint=f"hold out at most {len(digits) - 1}",
            )
        held = set(digits[:: len(digits) // spec.held_out_digits][: spec.held_out_digits])
        is_held = np.array([rendering.image_id.rsplit("-render-", 1)[0] in held for rendering in plan])
        images, maps = to_model_range(pixels), to_model_range(depth)[:, None]
        self.fitted = DepthPairs(images[~is_held], maps[~is_held])
        self.held_out = DepthPairs(images[is_held][::4].contiguous(), maps[is_held][::4].contiguous())
        torch.manual_seed(spec.seed)
        self.autoencoder = DepthAutoencoder()
        self.flow = DepthFlow()
        self.ridge = DepthRidge()

    def autoencoder_stage(self) -> Stage:
        """Gives depth its latent space."""
        task = AutoencoderTask(self.autoencoder, self.spec.kl_weight)
        return self._stage("autoencoder", task, self.spec.autoencoder, self._score_autoencoder)

    def flow_stage(self) -> Stage:
        """Fills that space from images; the latents' mean and spread are taken over the fitted pairs first."""
        self.autoencoder.eval()
        with torch.inference_mode():
            means = torch.cat(
                [self.autoencoder.moments(depth)[0] for depth in torch.split(self.fitted.depth[::8], 256)]
            )
        self.flow.latent_mean.copy_(means.mean(dim=(0, 2, 3)))
        self.flow.latent_std.copy_(means.std(dim=(0, 2, 3)))
        return self._stage("flow", FlowTask(self.flow, self.autoencoder), self.spec.flow, self._score_flow)

    def fit_ridge(self) -> None:
        """Closed form, no steps: random patches of fitted images as filters, then ridge regression."""
        generator = torch.Generator().manual_seed(self.spec.seed)
        rows = torch.randint(len(self.fitted.pixels), (RIDGE_FILTERS,), generator=generator).tolist()
        corners = torch.randint(32 - RIDGE_PATCH + 1, (RIDGE_FILTERS, 2), generator=generator).tolist()
        patches = torch.stack(
            [
                self.fitted.pixels[row, :, y : y + RIDGE_PATCH, x : x + RIDGE_PATCH]
                for row, (y, x) in zip(rows, corners, strict=True)
            ]
        )
        patches = patches - patches.mean(dim=(1, 2, 3), keepdim=True)
        self.ridge.filters.copy_(patches / patches.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
        with torch.inference_mode():
            features = torch.cat([self.ridge.features(pixels) for pixels in torch.split(self.fitted.pixels, 512)])
            latents = torch.cat(
                [self.autoencoder.moments(depth)[0] for depth in torch.split(self.fitted.depth, 512)]
            ).flatten(1)
            centred = features - features.mean(dim=0)
            gram = centred.T @ centred + self.spec.ridge_penalty * torch.eye(features.shape[1])
            weight = torch.linalg.solve(gram, centred.T @ (latents - latents.mean(dim=0)))
        self.ridge.weight.copy_(weight)
        self.ridge.bias.copy_(latents.mean(dim=0) - features.mean(dim=0) @ weight)

    def scores(self) -> dict[str, dict[str, float]]:
        """Held-out scores of the generator, of the ridge map, and of the autoencoder given the true depth."""
        with torch.inference_mode():
            truth = self.autoencoder.moments(self.held_out.depth)[0]
            return {
                "embedded-depth": self._score_latents(self._sampled()),
                "embedded-depth-ridge": self._score_latents(self.ridge(self.held_out.pixels)),
                "autoencoder on true depth": self._score_latents(truth),
            }

    def export(self, folder: Path) -> dict[str, dict[str, float]]:
        """Writes float16 weights and a model card into `folder`; returns the scores after rounding to float16."""
        for module in (self.autoencoder, self.flow, self.ridge):
            module.load_state_dict({name: value.half().float() for name, value in module.state_dict().items()})
        scores = self.scores()
        parts: dict[str, dict[str, nn.Module]] = {
            "embedded-depth": {"autoencoder": self.autoencoder, "flow": self.flow},
            "embedded-depth-ridge": {"ridge": self.ridge},
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
            write_durably(folder / "README.md", model_card(self.spec, len(self.fitted.pixels), scores).encode())
        return scores

    def _stage(
        self,
        name: str,
        task: AutoencoderTask | FlowTask,
        config: StageConfig,
        score: Callable[[], Mapping[str, float]],
    ) -> Stage:
        def batches(step: int) -> Generator[DepthPairs, None, None]:
            while True:
                yield self.fitted.batch(self.spec.seed, step, config.batch_size, self.spec.shift_pixels)
                step += 1

        return Stage(name, task, config, batches, score)

    def _sampled(self) -> Tensor:
        noise = noise_for(range(len(self.held_out.pixels)), LATENT_SHAPE)
        return self.flow.sample(self.held_out.pixels, noise, self.spec.sampling_steps)

    def _score_autoencoder(self) -> dict[str, float]:
        scores = self._score_latents(self.autoencoder.moments(self.held_out.depth)[0])
        return scores | {"selection": scores["depth_correlation"]}

    def _score_flow(self) -> dict[str, float]:
        scores = self._score_latents(self._sampled())
        return scores | {"selection": scores["latent_r2"]}

    def _score_latents(self, latents: Tensor) -> dict[str, float]:
        """Mean correlation of decoded and true depth per image, and R² of the latents over the held-out pairs."""
        truth = self.autoencoder.moments(self.held_out.depth)[0]
        residual = (latents - truth).square().sum()
        spread = (truth - truth.mean(dim=0)).square().sum()
        decoded = self.autoencoder.decode(latents).flatten(1)
        pairs = torch.stack([decoded, self.held_out.depth.flatten(1)])
        centred = pairs - pairs.mean(dim=2, keepdim=True)
        correlation = functional.cosine_similarity(centred[0], centred[1], dim=1).mean()
        return {"depth_correlation": float(correlation), "latent_r2": float(1 - residual / spread)}


def standardise(flow: DepthFlow, latents: Tensor) -> Tensor:
    """Latents of the autoencoder in the flow's unit scale."""
    return (latents - flow.latent_mean.view(1, -1, 1, 1)) / flow.latent_std.view(1, -1, 1, 1)


def model_card(spec: FitSpec, n_pairs: int, scores: Mapping[str, Mapping[str, float]]) -> str:
    """What the shipped weights are, from what, how good, and under which licence, as Markdown."""
    rows = "\n".join(
        f"| {name} | {score['depth_correlation']:.4f} | {score['latent_r2']:.4f} |" for name, score in scores.items()
    )
    settings = "\n".join(f"- `{name}`: {value}" for name, value in spec.model_dump().items())
    return f"""# embedded-depth and embedded-depth-ridge

Depth from one 32 x 32 image, as a latent float [8, 4, 4] that is never decoded when a cache is built.

- **embedded-depth**: `AutoencoderKL` on pixel-unshuffled depth, and a rectified flow (`UNet2DModel`)
  conditioned on the image, sampled by Euler's method from per-sample noise.
- **embedded-depth-ridge**: random image patches as filters, pooled, then ridge regression to the same
  latents. The cheap map to beat.

Made with `dla sources fit manifests/embedded-fit.yaml` from {n_pairs:,} pairs of a rendered digit and its true
depth: the `generator` split of relief-digits, whose digits stand in no other split. **No label was seen.**

## Held-out scores

{spec.held_out_digits} digits of the generator's split that were not fitted on; weights rounded to float16 first.
Their score chose which step of each stage was kept, so what the table says is a little optimistic.

| | correlation of decoded and true depth | R² of the latent |
|---|---|---|
{rows}

## Settings

{settings}

## Limits and licence

Good for digits rendered as relief-digits renders them, and for nothing else. Apache-2.0; fitted on renderings
of MNIST digits (CC BY-SA 3.0) over photo textures (CC BY 2.0), see LICENSES/.
"""
