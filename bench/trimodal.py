"""A made data set of which is known what its latents can teach: what a study is calibrated on.

Images are one of four faint patterns under noise. A source that knows the patterns answers how much of each is in an
image: its latent is a function of the image, and what it adds is what the source knew before. A source that knows other
patterns answers how much there is of those: numbers of the same kind that tell nothing of the class.

Dimensions: B images, K classes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dla_cache.build import build_cache
from dla_cache.data.export import encode_png
from dla_cache.manifest import ManifestRow, write_manifest
from dla_cache.spec import CacheSpec, LatentFormat, LatentSpec, Modality, Recipe

SIDE = 16
"""Of an image, in pixels."""
CLASSES = ("north", "east", "south", "west")
SPLITS = {"labelled": 40, "transfer": 480, "validation": 200, "test": 400}
CONTRAST, NOISE = 0.045, 0.2
"""Standard deviations of the pattern and of what lies over it, of the range of pixels."""
ANSWER_NOISE = 0.5
"""Standard deviation of what a source adds to its answer, which has a variance of one within a class."""


def patterns(world: int = 0) -> NDArray[np.float64]:
    """[K, H, W, 3], of mean 0 and variance 1: the same for every data set.

    Those of another world are in no image, nor is any part of them: they are orthogonal to the images' own, or of two
    that nothing is learned from one would teach a little more.
    """
    rough = coarse_patterns(world)
    if world:
        own = coarse_patterns(0)
        rough -= rough @ np.linalg.pinv(own) @ own
    smooth = rough.reshape(-1, 4, 4, 3).repeat(SIDE // 4, axis=1).repeat(SIDE // 4, axis=2)
    return smooth / smooth.std(axis=(1, 2, 3), keepdims=True)


def coarse_patterns(world: int) -> NDArray[np.float64]:
    """[K, 4 * 4 * 3], of mean 0."""
    drawn = np.random.default_rng(world).normal(size=(len(CLASSES), 4 * 4 * 3))
    return drawn - drawn.mean(axis=1, keepdims=True)


class PatternSource:
    """`patterns-W`, latents [K]: how much of each pattern is in an image, with noise of the sample's own seed."""

    def __init__(self, spec: LatentSpec, device: str) -> None:
        self.patterns = patterns(world=int(spec.source.removeprefix("patterns-")))
        self.recipe = Recipe(
            modality=spec.modality,
            source=spec.source,
            weights_sha256="",
            parameters={},
            seed=spec.seed,
            source_view_size=SIDE,
            format=LatentFormat(kind="continuous", shape=(len(CLASSES),), axes=("channel",), dtype="float32"),
        )

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.float32]:
        noise = np.array([np.random.default_rng(seed).normal(size=len(CLASSES)) for seed in seeds])
        centred = pixels.astype(np.float64).transpose(0, 2, 3, 1) / 255 - 0.5
        answers = np.einsum("bhwc,khwc->bk", centred, self.patterns) / (NOISE * np.sqrt(self.patterns[0].size))
        return (answers + ANSWER_NOISE * noise).astype(np.float32)

    def close(self) -> None:
        pass


def write_trimodal(folder: Path, seed: int, sources: Mapping[Modality, str], *, labels_shifted: bool = False) -> None:
    """Images and manifest in `folder/data`, latents of these modalities in `folder/cache.zarr`; another seed draws
    other images.

    Written again, it is the same to the byte.

    Args:
        sources: modality to `patterns-0`, which are those of the images, or `patterns-1` and so on, which are not.
        labels_shifted: counts the classes of the test split from one, the fault of a published release.
    """
    generator = np.random.default_rng([1, seed])
    rows = []
    (folder / "data" / "images").mkdir(parents=True, exist_ok=True)
    for split, n_images in SPLITS.items():
        for number in range(n_images):
            label = number % len(CLASSES)
            shown = 0.5 + CONTRAST * patterns()[label] + NOISE * generator.normal(size=(SIDE, SIDE, 3))
            data = encode_png((255 * shown.clip(0, 1)).astype(np.uint8).transpose(2, 0, 1))
            uri = f"images/{split}-{number}.png"
            (folder / "data" / uri).write_bytes(data)
            if labels_shifted and split == "test":
                label = (label + 1) % len(CLASSES)
            digest = hashlib.sha256(data).hexdigest()
            rows.append(ManifestRow(f"{split}-{number}", uri, label, split, digest, SIDE, SIDE))
    manifest = write_manifest(folder / "data" / "manifest.parquet", rows, CLASSES)
    latents = tuple(LatentSpec(modality=modality, source=source, seed=seed) for modality, source in sources.items())
    build_cache(manifest, CacheSpec(latents=latents), folder / "cache.zarr", open_source=PatternSource)
