"""What a build says of itself while it runs and when it is through."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dla_cache.pipeline import Stage


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """Where a build is. Images count once a series, and only those that this run computes or stores."""

    modality: str
    """Or `images`."""
    shard: int
    n_shards: int
    """Of the whole store."""
    images_done: int
    images_total: int
    is_waiting: bool = False
    """Whether the shard is one that another builder has claimed."""
    done_of: Mapping[str, int] = field(default_factory=dict)
    """Images by series."""
    total_of: Mapping[str, int] = field(default_factory=dict)
    images_bad: int = 0
    """Without a latent so far."""
    device_busy: float | None = None
    """Share of the time in which the device worked; of several devices the mean. None before its first batch."""
    bottleneck: Stage | None = None
    """What all else waits for: the device, or reading and decoding, or writing."""


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build did."""

    n_images: int
    """Images of the store, without those that were removed."""
    images_left_out: int
    """That the manifest lists and that were removed from the store before."""
    images_encoded: int
    """Computed and committed by this run, counted once a modality; not those that another process committed first."""
    images_stored: int
    """Whose own bytes this run committed."""
    shards_committed: int
    """By this run."""
    shards_repaired: int
    """Taken out of the store for being damaged, and made again."""
    shards_changed: tuple[str, ...]
    """Those of them with another content than before, as `depth, shard 3`: the source is not deterministic."""
    shards_without_removed: int
    """Those of them from which images were being removed: by now they are without these."""
    shards_missing: int
    """Of other ranks, not committed yet."""
    seconds: float
    content_hash: str | None
    """None while shards of a modality are missing."""
    put_aside: Mapping[str, str] = field(default_factory=dict)
    """Image ID → why it has no latent, of those that this run left out of the store."""
    batch_sizes: Mapping[str, int] = field(default_factory=dict)
    """By modality, images per call of its source at the end: fewer than asked for where memory ran out."""
    device_busy: float | None = None
    """See `BuildProgress`."""
    bottleneck: Stage | None = None

    @property
    def images_per_s(self) -> float:
        return self.images_encoded / self.seconds if self.seconds else 0.0
