"""The samples of the store bench: latents, codes and JPEG images, made up, the same for every library."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

LATENT_SHAPE, CODES_SHAPE = (256, 64), (4, 250)
VOCABULARY = 2048
SIDE = 224
PART = 512


def make_samples(folder: Path, n_images: int) -> dict[str, list[int]]:
    """Writes the samples into `folder`, unless they are there; what all of them add up to, as the readers check it.

    By task: the number of samples, and the sums of latents' bits, codes, and CRC32s or pixels of the images.
    """
    sums = folder / "checksums.json"
    if not sums.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        sums.write_text(json.dumps(_write(folder, n_images)))
    checksums: dict[str, list[int]] = json.loads(sums.read_text())
    return checksums


def payload_bytes(folder: Path) -> dict[str, int]:
    """Bytes of all latents, codes and images, and how many samples they are."""
    sizes = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("latents", "codes", "offsets")}
    return {
        "latents": sizes["latents"].nbytes,
        "codes": sizes["codes"].nbytes,
        "images": int(sizes["offsets"][-1]),
        "samples": len(sizes["codes"]),
    }


def _write(folder: Path, n_images: int) -> dict[str, list[int]]:
    rng = np.random.default_rng(0)
    latents = np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float16, (n_images, *LATENT_SHAPE))
    codes = np.lib.format.open_memmap(folder / "codes.npy", "w+", np.int16, (n_images, *CODES_SHAPE))
    for start in range(0, n_images, PART):
        part = slice(start, min(start + PART, n_images))
        latents[part] = rng.standard_normal(latents[part].shape, np.float32)
        codes[part] = rng.integers(0, VOCABULARY, codes[part].shape)
    grain = make_grain()
    sizes, crcs, pixel_sum = [], 0, 0
    with (folder / "images.bin").open("wb") as file:
        for number in range(n_images):
            image = make_image(number, grain)
            file.write(image)
            sizes.append(len(image))
            crcs += zlib.crc32(image)
            pixel_sum += int(simplejpeg.decode_jpeg(image).sum(dtype=np.int64))
    np.save(folder / "offsets.npy", np.cumsum([0, *sizes]))
    common = [n_images, int(latents.view(np.int16).sum(dtype=np.int64)), int(codes.sum(dtype=np.int64))]
    return {"latents": [*common, 0], "files": [*common, crcs], "pixels": [*common, pixel_sum]}


def make_image(number: int, grain: NDArray[np.float32]) -> bytes:
    """A JPEG of 224 x 224 pixels and 20 to 30 kB: smooth shapes under grain, as in a photo."""
    rng = np.random.default_rng(number)
    coarse = rng.uniform(0, 255, (8, 8, 3)).repeat(SIDE // 8, 0).repeat(SIDE // 8, 1)
    top, left = rng.integers(0, np.array(grain.shape[:2]) - SIDE)
    pixels = coarse + rng.uniform(11, 17) * grain[top : top + SIDE, left : left + SIDE]
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8)), quality=85)


def make_grain() -> NDArray[np.float32]:
    """Noise [1024, 1024, 3], mostly grey, that images take a part of: making it anew takes ten times as long."""
    rng = np.random.default_rng(0)
    grain = rng.standard_normal((1024, 1024, 1), np.float32) + 0.3 * rng.standard_normal((1024, 1024, 3), np.float32)
    return grain.astype(np.float32)
