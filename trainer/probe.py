"""A classifier on latents alone: the cheapest teacher, and the bar for every other."""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dla_cache.errors import TrainingError
from dla_cache.spec import LatentFormat, StrictModel
from trainer.adapters import CodeEmbedding, LatentScaler, check_modalities, n_tokens, tokens_of


class ProbeConfig(StrictModel):
    """A classifier that sees the latents of an image and never its pixels."""

    n_classes: Annotated[int, Field(gt=0)]
    formats: Annotated[dict[str, LatentFormat], Field(min_length=1)]
    """Format of each modality it looks at."""
    kind: Literal["linear", "mlp"] = "mlp"
    hidden: Annotated[int, Field(gt=0)] = 256
    """Width of the MLP's hidden layer, and of the vectors that stand for codes."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


class LatentClassifier(nn.Module):
    """Linear or MLP classifier on the flattened latents of all modalities, already standardised.

    A continuous latent enters as all its numbers, padding as 0. Codes have no scale to flatten:
    they enter as the mean over real steps of a learned vector per code. An absent modality is 0,
    which after standardising is the mean of the training split.
    """

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__()
        self.formats = config.formats
        # Sorted, so that a config that went through sorted JSON still fits its weights.
        self.modalities = tuple(sorted(config.formats))
        codes = [name for name in self.modalities if self.formats[name].kind == "codes"]
        self.code_vectors = nn.ModuleDict({name: CodeEmbedding(self.formats[name], config.hidden) for name in codes})
        self.n_features = {
            name: config.hidden if name in codes else math.prod(self.formats[name].shape) for name in self.modalities
        }
        n_features = sum(self.n_features.values())
        layers: list[nn.Module] = [nn.Dropout(config.dropout)]
        if config.kind == "mlp":
            layers += [nn.Linear(n_features, config.hidden), nn.GELU(), nn.Dropout(config.dropout)]
        layers.append(nn.Linear(config.hidden if config.kind == "mlp" else n_features, config.n_classes))
        self.classifier = nn.Sequential(*layers)

    def forward(self, latents: Mapping[str, Tensor], masks: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, K].

        Args:
            latents: modality → [B, *shape], float32 or integer codes; one that is missing is absent for all images.
            masks: modality → [B, N], true where a token is real; none means all are.
            kept: modality → [B], false where a modality counts as absent.
        """
        features = []
        for name in self.modalities:
            is_kept = kept[name][:, None]
            if name in latents:
                features.append(torch.where(is_kept, self._flatten(name, latents[name], masks.get(name)), 0.0))
            else:
                features.append(torch.zeros(len(is_kept), self.n_features[name], device=is_kept.device))
        logits: Tensor = self.classifier(torch.cat(features, dim=1))
        return logits

    def _flatten(self, name: str, latent: Tensor, mask: Tensor | None) -> Tensor:
        tokens = tokens_of(latent, self.formats[name])
        real = mask[..., None] if mask is not None else torch.ones_like(tokens[..., :1], dtype=torch.bool)
        if name in self.code_vectors:
            vectors: Tensor = self.code_vectors[name](tokens.masked_fill(~real, 0))
            return torch.where(real, vectors, 0.0).sum(dim=1) / real.sum(dim=1).clamp_min(1)
        tokens = torch.where(real, tokens, 0.0)
        absent_steps = n_tokens(self.formats[name]) - tokens.shape[1]
        return nn.functional.pad(tokens, (0, 0, 0, absent_steps)).flatten(1)


class LatentProbe(nn.Module):
    """Standardises raw latents by its own buffers and classifies them."""

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__()
        self.config = config
        self.scalers = nn.ModuleDict({name: LatentScaler(config.formats[name]) for name in config.formats})
        self.classifier = LatentClassifier(config)

    def set_statistics(self, modality: str, mean: Tensor, std: Tensor) -> None:
        """Takes the per-channel mean and standard deviation [C] of the training splits."""
        scaler: LatentScaler = self.scalers[modality]  # type: ignore[assignment]
        scaler.set_statistics(mean, std)

    def forward(
        self,
        raw_latents: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None = None,
        present: Mapping[str, bool] | None = None,
    ) -> Tensor:
        """Logits [B, K] from raw latents.

        Args:
            raw_latents: modality → [B, *shape]; one at least, for it tells how many images there are.
            masks: modality → boolean [B, N], true where a latent token is real; none means all are.
            present: modality → false to leave it out of all images; its latent need not be given.

        Raises:
            TrainingError: if a modality is unknown, or missing and not left out, or statistics are not set.
        """
        wanted = check_modalities(self.classifier.modalities, raw_latents, present)
        latents = {name: self.scalers[name](raw_latents[name]) for name in wanted}
        if not raw_latents:
            raise TrainingError(
                "no latent tells how many images there are", hint="hand over one, though `present` leaves it out"
            )
        like = next(iter(raw_latents.values()))
        kept = dict.fromkeys(self.classifier.modalities, torch.ones(len(like), dtype=torch.bool, device=like.device))
        logits: Tensor = self.classifier(latents, masks or {}, kept)
        return logits
