"""A tiny cache, built once: 24 images of 8 x 8 pixels in three classes, their latents by a source of ten lines."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from dla_cache.build import build_cache
from dla_cache.manifest import ManifestRow, write_manifest
from dla_cache.spec import CacheSpec, LatentFormat, LatentSpec, Modality, Recipe
from trainer.config import resolve_run

# A busy machine is slow now and then; that says nothing about the code.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

SIDE = 8
CLASS_NAMES = ("red", "green", "blue")
SPLITS = {"labelled": 6, "transfer": 8, "validation": 6, "test": 4}
"""Test images fill the last shard and no other."""


class CornerSource:
    """Latents [2, 2, 2]: red and green at four places, and a little noise of the sample's own seed."""

    def __init__(self, spec, device):
        self.recipe = Recipe(
            modality=spec.modality,
            source=spec.source,
            weights_sha256="",
            parameters={},
            seed=spec.seed,
            source_view_size=SIDE,
            format=LatentFormat(
                kind="continuous", shape=(2, 2, 2), axes=("channel", "height", "width"), dtype=spec.dtype
            ),
        )

    def encode(self, pixels, seeds):
        noise = [np.random.default_rng(seed).normal(scale=0.1, size=(2, 2, 2)) for seed in seeds]
        return (pixels[:, :2, 1::4, 1::4] / 255 + np.array(noise)).astype(np.float16)

    def close(self):
        pass


def make_manifest(folder, class_names=CLASS_NAMES):
    """Noise PNGs, brighter in the colour of their class; the transfer images have no label."""
    rows = []
    (folder / "images").mkdir(parents=True)
    for split, n_images in SPLITS.items():
        for number in range(n_images):
            image_id = f"{split}-{number}"
            pixels = np.random.default_rng(len(rows)).integers(0, 120, (SIDE, SIDE, 3), dtype=np.uint8)
            pixels[..., number % 3] += 90
            path = folder / "images" / f"{image_id}.png"
            Image.fromarray(pixels).save(path)
            label = None if split == "transfer" else number % 3
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            rows.append(ManifestRow(image_id, f"images/{image_id}.png", label, split, digest, SIDE, SIDE))
    return write_manifest(folder / "manifest.parquet", rows, class_names)


def build_store(manifest, path, *, seed=0):
    """The store of a manifest's depth latents, in shards of 5 images; another seed is another recipe."""
    spec = CacheSpec(latents=(LatentSpec(modality=Modality.DEPTH, source="corners", seed=seed),), shard_size=5)
    build_cache(manifest, spec, path, open_source=CornerSource)
    return path


def reverse_manifest(manifest):
    """The same images under the same root, in reversed order."""
    return write_manifest(manifest.root / "reversed.parquet", [*manifest.rows()][::-1], manifest.class_names)


MODEL = {"patch_size": 4, "width": 16, "depth": 2, "n_heads": 2, "position_std": 0.5}
KINDS = {
    "probe": {"model": {"hidden": 8}},
    "teacher": {
        "model": {
            **MODEL,
            "tokens_per_modality": 4,
            "resampler_heads": 2,
            "standardise": True,
            "late_fusion": True,
            "late_fusion_hidden": 8,
        }
    },
    "student": {"model": MODEL, "objective": {"ce": {}}},
}
MESSY = {"ce": {}, "kd": {}, "messy": {"layers": [[0, 0], [1, 1]], "hidden": 8}}
KD = {"ce": {}, "kd": {}}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The cache, and `run(kind, output, ...)`: the config of a run of six steps on it."""
    folder = tmp_path_factory.mktemp("tiny")
    manifest = make_manifest(folder / "data")
    store = build_store(manifest, folder / "cache.zarr")

    def describe(kind, output, **fields):
        places = {"store": str(store), "images": str(manifest.root), "output": str(output)}
        shared = {
            "kind": kind,
            "image_size": SIDE,
            "labelled_per_batch": 3,
            "loop": {"steps": 6, "evaluate_steps": 2, "learning_rate": 0.01, "ema_decay": 0.5},
            "view": {"scale_min": 0.5, "horizontal_flip": True},
        }
        if fields.get("teacher") is not None:
            shared |= {"roles": {"transfer": ["transfer"]}, "transfer_per_batch": 4}
            fields["teacher"] = str(fields["teacher"])
        return {**shared, **places, **KINDS[kind], **fields}

    return SimpleNamespace(
        store=store,
        images=manifest.root,
        manifest=manifest,
        describe=describe,
        run=lambda kind, output, **fields: resolve_run(describe(kind, output, **fields), base=Path(), where="test"),
        build=build_store,
        reverse=reverse_manifest,
        make_manifest=make_manifest,
        objectives={"messy": MESSY, "kd": KD},
    )
