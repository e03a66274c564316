"""Pairs from the cache as batches for a model: labelled and transfer images side by side.

An unlabelled image carries the label -1 and takes part in distillation only.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from dla_cache.decoded import Decode
from dla_cache.images import Pixels, centre_square, decode_image, shrink
from dla_cache.pairs import PairBatch, PairStream
from dla_cache.store import LatentStore
from trainer.ahead import made_ahead
from trainer.augment import erase, view_images
from trainer.latent_views import check_mirroring, mirror_latents
from trainer.mixing import MixingConfig, check_pairs, mix_pairs
from trainer.objectives.ce import MixedLabels
from trainer.views import ViewConfig, Views, draw_views


@dataclass(frozen=True, slots=True)
class Batch:
    """What a task sees: joined by image ID, on the device of the model."""

    image_ids: tuple[str, ...]
    pixels: Tensor
    """float32 [B, 3, H, W], the training view, normalised; [B, 0] of a run that sees no images."""
    latents: dict[str, Tensor]
    """Raw latents of the whole image, one draw of each: float32, or int64 codes."""
    labels: Tensor
    """int64 [B], -1 where there is none; of a multi-label store [B, K] of 0 and 1, or -1 all along."""

    mixed: MixedLabels | None = None
    """Whose labels count beside an image's own, where images were mixed."""

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have any number of classes."""
        return self.labels.ndim == 2

    def __len__(self) -> int:
        return len(self.image_ids)


@dataclass(frozen=True, slots=True)
class PixelScale:
    """What is subtracted from pixels in [0, 1] and what they are divided by, per channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def apply(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 255], on the CPU, to float32, normalised."""
        # NumPy, in one thread: torch would take the threads of the step that runs beside.
        mean, std = (
            np.array(values, np.float32).reshape(3, 1, 1) * np.float32(255) for values in (self.mean, self.std)
        )
        normalised = pixels.numpy().astype(np.float32)
        normalised -= mean
        normalised /= std
        return torch.from_numpy(normalised)


@dataclass(frozen=True, slots=True)
class Role:
    """Some splits of a store in one role, and how many of their images stand in a batch."""

    splits: tuple[str, ...]
    batch_size: int
    labels_hidden: bool = False
    """Whether its labels, if the store has any, count as absent."""


class PairSource:
    """Batches of a store for one run: same seed, same batches, whatever was asked for before."""

    def __init__(
        self,
        store: LatentStore,
        images: Path | None,
        *,
        image_size: int,
        pixel_scale: PixelScale,
        modalities: Sequence[str],
        view: ViewConfig,
        seed: int,
        device: str,
        sees_images: bool = True,
        mixing: MixingConfig | None = None,
    ) -> None:
        """
        Args:
            sees_images: False for a probe, which is then spared from reading and decoding them.
            mixing: of the images whose labels are learned; `refuse_mixing` says when it is wrong.

        Raises:
            SpecError: if views are mirrored and a latent cannot be.
        """
        self.store = store
        self.images = images
        self.image_size = image_size
        self.pixel_scale = pixel_scale
        self.modalities = tuple(modalities)
        self.view = view
        self.seed = seed
        self.device = device
        self.sees_images = sees_images
        self.view_seed = seed if view.seed is None else view.seed
        self.mixing = mixing
        formats = {name: store.recipe(name).format for name in store.modalities}
        self.n_draws = {name: (one.n_draws, one.of_one_draw == one) for name, one in formats.items()}
        self.formats = {name: formats[name].of_one_draw for name in self.modalities if name in formats}
        if view.horizontal_flip and sees_images:
            check_mirroring(self.formats)

    def training(self, roles: Sequence[Role]) -> Callable[[int], Generator[Batch, None, None]]:
        """Endless shuffled batches from a step on, the roles' images one after another in each.

        Where a store holds several draws of a latent, an image has another one each epoch, until it has had all.
        Batches are made ahead, so that a step waits for none that takes no longer than itself.
        """
        if self.mixing is not None:
            check_pairs(roles[0].batch_size)
        decode = self._decode_for_crops if self.view.is_cropped else self._decode_for_centres
        streams = [self._stream(role, self.modalities, decode, shuffle=True, drop_last=True) for role in roles]

        def batches(step: int) -> Generator[Batch, None, None]:
            iterators = [stream.batches(step) for stream in streams]
            try:
                for parts in zip(*iterators, strict=True):
                    yield self._joined([seen_by(role, part) for role, part in zip(roles, parts, strict=True)])
            finally:
                for iterator in iterators:
                    iterator.close()

        return lambda step: made_ahead(batches(step))

    def evaluation(self, role: Role, modalities: Sequence[str]) -> Callable[[], Iterator[Batch]]:
        """Each image once, in row order, its centre square as its view, the first draw of its latents.

        A student needs no `modalities`.
        """
        stream = self._stream(role, modalities, self._decode_centre, shuffle=False, drop_last=False)

        def batches() -> Iterator[Batch]:
            for pairs in stream.epoch_once():
                seen = self._with_one_draw(pairs, [0] * len(pairs.image_ids))
                yield self._batch([seen], self._centres(pairs) if self.sees_images else _no_pixels([pairs]))

        return batches

    def _stream(
        self, role: Role, modalities: Sequence[str], decode: Decode, *, shuffle: bool, drop_last: bool
    ) -> PairStream:
        return PairStream(
            self.store,
            self.images,
            role.splits,
            role.batch_size,
            seed=self.seed,
            decode=decode if self.sees_images else None,
            images=self.sees_images,
            modalities=modalities,
            shuffle=shuffle,
            drop_last=drop_last,
        )

    def _decode_centre(self, data: bytes, image_id: str) -> Pixels:
        return centre_square(decode_image(data, image_id), self.image_size)

    def _decode_for_centres(self, data: bytes, image_id: str) -> Pixels:
        return centre_square(self._decode_enough(data, image_id, self.image_size), self.image_size)

    def _decode_for_crops(self, data: bytes, image_id: str) -> Pixels:
        # So small the smallest crop still has `image_size` pixels a side; a camera's picture would fill the memory.
        side = math.ceil(self.image_size / math.sqrt(self.view.scale_min))
        return shrink(self._decode_enough(data, image_id, side), side)

    def _decode_enough(self, data: bytes, image_id: str, side: int) -> Pixels:
        return decode_image(data, image_id, min_side=side if self.view.scaled_decode else None)

    def _joined(self, parts: Sequence[PairBatch]) -> Batch:
        parts = [
            self._with_one_draw(
                part, [crc32(image_id.encode()) + self.view.number_in(part.epoch) for image_id in part.image_ids]
            )
            for part in parts
        ]
        if not self.sees_images:
            return self._batch(parts, _no_pixels(parts))
        views = [self._views(part) for part in parts]
        parts = [self._mirrored(part, seen) for part, seen in zip(parts, views, strict=True)]
        batch = self._batch(
            parts, _side_by_side([self._shown(part, seen) for part, seen in zip(parts, views, strict=True)])
        )
        if self.mixing is None:
            return batch
        # The labelled images come first.
        number = self.view.number_in(parts[0].epoch)
        pixels, mixed = mix_pairs(self.mixing, self.view_seed, number, parts[0].image_ids, batch.pixels, batch.labels)
        return replace(batch, pixels=pixels, mixed=mixed)

    def _with_one_draw(self, part: PairBatch, turns: Sequence[int]) -> PairBatch:
        """The batch with one draw of each latent: number `turn` of an image, counted round and round."""
        places, latents = torch.arange(len(turns)), dict(part.latents)
        for name, values in part.latents.items():
            n_draws, is_one = self.n_draws[name]
            if not is_one:
                latents[name] = values[places, torch.tensor([turn % n_draws for turn in turns])]
        return replace(part, latents=latents)

    def _centres(self, part: PairBatch) -> Tensor:
        return self.pixel_scale.apply(torch.from_numpy(np.stack(part.pixels)))

    def _views(self, part: PairBatch) -> Views:
        aspects = np.array([pixels.shape[2] / pixels.shape[1] for pixels in part.pixels])
        return draw_views(self.view_seed, part.image_ids, self.view.number_in(part.epoch), self.view, aspects)

    def _shown(self, part: PairBatch, views: Views) -> Tensor:
        return erase(self.pixel_scale.apply(view_images(part.pixels, views, self.image_size)), views.erasings)

    def _mirrored(self, part: PairBatch, views: Views) -> PairBatch:
        """The batch with the latents of its mirrored images mirrored."""
        latents = {
            name: mirror_latents(values, self.formats[name], views.flip) for name, values in part.latents.items()
        }
        return replace(part, latents=latents)

    def _batch(self, parts: Sequence[PairBatch], pixels: Tensor) -> Batch:
        latents = {name: torch.cat([part.latents[name] for part in parts]) for name in parts[0].latents}
        return Batch(
            image_ids=tuple(image_id for part in parts for image_id in part.image_ids),
            pixels=pixels.to(self.device),
            latents={
                name: (values.float() if values.is_floating_point() else values.long()).to(self.device)
                for name, values in latents.items()
            },
            labels=torch.cat([part.labels for part in parts]).to(self.device),
        )


def _side_by_side(pixels: Sequence[Tensor]) -> Tensor:
    return pixels[0] if len(pixels) == 1 else torch.from_numpy(np.concatenate([one.numpy() for one in pixels]))


def _no_pixels(parts: Sequence[PairBatch]) -> Tensor:
    return torch.empty(sum(len(part.image_ids) for part in parts), 0)


def seen_by(role: Role, part: PairBatch) -> PairBatch:
    """A part of a batch with the labels that its role may see."""
    return replace(part, labels=torch.full_like(part.labels, -1)) if role.labels_hidden else part
