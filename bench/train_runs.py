"""The measures of bench/train.py that need whole streams, runs or processes."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from cli.arms import plan_arms, run_arms
from cli.demo import build_embedded_cache
from cli.render import ProgressReporter, print_table
from dla_cache.build import build_cache
from dla_cache.manifest import ManifestRow, write_manifest
from dla_cache.spec import CacheSpec, LatentFormat, LatentSpec, Modality, Recipe
from dla_cache.store import open_store
from trainer.config import resolve_run
from trainer.data import PairSource, PixelScale, Role
from trainer.run import train_run
from trainer.target_store import make_targets
from trainer.targets import resolve_targets
from trainer.views import ViewConfig

STEP_S = 0.005
SCALE = PixelScale((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SEEDS = 5
VIEWS = 8
BATCHES = 500
"""Of a round in which a step is simulated."""


class NoLatents:
    """A source of almost nothing, for a store that is there for its images."""

    def __init__(self, spec: LatentSpec, _device: str) -> None:
        shape = LatentFormat(kind="continuous", shape=(1,), axes=("channel",), dtype="float16")
        facts = {"modality": spec.modality, "source": "none", "weights_sha256": "", "parameters": {}, "seed": 0}
        self.recipe = Recipe(source_view_size=8, format=shape, **facts)

    def encode(self, pixels: Any, seeds: Sequence[int]) -> Any:
        return np.zeros((len(pixels), 1), np.float16)

    def close(self) -> None:
        pass


def measure_wait(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The share of time that a step of 5 ms waits: batches of 32 crops of 64 pixels with their targets."""
    n_images, side = options.images // 2, 72
    rng = np.random.default_rng(0)
    rows = []
    (folder / "images").mkdir()
    for number in range(n_images):
        content = b"P6 %d %d 255\n" % (side, side) + rng.integers(0, 256, side * side * 3, np.uint8).tobytes()
        (folder / "images" / f"{number}.ppm").write_bytes(content)
        rows.append(
            ManifestRow(f"i{number}", f"{number}.ppm", number % 2, "train", sha256(content).hexdigest(), side, side)
        )
    manifest = write_manifest(folder / "images" / "manifest.parquet", rows, ["one", "two"])
    spec = CacheSpec(
        latents=(LatentSpec(modality=Modality.DEPTH, source="none"),), images="raw", image_size=side, shard_size=512
    )
    build_cache(manifest, spec, folder / "cache.zarr", open_source=NoLatents)
    result: dict[str, Any] = {}
    view = ViewConfig(scale_min=0.25, ratio_min=0.75, ratio_max=1.33, horizontal_flip=True)
    for keep, kept in ((0, "decoded each time"), (2**30, "kept in memory")):
        for threads in (1, 2):
            source = PairSource(
                open_store(folder / "cache.zarr"),
                None,
                image_size=64,
                pixel_scale=SCALE,
                modalities=(),
                view=view,
                seed=0,
                device="cpu",
                threads=threads,
                keep_decoded_bytes=keep,
            )
            waits, costs = [], []
            for _ in range(options.rounds):
                stream = source.training([Role(("train",), 32)])(0)
                next(stream)
                waited = worked = 0.0
                started = time.process_time()
                for _ in range(BATCHES):
                    began = time.perf_counter()
                    next(stream)
                    waited += (got := time.perf_counter()) - began
                    time.sleep(STEP_S)
                    worked += time.perf_counter() - got
                costs.append(1e3 * (time.process_time() - started) / BATCHES)
                stream.close()
                waits.append(waited / (waited + worked))
            result[f"{threads} thread{'s' * (threads > 1)}, {kept}"] = {
                "wait": statistics.median(waits),
                "wait_range": [min(waits), max(waits)],
                "cpu_ms": statistics.median(costs),
            }
    rows_shown = [
        (
            name,
            f"{100 * one['wait']:.1f} % ({100 * one['wait_range'][0]:.1f} to {100 * one['wait_range'][1]:.1f})",
            f"{one['cpu_ms']:.1f} ms",
        )
        for name, one in result.items()
    ]
    print_table(("raw images, batches of 32", "waits for data", "of a core, a batch"), rows_shown)
    return result


def relief_digits(out: Path) -> None:
    """The demo's cache of depth and a teacher on it, made once."""
    if not (out / "runs" / "teacher" / "result.json").exists():
        build_embedded_cache(out)
        train({"teacher": {"kind": "teacher", "modalities": ["depth"]}}, out, seed=0)


def train(described: Mapping[str, Mapping[str, Any]], out: Path, *, seed: int) -> None:
    """Arms side by side, each a process of one thread."""
    arms = plan_arms(described, out, store=out / "cache.zarr", images=out / "data", seed=seed, steps=None)
    with ProgressReporter("train", "steps") as reporter:
        run_arms(arms, logs=out / "logs", n_processes=2, on_progress=reporter.update, should_stop=lambda: False)


