"""A store for alignment: 136 images of 8 x 8 pixels in three classes, their depth to be seen and their audio not."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from dla_cache.build import build_cache
from dla_cache.manifest import ManifestRow, write_manifest
from dla_cache.sources import SeveralDraws
from dla_cache.spec import CacheSpec, LatentFormat, LatentSpec, Modality, Recipe
from trainer.config import resolve_run
from trainer.run import train_run

SIDE = 8
SPLITS = {"labelled": 12, "validation": 60, "test": 60, "unlabelled": 4}
CLASSES = ("red", "green", "blue")
MODEL = {"patch_size": 4, "width": 16, "depth": 2, "n_heads": 2, "position_std": 0.5}


class SeeingSource:
    """Depth [2, 2, 2] of red and green at four places, with noise of the sample's seed; audio of noise alone."""

    def __init__(self, spec, device):
        self.is_depth = spec.modality == Modality.DEPTH
        axes = ("channel", "height", "width") if self.is_depth else ("codebook", "step")
        shape, vocabulary = ((2, 2, 2), None) if self.is_depth else ((2, 5), 7)
        latent = LatentFormat(
            kind="continuous" if self.is_depth else "codes",
            shape=shape,
            axes=axes,
            dtype="float16" if self.is_depth else "uint8",
            vocabulary=vocabulary,
        )
        self.recipe = Recipe(
            modality=spec.modality,
            source=spec.source,
            weights_sha256="",
            parameters={},
            seed=spec.seed,
            source_view_size=SIDE,
            format=latent,
        )

    def encode(self, pixels, seeds):
        generators = [np.random.default_rng(seed) for seed in seeds]
        if not self.is_depth:
            return np.array([generator.integers(0, 7, (2, 5)) for generator in generators], np.uint8)
        noise = np.array([generator.normal(scale=0.1, size=(2, 2, 2)) for generator in generators])
        return (pixels[:, :2, 1::4, 1::4] / 255 + noise).astype(np.float16)

    def close(self):
        pass


def make_world(folder: Path) -> SimpleNamespace:
    """Store, another draw, two draws in one, and `train(name, kind, **fields)`: the folder of a run of six steps."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for split, n_images in SPLITS.items():
        for number in range(n_images):
            image_id = f"{split}-{number}"
            pixels = np.random.default_rng(len(rows)).integers(0, 160, (2, 2, 3)).repeat(4, 0).repeat(4, 1)
            pixels[..., number % 3] += 90
            path = folder / "images" / f"{image_id}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            label = None if split == "unlabelled" else number % 3
            rows.append(ManifestRow(image_id, f"images/{image_id}.png", label, split, digest, SIDE, SIDE))
    manifest = write_manifest(folder / "manifest.parquet", rows, CLASSES)
    stores = []
    for seed in (0, 1):
        entries = tuple(
            LatentSpec(modality=one, source="seeing", seed=seed) for one in (Modality.DEPTH, Modality.AUDIO)
        )
        stores.append(folder / f"cache-{seed}.zarr")
        build_cache(manifest, CacheSpec(latents=entries, shard_size=32), stores[seed], open_source=SeeingSource)

    draws = folder / "draws.zarr"
    entry = LatentSpec(modality=Modality.DEPTH, source="seeing", draws=2)
    build_cache(
        manifest,
        CacheSpec(latents=(entry,), shard_size=32),
        draws,
        open_source=lambda spec, device: SeveralDraws(SeeingSource(spec, device), spec.draws),
    )

    def train(name, kind, **fields):
        value = {
            "kind": kind,
            "store": str(stores[0]),
            "images": str(folder),
            "output": str(folder / "runs" / name),
            "image_size": SIDE,
            "labelled_per_batch": 6,
            "loop": {"steps": 6, "evaluate_steps": 6, "learning_rate": 0.01},
            **({"model": MODEL, "objective": {"ce": {}}} if kind == "student" else {"modalities": ["depth"]}),
            **fields,
        }
        train_run(resolve_run(value, base=Path(), where=name))
        return folder / "runs" / name

    return SimpleNamespace(folder=folder, store=stores[0], other=stores[1], draws=draws, train=train)


def make_arms(world: SimpleNamespace) -> dict[str, list[Path]]:
    """Two students that learn from a probe on depth, and two that never do."""
    probe = world.train("probe", "probe", model={"hidden": 8})
    kd = {"objective": {"ce": {}, "kd": {}}, "teacher": str(probe)}
    return {
        "kd": [world.train(f"kd-{seed}", "student", seed=seed, **kd) for seed in (0, 1)],
        "image-only": [world.train(f"image-only-{seed}", "student", seed=seed) for seed in (0, 1)],
    }
