"""Pairs from the cache as batches for a model: labelled and transfer images side by side.

An unlabelled image carries the label -1 and takes part in distillation only.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from dla_cache.decoded import Decode
from dla_cache.images import Pixels, centre_square, decode_image, shrink
from dla_cache.joined import JoinedStore
from dla_cache.pairs import PairBatch, PairStream
from dla_cache.store import LatentStore
from trainer.features import Target
from trainer.views import ViewConfig, draw_views, view_images


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
    targets: dict[Target, Tensor] = field(default_factory=dict)
    """What a frozen model once said of these very views, float32."""

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
        """Pixels [B, 3, H, W] in [0, 255] to float32, normalised."""
        mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (self.mean, self.std))
        return (pixels.float() - mean) / std


@dataclass(frozen=True, slots=True)
class Role:
    """Some splits of a store in one role, and how many of their images stand in a batch."""

    splits: tuple[str, ...]
    batch_size: int
    labels_hidden: bool = False
    """Whether its labels, if the store has any, count as absent."""


class ViewTargets(Protocol):
    """Stored targets of some images' views."""

    @property
    def store(self) -> LatentStore:
        """Where they lie."""

    def series(self, view: int) -> tuple[str, ...]:
        """The modalities of the store that a view's targets lie in."""

    def all_series(self) -> tuple[str, ...]:
        """Those of all views."""

    def unpack(self, latents: Mapping[str, Tensor], view: int) -> dict[Target, Tensor]:
        """The targets [B, ...] of a view, float32, from what was read of its series."""


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
        targets: ViewTargets | None = None,
        threads: int = 1,
    ) -> None:
        """
        Args:
            sees_images: False for a probe, which is then spared from reading and decoding them.
            targets: what training batches bring along of the view that they show.
            threads: that read and decode; they change nothing in the batches.
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
        self.targets = targets
        self.threads = threads
        formats = {name: store.recipe(name).format for name in store.modalities}
        self.n_draws = {name: (one.n_draws, one.of_one_draw == one) for name, one in formats.items()}

    def training(self, roles: Sequence[Role]) -> Callable[[int], Generator[Batch, None, None]]:
        """Endless shuffled batches from a step on, the roles' images one after another in each.

        Where a store holds several draws of a latent, an image has another one each epoch, until it has had all.
        """
        streams = [self._training_stream(role, self._decode_for_views) for role in roles]

        def batches(step: int) -> Generator[Batch, None, None]:
            iterators = [stream.batches(step) for stream in streams]
            try:
                for parts in zip(*iterators, strict=True):
                    yield self._joined([seen_by(role, part) for role, part in zip(roles, parts, strict=True)])
            finally:
                for iterator in iterators:
                    iterator.close()

        return batches

    def evaluation(self, role: Role, modalities: Sequence[str]) -> Callable[[], Iterator[Batch]]:
        """Each image once, in row order, its centre square as its view, the first draw of its latents.

        A student needs no `modalities`.
        """
        stream = self._stream(role, modalities, self._decode_centre, shuffle=False, drop_last=False)

        def batches() -> Iterator[Batch]:
            for pairs in stream.epoch_once():
                seen = self._with_one_draw(pairs, [0] * len(pairs.image_ids))
                yield self._batch(seen, self._centres(pairs) if self.sees_images else _no_pixels(pairs))

        return batches

    def in_order(self, splits: Sequence[str], batch_size: int) -> PairStream:
        """The images of some splits in row order, to be `shown` in views of any number."""
        role = Role(tuple(splits), batch_size)
        return self._stream(role, self.modalities, self._decode_for_views, shuffle=False, drop_last=False)

    @property
    def _decode_for_views(self) -> Decode:
        return self._decode_for_crops if self.view.is_cropped else self._decode_for_centres

    def _training_stream(self, role: Role, decode: Decode) -> PairStream:
        if self.targets is None:
            return self._stream(role, self.modalities, decode, shuffle=True, drop_last=True)
        targets = self.targets
        return self._stream(
            role,
            (*self.modalities, *targets.all_series()),
            decode,
            shuffle=True,
            drop_last=True,
            store=JoinedStore([self.store, targets.store], missing="skip"),
            modalities_of=lambda epoch: (*self.modalities, *targets.series(self._view_in(epoch))),
        )

    def _view_in(self, epoch: int) -> int:
        return self.view.number_in(epoch, self.seed)

    def _stream(
        self,
        role: Role,
        modalities: Sequence[str],
        decode: Decode,
        *,
        shuffle: bool,
        drop_last: bool,
        store: JoinedStore | None = None,
        modalities_of: Callable[[int], Sequence[str]] | None = None,
    ) -> PairStream:
        return PairStream(
            store or self.store,
            self.images,
            role.splits,
            role.batch_size,
            seed=self.seed,
            decode=decode if self.sees_images else None,
            images=self.sees_images,
            modalities=modalities,
            shuffle=shuffle,
            drop_last=drop_last,
            modalities_of=modalities_of,
            threads=self.threads,
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
        shown = [self.shown(part, self._view_in(part.epoch)) for part in parts]
        return shown[0] if len(shown) == 1 else _side_by_side(shown)

    def shown(self, part: PairBatch, view: int) -> Batch:
        """Images in their view of a number, with the draw of their latents that goes with it."""
        latents = {name: part.latents[name] for name in self.modalities}
        seen = self._with_one_draw(
            replace(part, latents=latents), [crc32(image_id.encode()) + view for image_id in part.image_ids]
        )
        pixels = self.pixel_scale.apply(self._viewed(part, view)) if self.sees_images else _no_pixels(part)
        batch = self._batch(seen, pixels)
        if self.targets is None:
            return batch
        said = self.targets.unpack(part.latents, view)
        return replace(batch, targets={target: values.to(self.device) for target, values in said.items()})

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

    def _viewed(self, part: PairBatch, view: int) -> Tensor:
        aspects = np.array([pixels.shape[2] / pixels.shape[1] for pixels in part.pixels])
        seed = self.seed if self.view.seed is None else self.view.seed
        views = draw_views(seed, part.image_ids, view, self.view, aspects)
        return view_images(part.pixels, views, self.image_size)

    def _batch(self, part: PairBatch, pixels: Tensor) -> Batch:
        return Batch(
            image_ids=part.image_ids,
            pixels=pixels.to(self.device),
            latents={
                name: (values.float() if values.is_floating_point() else values.long()).to(self.device)
                for name, values in part.latents.items()
            },
            labels=part.labels.to(self.device),
        )


def _no_pixels(part: PairBatch) -> Tensor:
    return torch.empty(len(part.image_ids), 0)


def _side_by_side(parts: Sequence[Batch]) -> Batch:
    """The images of all parts as one batch."""

    def whole(name: str) -> dict[Any, Tensor]:
        return {key: torch.cat([getattr(part, name)[key] for part in parts]) for key in getattr(parts[0], name)}

    return Batch(
        image_ids=tuple(image_id for part in parts for image_id in part.image_ids),
        pixels=torch.cat([part.pixels for part in parts]),
        latents=whole("latents"),
        labels=torch.cat([part.labels for part in parts]),
        targets=whole("targets"),
    )


def seen_by(role: Role, part: PairBatch) -> PairBatch:
    """A part of a batch with the labels that its role may see."""
    return replace(part, labels=torch.full_like(part.labels, -1)) if role.labels_hidden else part