def measure_views(options: argparse.Namespace, _folder: Path) -> dict[str, Any]:
    """Test accuracy of students with K stored views and with a fresh view every time, paired by seed."""
    out = options.out
    relief_digits(out)
    places = {"store": out / "cache.zarr", "images": out / "data", "teacher": out / "runs" / "teacher"}
    value = {"kind": "targets", "preset": "embedded", "view": {"count": VIEWS}, "output": str(out / "targets.zarr")}
    value |= {name: str(place) for name, place in places.items()}
    began = time.perf_counter()
    report = make_targets(resolve_targets(value, base=Path(), where="bench"))
    seconds = {"targets": time.perf_counter() - began if report.computed else float("nan")}
    targets = os.path.relpath(out / "targets.zarr", out / "specs")
    ways: dict[str, dict[str, Any]] = {
        "teacher, fresh views": {"kind": "student", "teacher": "teacher"},
        "stored, 8 views": {"kind": "student", "targets": targets},
    }
    described = {
        f"{name.replace(', ', '-').replace(' ', '-')}-{seed}": {**fields, "seed": seed}
        for seed in range(SEEDS)
        for name, fields in ways.items()
    }
    train({"teacher": {"kind": "teacher", "modalities": ["depth"]}, **described}, out, seed=0)
    scores: dict[str, list[float]] = {}
    for name in ways:
        folders = [out / "runs" / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}" for seed in range(SEEDS)]
        results = [json.loads((folder / "result.json").read_text()) for folder in folders]
        scores[name] = [100 * result["test_score"] for result in results]
        seconds[name] = statistics.median(result["train_seconds"] for result in results)
    (online, stored) = scores.values()
    differences = [one - other for one, other in zip(stored, online, strict=True)]
    rows = [
        (name, f"{statistics.mean(values):.1f} %", interval(values), f"{seconds[name]:.1f} s")
        for name, values in scores.items()
    ]
    rows.append(("difference", f"{statistics.mean(differences):+.2f}", interval(differences), ""))
    print_table(("learns from", "test accuracy", f"95 % interval, {SEEDS} seeds", "training"), rows)
    print(f"targets of {report.views} views of {report.images} images: {seconds['targets']:.1f} s, once")
    low, high = bounds(online)
    return {
        "scores": scores,
        "seconds": seconds,
        "difference": statistics.mean(differences),
        "within_online_interval": bool(low <= statistics.mean(stored) <= high),
    }


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Student's t interval of the mean, 95 %."""
    reach = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - reach, statistics.mean(values) + reach


def interval(values: Sequence[float]) -> str:
    low, high = bounds(values)
    return f"{low:.2f} to {high:.2f}"


FIRST_STEP = """
import sys, time
from trainer import loop
step = loop.Loop.train_step
def first(*arguments, **named):
    step(*arguments, **named)
    print("first step", time.time(), flush=True)
    sys.exit(0)
loop.Loop.train_step = first
sys.argv = ["dla", *sys.argv[1:]]
from cli.main import main
main()
"""


def measure_start(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds from starting the command to the end of its first step."""
    out = options.out
    relief_digits(out)
    places = ["--store", out / "cache.zarr", "--images", out / "data"]
    ways = {
        "student, labels alone": ["--set", "objective={ce: {}}", "--set", "roles.transfer=[]"],
        "student, online teacher": ["--teacher", out / "runs" / "teacher"],
    }
    if (out / "targets.zarr").exists():
        ways["student, stored targets"] = ["--set", f"targets={(out / 'targets.zarr').resolve()}"]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):
        for name, settings in ways.items():
            run = ["train", "student", "--preset", "embedded", *places, *settings, "--out", folder / f"{name}-{number}"]
            began = time.time()
            said = subprocess.run(
                [sys.executable, "-c", FIRST_STEP, *map(str, run)], capture_output=True, text=True, check=False
            )
            ended = [line for line in said.stdout.splitlines() if line.startswith("first step")]
            if not ended:
                raise RuntimeError(said.stderr)
            if number:
                times[name].append(float(ended[0].split()[-1]) - began)
    print_table(
        ("run", "command to first step"),
        [(name, f"{statistics.median(one):.2f} s ({min(one):.2f} to {max(one):.2f})") for name, one in times.items()],
    )
    return {name: statistics.median(values) for name, values in times.items()}


def measure_memory(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Resident memory of this process over the epochs of a run, in MB."""
    out = options.out
    relief_digits(out)
    described = {
        "kind": "student",
        "preset": "embedded",
        "store": str(out / "cache.zarr"),
        "images": str(out / "data"),
        "output": str(folder / "run"),
        "objective": {"ce": {}},
        "roles": {"transfer": []},
        "loop": {"steps": 3000, "evaluate_steps": 250},
    }
    sizes: list[float] = []

    def look(progress: Any) -> None:
        if progress.step % 125 == 0:  # ten epochs
            sizes.append(resident_mb())

    train_run(resolve_run(described, base=Path(), where="bench"), on_progress=look)
    start = sizes[len(sizes) // 10]
    print(f"resident after a tenth {start:.0f} MB, at the end {sizes[-1]:.0f} MB, highest {max(sizes):.0f} MB")
    return {"sizes_mb": sizes, "grown_mb": sizes[-1] - start}


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
