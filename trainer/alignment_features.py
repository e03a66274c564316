"""What is compared: the features of a run's blocks, and latents or a model's answers of the same images.

Dimensions: B images of a batch, N images, D width of a block, C channels, F numbers of a latent.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dla_cache.errors import CheckpointError, SpecError
from dla_cache.spec import LatentFormat
from dla_cache.store import LatentStore
from dla_cache.store.statistics import LatentStatistics
from trainer.adapters import tokens_of
from trainer.data import Role
from trainer.features import CLS, IMAGE
from trainer.measure import pairs_of
from trainer.run import EVALUATION_BATCH_SIZE
from trainer.run_folder import read_config, read_facts
from trainer.upbringing import TrainedRun

LONGEST_LATENT = 1024
"""Numbers of a flattened latent; a longer one is projected onto so many random directions."""

CODE_WIDTH = 256
"""Numbers that stand for a latent of codes."""

ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Answers:
    """What a run says of some images."""

    logits: Tensor
    """float32 [N, K]."""
    means: dict[tuple[str, str], Tensor]
    """(block, span) → float32 [N, D], the mean of the block's tokens over the span."""


def answers_of(
    run: TrainedRun,
    store: LatentStore,
    images: Path | None,
    splits: Sequence[str],
    *,
    spans: Sequence[str] | None = None,
    last_block_only: bool = False,
    device: str = "cpu",
) -> Answers:
    """Runs a model once over the centre squares of all images of some splits, in row order.

    Args:
        images: folder that the image paths of the store are relative to; None for a store that holds the images itself.
        spans: to take the means over; None for all that the run has.
    """
    run.task.module.to(device)
    run.task.module.eval()
    modalities = run.facts.modalities
    pairs = pairs_of(run, store, images, device)
    names = run.task.outline.names
    numbers = range(len(names))[-1:] if last_block_only else range(len(names))
    logits: list[Tensor] = []
    means: dict[tuple[str, str], list[Tensor]] = {}
    with torch.inference_mode():
        for batch in pairs.evaluation(Role(tuple(splits), EVALUATION_BATCH_SIZE), modalities)():
            features = run.task.features(batch)
            logits.append(features.logits.float().cpu())
            for number in numbers:
                for span, where in (features.spans or {}).items():
                    if spans is None or span in spans:
                        mean = features.blocks[number][:, where].float().mean(dim=1)
                        means.setdefault((names[number], span), []).append(mean.cpu())
    return Answers(torch.cat(logits), {key: torch.cat(parts) for key, parts in means.items()})


def image_span(run: TrainedRun) -> str:
    """The span that stands for the whole image: CLS where there is one, else all places."""
    return CLS if CLS in run.task.outline.spans else IMAGE


def latents_taught(folder: Path) -> frozenset[tuple[str, str]]:
    """Modality and recipe hash of all latents that a run saw, or whatever it learned from.

    Raises:
        CheckpointError: if what it learned from is not at hand, and may have learned from others.
    """
    config, facts = read_config(folder), read_facts(folder)
    seen = frozenset((name, facts.recipes[name]) for name in facts.latents_sha256)
    if facts.teacher_kind not in (None, "student"):
        return seen  # a probe or teacher saw what stands in the facts and learned from nobody else
    if config.targets is not None and facts.teacher_kind == "student":
        raise CheckpointError(
            f"the run in `{folder}` learned from stored targets of a student: what that one learned from is unknown",
            hint="name a run that learned from a run folder, a probe or a teacher",
        )
    return seen | latents_taught(Path(config.teacher)) if config.teacher is not None else seen


@dataclass(frozen=True, slots=True)
class Latents:
    """The standardised latents of some images, as two tables."""

    flattened: Tensor
    """float32 [N, F]: all numbers, at most `LONGEST_LATENT`; of codes as `pooled`."""
    pooled: Tensor
    """float32 [N, C]: the mean over places or steps; of codes `CODE_WIDTH` numbers."""


def scale_of(store: LatentStore, modality: str, splits: Sequence[str]) -> LatentStatistics | None:
    """What latents are standardised by: the statistics of some splits; None of codes, which have no scale."""
    is_continuous = store.recipe(modality).format.kind == "continuous"
    return store.statistics(modality, splits) if is_continuous else None


