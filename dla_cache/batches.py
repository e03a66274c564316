"""Which images go through the sources together, and how one of them becomes what sources see."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

from dla_cache.errors import ImageError
from dla_cache.images import centre_square, decode_view, read_image_bytes
from dla_cache.manifest import path_of
from dla_cache.pipeline import Slot
from dla_cache.shards import Shard
from dla_cache.spec import ImageRecipe
from dla_cache.store.layout import IMAGES
from dla_cache.store.rows import RowTable, StoredImage
from dla_cache.stored_images import encode_image


@dataclass(frozen=True, slots=True)
class Segment:
    """Images of one shard, next to each other, that are in one batch; none of a shard whose images were all removed."""

    shard: Shard
    images: Sequence[StoredImage]
    is_last: bool
    """Whether the shard ends with them."""


@dataclass(frozen=True)
class Batch:
    """Images that are read once and go through the same sources."""

    series: tuple[str, ...]
    """For which it is read: modalities, and `images` if the store is to hold them."""
    segments: tuple[Segment, ...]

    @cached_property
    def images(self) -> list[StoredImage]:
        """At most as many as a batch holds; fewer only in the last one of its series."""
        return list(chain.from_iterable(segment.images for segment in self.segments))

    @cached_property
    def image_ids(self) -> list[str]:
        """Theirs."""
        return [image.image_id for image in self.images]


def batches_of(shards: Iterable[tuple[Shard, tuple[str, ...]]], rows: RowTable, batch_size: int) -> Iterator[Batch]:
    """The images of shards that were not removed, in batches that run on from shard to shard.

    Each series gets full batches but for its last one, so that a latent depends on its neighbours as little as can be.
    Shards that are wanted for other series than those before them make batches of their own.

    Args:
        shards: each with the series that lack it; asked for one at a time, when the batches before are given out.
    """
    begun: dict[tuple[str, ...], list[Segment]] = {}
    for shard, series in shards:
        images = rows.images_of(rows.kept_rows_of(shard))
        segments = begun.setdefault(series, [])
        start = 0
        while True:
            room = batch_size - sum(len(segment.images) for segment in segments)
            some = images[start : start + room]
            start += room
            segments.append(Segment(shard, some, is_last=start >= len(images)))
            if len(some) == room:
                yield Batch(series, tuple(segments))
                segments.clear()
            if start >= len(images):
                break
    yield from (Batch(series, tuple(segments)) for series, segments in begun.items() if segments)


@dataclass(frozen=True, slots=True)
class ImageReader:
    """Reads an image of a batch, once for all its series."""

    image_root: Path
    sides: Mapping[str, int]
    """Of what the source of each modality sees."""
    image_recipe: ImageRecipe | None
    """How the store is to hold images."""

    def __call__(self, batch: Batch, slot: Slot, place: int) -> None:
        """Puts the views of an image, and what the store is to hold of it, into its place in a slot.

        Raises:
            ImageError: if it is missing, changed or cannot be decoded; the message is what is said of the image.
        """
        image = batch.images[place]
        try:
            self._read(image, batch.series, slot, place)
        except ImageError as error:
            # The reason is kept in the store, which holds no path of this machine.
            message = error.message.replace(f"{self.image_root}/", "")
            said = message.removeprefix(f"image `{image.image_id}` ")
            raise ImageError(said if said != message else f"cannot be used: {message}") from error

    def _read(self, image: StoredImage, series: Sequence[str], slot: Slot, place: int) -> None:
        content = read_image_bytes(path_of(self.image_root, image.uri), image)
        sides = {self.sides[name] for name in series if name != IMAGES}
        pixels = decode_view(content, image.image_id) if sides else None
        if pixels is not None:
            for side in sides:
                centre_square(pixels, side, out=slot.views[side][place])
        if IMAGES in series:
            assert self.image_recipe is not None
            slot.contents[place] = encode_image(content, image.image_id, self.image_recipe, pixels)
