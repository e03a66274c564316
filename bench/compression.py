"""What lossless compression brings on stored latents, sample by sample, and what it costs to read.

    python bench/compression.py STORE MODALITY [PER_SAMPLE]

of a store with float32 latents. PER_SAMPLE latents are taken as one, to see what larger samples would give. Codes are
made of the latents themselves: each position's channels become the nearest of 1024 words, found by k-means.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numcodecs.blosc
import numpy as np
from fastcrc.crc32 import iscsi as crc32c
from numcodecs import Blosc, Zstd
from numpy.typing import NDArray

from dla_cache.spec import LatentFormat
from dla_cache.store import open_store
from dla_cache.store.precision import encode_numbers, quantise

CODECS = {
    "zstd 3": Zstd(3),
    "blosc zstd bitshuffle": Blosc("zstd", 5, Blosc.BITSHUFFLE),
    "blosc lz4 bitshuffle": Blosc("lz4", 5, Blosc.BITSHUFFLE),
}
WORDS = 1024
REPEATS = 9


def main() -> None:
    store, modality = open_store(Path(sys.argv[1])), sys.argv[2]
    per_sample = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    numcodecs.blosc.set_nthreads(1)
    latent = store.recipe(modality).format
    latents = store.read(modality, store.rows_of())
    print(f"{modality}, {len(latents)} images, {per_sample} latents a sample, numcodecs {numcodecs.__version__}")
    print("stored as, bytes a sample, us to check and copy it; codec: times smaller, us to check and decode")
    for name, stored in {**precisions(latents, latent), "codes int16": codes_of(latents, latent)}.items():
        n_samples = len(stored) // per_sample
        samples = stored[: n_samples * per_sample].reshape(n_samples, -1)
        out = np.empty_like(samples)
        raw = [sample.tobytes() for sample in samples]
        cells = [f"{name}, {len(raw[0])} B, {us_a_sample(raw, copy_into(out)):.1f} us"]
        for title, codec in CODECS.items():
            small = [codec.encode(sample) for sample in samples]
            ratio = samples.nbytes / sum(map(len, small))
            cells.append(f"{title}: {ratio:.2f} x, {us_a_sample(small, decode_into(codec, out)):.1f} us")
        print("; ".join(cells))


def precisions(latents: NDArray[np.generic], latent: LatentFormat) -> dict[str, NDArray[np.generic]]:
    """The latents as they lie on disk in each precision."""
    others = tuple(axis for axis in range(latents.ndim) if axis != latent.channel_axis + 1)
    values = latents.astype(np.float64)
    quantisation = quantise(values.min(others), values.max(others))
    formats = {dtype: latent.model_copy(update={"dtype": dtype}) for dtype in ("float32", "float16", "bfloat16")}
    formats["int8"] = latent.model_copy(update={"dtype": "int8", "quantisation": quantisation})
    return {name: encode_numbers(latents, chosen) for name, chosen in formats.items()}


def codes_of(latents: NDArray[np.generic], latent: LatentFormat) -> NDArray[np.int16]:
    """The nearest word at each position, [n, positions]."""
    vectors = np.moveaxis(latents, latent.channel_axis + 1, -1).reshape(-1, latents.shape[latent.channel_axis + 1])
    words = vectors[np.random.default_rng(0).choice(len(vectors), WORDS, replace=False)].copy()
    for _ in range(8):
        nearest = ((words**2).sum(1) - 2 * vectors @ words.T).argmin(1)
        for word in np.unique(nearest):
            words[word] = vectors[nearest == word].mean(0)
    return nearest.reshape(len(latents), -1).astype("<i2")


def copy_into(out: NDArray[np.generic]) -> Callable[[int, bytes], object]:
    flat = out.view(np.uint8).reshape(len(out), -1)

    def copy(place: int, content: bytes) -> None:
        flat[place] = np.frombuffer(content, np.uint8)

    return copy


def decode_into(codec: Any, out: NDArray[np.generic]) -> Callable[[int, bytes], object]:
    return lambda place, content: codec.decode(content, out[place])


def us_a_sample(contents: list[bytes], read: Callable[[int, bytes], object]) -> float:
    """Median over repetitions, with the checksum that every reader computes."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for place, content in enumerate(contents):
            crc32c(content)
            read(place, content)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) / len(contents) * 1e6


main()
