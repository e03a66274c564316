"""Results become shards: what a source put out is checked, gathered and committed, image by image and in row order.

An image without a latent, be it that it cannot be read or that the source made none, keeps its shard from being
committed and nothing else. It is named with its reason, and never stands in for zeros or for its neighbour.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dla_cache.batches import Segment
from dla_cache.encoding import Encoder, check_latents
from dla_cache.errors import BadImagesError
from dla_cache.leaks import Synonyms, audit_captions
from dla_cache.memory import LOOSE_RECORDS
from dla_cache.pipeline import Result
from dla_cache.shards import Shard
from dla_cache.store import LatentStore
from dla_cache.store.layout import IMAGES

NONE_GOOD = 64
"""Bad images at the beginning of a series without a good one that end a build: then it is not the images' fault."""


@dataclass(slots=True)
class _Begun:
    """A shard of one series, as far as its images have come."""

    latents: list[NDArray[np.generic]] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    is_bad: bool = False
    seconds: float = 0.0
    made_with: dict[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FilledShard:
    """A shard of which all images have come."""

    series: str
    shard: Shard
    is_ours: bool
    """Whether this process has committed it: not if another was first, nor if it has a bad image."""


class ShardWriter:
    """Takes results in their order and commits each shard when its last image is there."""

    def __init__(self, store: LatentStore, encoders: Mapping[str, Encoder], device: str, synonyms: Synonyms) -> None:
        self.bad: dict[str, str] = {}
        """Image ID → why it has no latent, as what is said of it: `cannot be decoded: …`."""
        self._store, self._encoders, self._device, self._synonyms = store, encoders, device, synonyms
        self._begun: dict[tuple[str, int], _Begun] = {}
        self._n_good: dict[str, int] = {}
        self._n_bad: dict[str, int] = {}

    def take(self, result: Result) -> list[FilledShard]:
        """Keeps the images of a result, and commits the shards that it fills.

        Raises:
            LatentShapeError: if the source put out something else than its recipe declares.
            BadImagesError: if the source has made no latent yet, of `NONE_GOOD` images.
            StoreError: if the store cannot be written, or images were removed from it.
        """
        image_ids = result.batch.image_ids
        bad = dict(result.bad)
        values: NDArray[np.generic] | None = None
        captions: Sequence[str] = ()
        if result.put_out is not None:
            latents = check_latents(result.put_out, self._encoders[result.series].recipe.format, image_ids)
            values, captions = latents.values, latents.captions
            for place, reason in latents.bad.items():
                bad.setdefault(place, f"has no `{result.series}`: {reason}")
        self._note_bad(result.series, {image_ids[place]: reason for place, reason in bad.items()}, len(image_ids))
        filled, start = [], 0
        for segment in result.batch.segments:
            stop = start + len(segment.images)
            begun = self._begun.setdefault((result.series, segment.shard.index), _Begun())
            begun.is_bad |= any(start <= place < stop for place in bad)
            if values is not None:
                begun.latents.append(values[start:stop])
            begun.contents += result.contents[start:stop]
            begun.captions += captions[start:stop]
            begun.seconds += result.seconds * len(segment.images) / max(len(image_ids), 1)
            if result.put_out is not None:
                begun.made_with["batch_size"] = result.put_out.images_per_call
                if result.put_out.out_of_memory:
                    begun.made_with["out_of_memory"] = result.put_out.out_of_memory
            if segment.is_last:
                filled.append(self._finish(result.series, segment))
            start = stop
        return filled

    def _note_bad(self, series: str, bad: Mapping[str, str], n_images: int) -> None:
        for image_id, reason in bad.items():
            self.bad.setdefault(image_id, reason)
        self._n_bad[series] = self._n_bad.get(series, 0) + len(bad)
        self._n_good[series] = self._n_good.get(series, 0) + n_images - len(bad)
        if not self._n_good[series] and self._n_bad[series] >= NONE_GOOD:
            raise bad_images(self.bad, "not one good image came before them, so this ends here")

    def _finish(self, series: str, segment: Segment) -> FilledShard:
        begun, shard = self._begun.pop((series, segment.shard.index)), segment.shard
        if begun.is_bad:
            return FilledShard(series, shard, is_ours=False)
        if series == IMAGES:
            is_ours = self._store.write_images(shard, begun.contents, seconds=begun.seconds)
        else:
            encoder = self._encoders[series]
            latent = encoder.recipe.format
            labels = self._store.rows.labels_of(self._store.kept_rows(shard))
            latents = begun.latents or [np.empty((0, *latent.shape), latent.read_dtype)]
            is_ours = self._store.write_shard(
                series,
                shard,
                np.concatenate(latents),
                seconds=begun.seconds,
                device=self._device,
                made_with=encoder.made_with | begun.made_with,
                audit=audit_captions(begun.captions, self._store.class_names, labels, self._synonyms),
            )
        self._store.consolidate(series, at_least=LOOSE_RECORDS)
        return FilledShard(series, shard, is_ours)


def bad_images(bad: Mapping[str, str], what: str) -> BadImagesError:
    """The error of images that have no latent, with the reasons of the first ones."""
    some = [f"`{image_id}` {reason}" for image_id, reason in list(bad.items())[:3]]
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    return BadImagesError(
        f"{len(bad)} {'image has' if len(bad) == 1 else 'images have'} no latent, {what}: {'; '.join(some)}{more}",
        hint="mend them and run the same command again: only their shards are computed; or let so many be left out of"
        " the store, as `--allow-bad 3` or `--allow-bad 0.1%`",
    )
