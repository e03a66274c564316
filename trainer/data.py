"""Pairs from the cache as batches for a model: labelled and transfer images side by side.

An unlabelled image carries the label -1 and takes part in distillation only.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Protocol
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from dla_cache.decoded import Decode
from dla_cache.errors import SpecError, name_some
from dla_cache.images import Pixels, centre_square, decode_image, shrink
from dla_cache.joined import JoinedStore
from dla_cache.pairs import WHOLE, PairBatch, PairStream, Share, made_ahead
from dla_cache.store import LatentStore
from trainer.augment import erase, view_images
from trainer.batch import Batch, side_by_side
from trainer.features import Target
from trainer.latent_views import check_mirroring, mirror_latents
from trainer.mixing import MixingConfig, check_pairs, mix_pairs
from trainer.views import ViewConfig, Views, draw_views


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
    image_ids: frozenset[str] | None = None
    """Those of the splits that take part; None for all."""


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
        latents_follow_views: bool = True,
        targets: ViewTargets | None = None,
        mixing: MixingConfig | None = None,
        share: Share = WHOLE,
        threads: int = 1,
        keep_decoded_bytes: int = 2**30,
    ) -> None:
        """
        Args:
            sees_images: False for a probe, which is then spared from reading and decoding them.
            latents_follow_views: False for latents that a probe reads, which has never seen one mirrored.
            targets: what training batches bring along of the view that they show.
            mixing: of the images whose labels are learned; `refuse_mixing` says when it is wrong.
            threads: that read and decode; they change nothing in the batches.
            share: this process's part of every training batch, and of the batches of an evaluation.
            keep_decoded_bytes: of decoded images that are kept in memory for the next epoch.

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
        self.targets = targets
        self.mixing = mixing
        self.view_seed = seed if view.seed is None else view.seed
        self.share = share
        self.threads = threads
        self.keep_decoded_bytes = keep_decoded_bytes
        formats = {name: store.recipe(name).format for name in store.modalities}
        self.n_draws = {name: (one.n_draws, one.of_one_draw == one) for name, one in formats.items()}
        self.formats = {name: formats[name].of_one_draw for name in self.modalities if name in formats}
        self.mirrors_latents = view.horizontal_flip and sees_images and latents_follow_views
        if self.mirrors_latents:
            check_mirroring(self.formats)

    def training(self, roles: Sequence[Role], n_micro: int = 1) -> Callable[[int], Generator[Batch, None, None]]:
        """Endless shuffled batches from a step on, the roles' images one after another in each.

        A process's share of a batch comes as `n_micro` batches, each with as many images of each role: so a mean over
        the images of a role is the mean of those of the parts.

        Where a store holds several draws of a latent, an image has another one each epoch, until it has had all.

        Raises:
            SpecError: if the images of a role cannot be cut into so many equal parts.
        """
        n_parts = self.share.world_size * n_micro
        for role in roles:
            if role.batch_size % n_parts:
                raise SpecError(
                    f"a batch has {role.batch_size} images of {name_some(role.splits)}, which make no {n_parts} equal"
                    f" parts: {self.share.world_size} processes times `loop.accumulation` {n_micro}",
                    hint="choose the images of a batch, processes and accumulation so that they fit",
                )
        if self.mixing is not None:
            check_pairs(roles[0].batch_size // n_parts)
        streams = [self._training_stream(role, self._decode_for_views) for role in roles]

        def make(number: int) -> list[Batch]:
            seen = [seen_by(role, stream.batch(number)) for role, stream in zip(roles, streams, strict=True)]
            parts = [self._joined([part_of(one, Share(micro, n_micro)) for one in seen]) for micro in range(n_micro)]
            return [replace(part, step=number) for part in parts]

        def batches(step: int) -> Generator[Batch, None, None]:
            # Views are made by the threads that read, so that a step waits for nothing but a slow machine.
            with closing(made_ahead(count(step), make, self.threads)) as ahead:
                for parts in ahead:
                    for part in parts:
                        yield part.to(self.device)

        return batches

    def evaluation(self, role: Role, modalities: Sequence[str]) -> Callable[[], Iterator[Batch]]:
        """Each image once, in row order, its centre square as its view, the first draw of its latents.

        Several processes take whole batches in turn, so that a batch is what it is for one.
        A student needs no `modalities`.
        """
        stream = self._stream(role, modalities, self._decode_centre, shuffle=False, drop_last=False)

        def batches() -> Iterator[Batch]:
            for pairs in stream.batches(self.share.rank, step=self.share.world_size, stop=len(stream)):
                seen = self._with_one_draw(pairs, [0] * len(pairs.image_ids))
                batch = self._batch(seen, self._centres(pairs) if self.sees_images else _no_pixels(pairs))
                yield batch.to(self.device)

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
            return self._stream(role, self.modalities, decode, shuffle=True, drop_last=True, share=self.share)
        targets = self.targets
        return self._stream(
            role,
            (*self.modalities, *targets.all_series()),
            decode,
            shuffle=True,
            drop_last=True,
            share=self.share,
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
        share: Share = WHOLE,
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
            image_ids=role.image_ids,
            shuffle=shuffle,
            drop_last=drop_last,
            modalities_of=modalities_of,
            share=share,
            threads=self.threads,
            keep_decoded_bytes=self.keep_decoded_bytes,
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
        batch = shown[0] if len(shown) == 1 else side_by_side(shown)
        if self.mixing is None:
            return batch
        # The labelled images come first.
        number, labelled = self._view_in(parts[0].epoch), parts[0].image_ids
        pixels, mixed = mix_pairs(self.mixing, self.view_seed, number, labelled, batch.pixels, batch.labels)
        return replace(batch, pixels=pixels, mixed=mixed)

    def shown(self, part: PairBatch, view: int) -> Batch:
        """Images in their view of a number, with the draw of their latents that goes with it; on the CPU."""
        latents = {name: part.latents[name] for name in self.modalities}
        seen = self._with_one_draw(
            replace(part, latents=latents), [crc32(image_id.encode()) + view for image_id in part.image_ids]
        )
        if self.sees_images:
            views = self._views(part, view)
            batch = self._batch(self._mirrored(seen, views), self._viewed(part, views))
        else:
            batch = self._batch(seen, _no_pixels(part))
        if self.targets is None:
            return batch
        return replace(batch, targets=self.targets.unpack(part.latents, view))

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

    def _views(self, part: PairBatch, number: int) -> Views:
        aspects = np.array([pixels.shape[2] / pixels.shape[1] for pixels in part.pixels])
        return draw_views(self.view_seed, part.image_ids, number, self.view, aspects)

    def _viewed(self, part: PairBatch, views: Views) -> Tensor:
        return erase(self.pixel_scale.apply(view_images(part.pixels, views, self.image_size)), views.erasings)

    def _mirrored(self, part: PairBatch, views: Views) -> PairBatch:
        """The batch with the latents of its mirrored images mirrored."""
        if not self.mirrors_latents:
            return part
        latents = {
            name: mirror_latents(values, self.formats[name], views.flip) for name, values in part.latents.items()
        }
        return replace(part, latents=latents)

    def _batch(self, part: PairBatch, pixels: Tensor) -> Batch:
        return Batch(
            image_ids=part.image_ids,
            pixels=pixels,
            latents={
                name: values.float() if values.is_floating_point() else values.long()
                for name, values in part.latents.items()
            },
            labels=part.labels,
            rows=torch.from_numpy(part.rows),
        )


def _no_pixels(part: PairBatch) -> Tensor:
    return torch.empty(len(part.image_ids), 0)


def seen_by(role: Role, part: PairBatch) -> PairBatch:
    """A part of a batch with the labels that its role may see."""
    return replace(part, labels=torch.full_like(part.labels, -1)) if role.labels_hidden else part


def part_of(batch: PairBatch, share: Share) -> PairBatch:
    """Neighbouring images of a batch."""
    start, stop = share.of(len(batch.image_ids))
    return replace(
        batch,
        image_ids=batch.image_ids[start:stop],
        rows=batch.rows[start:stop],
        pixels=batch.pixels[start:stop],
        images=batch.images[start:stop],
        latents={name: latents[start:stop] for name, latents in batch.latents.items()},
        present={name: present[start:stop] for name, present in batch.present.items()},
        labels=batch.labels[start:stop],
    )