def read_latents(
    store: LatentStore, modality: str, rows: NDArray[np.int64], scale: LatentStatistics | None, *, draw: int = 0
) -> Latents:
    """The latents of some rows, one draw of each, read and made shorter in parts.

    A continuous latent is standardised per channel. Flattened it has all its numbers; more than `LONGEST_LATENT` are
    projected by a fixed Gaussian matrix, which keeps distances and shares of variance as they are but for about
    1/√`LONGEST_LATENT`. Codes have no scale: they enter as the mean over steps of a fixed random vector for each
    codebook and code, a projection of how often each code occurs.

    Raises:
        MissingLatentError: if the store has no such modality, or not all of its latents.

    Source: Johnson and Lindenstrauss (1984) of random projections.
    """
    latent_format = store.recipe(modality).format.of_one_draw
    make = _shorten_codes(latent_format) if scale is None else _shorten_numbers(latent_format, scale)
    parts = [make(part) for part in _parts(store, modality, rows, draw)]
    return Latents(torch.cat([one.flattened for one in parts]), torch.cat([one.pooled for one in parts]))


def _parts(store: LatentStore, modality: str, rows: NDArray[np.int64], draw: int) -> Iterator[Tensor]:
    has_draws = store.recipe(modality).format.axes[:1] == ("draw",)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        values = torch.from_numpy(np.ascontiguousarray(store.read(modality, rows[start : start + ROWS_AT_ONCE])))
        yield values[:, draw] if has_draws else values


def _shorten_numbers(latent_format: LatentFormat, scale: LatentStatistics) -> Callable[[Tensor], Latents]:
    mean, std = torch.from_numpy(scale.mean).float(), torch.from_numpy(scale.std).float()
    std = torch.where(std > 0, std, 1.0)
    length = math.prod(latent_format.shape)
    directions = _random(length, LONGEST_LATENT) / math.sqrt(LONGEST_LATENT) if length > LONGEST_LATENT else None

    def make(values: Tensor) -> Latents:
        tokens = (tokens_of(values.float(), latent_format) - mean) / std
        flattened = tokens.flatten(1)
        return Latents(flattened if directions is None else flattened @ directions, tokens.mean(dim=1))

    return make


def _shorten_codes(latent_format: LatentFormat) -> Callable[[Tensor], Latents]:
    assert latent_format.vocabulary is not None
    n_codebooks = latent_format.shape[latent_format.channel_axis]
    vectors = _random(n_codebooks * latent_format.vocabulary, CODE_WIDTH) / math.sqrt(CODE_WIDTH)
    first = torch.arange(n_codebooks) * latent_format.vocabulary

    def make(codes: Tensor) -> Latents:
        places = tokens_of(codes.long(), latent_format) + first
        pooled = torch.stack([vectors[one].sum(dim=1).mean(dim=0) for one in places])
        return Latents(pooled, pooled)

    return make


def _random(n_rows: int, n_columns: int) -> Tensor:
    return torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(0))


def other_draw(
    store: LatentStore,
    other: LatentStore | None,
    modality: str,
    rows: NDArray[np.int64],
    scale: LatentStatistics | None,
) -> Latents | None:
    """A second draw of the same images' latents: of the store itself, or of one built with another seed; or None.

    Raises:
        SpecError: if the other store holds the very same draw, or latents of another source.
        MissingLatentError: if it has not all images.
    """
    if store.recipe(modality).format.n_draws > 1:
        return read_latents(store, modality, rows, scale, draw=1)
    if other is None or modality not in other.modalities:
        return None
    ours, theirs = store.recipe(modality), other.recipe(modality)
    if ours.hash == theirs.hash:
        raise SpecError(
            f"`{other.place}` holds the same draw of `{modality}` as `{store.place}`: it says nothing of noise",
            hint="build it from the same cache spec with another `seed`",
        )
    if ours.model_copy(update={"seed": theirs.seed}).hash != theirs.hash:
        raise SpecError(
            f"`{other.place}` holds `{modality}` of another recipe than `{store.place}`, and not only of another seed",
            hint="build it from the same cache spec with another `seed`",
        )
    there = np.array([other.rows.row_of(image_id) for image_id in store.rows.ids_of(rows)], np.int64)
    return read_latents(other, modality, there, scale)
