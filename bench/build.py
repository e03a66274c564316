"""Whether a build keeps its device busy, what everything but the device costs, and how much memory it takes.

    python bench/build.py [--rounds 5] [--seconds 3] [--full] [--json FILE]

The device is simulated: it sleeps for a fixed time a batch and then hands out latents [4, 28, 28] that were there
before. Everything else is real: files, checks, decoding, a store with its commits. Three ways to feed it take turns, in
one process:

- dla: `build_cache`.
- plain loop: read, decode, encode, write, one after the other. No hashes, no commits.
- blocking stages: reader → mapper → writer as `clip_inference` of clip-retrieval has them: a DataLoader reads ahead,
  the mapper waits for it and for the device, the writer gathers all of a partition and writes it at the end.

Device-busy is the time inside the source over the time from its first call to the end of its last one. The processor's
time is that of this process and its children, over images; the simulated device takes none. A machine that is busy with
other things shows in all figures: the first line tells the load.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import resource
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from cli.render import print_table
from dla_cache.build import BuildProgress, BuildReport, build_cache
from dla_cache.images import centre_square, decode_image
from dla_cache.manifest import Manifest, ManifestRow, read_manifest, write_manifest
from dla_cache.memory import memory_bound
from dla_cache.spec import CacheSpec, LatentFormat, LatentSpec, Modality, Recipe
from dla_cache.store import open_store
from dla_cache.tars import read_range

BATCH = 32
SIDE = 224
SHAPE = (4, 28, 28)
FILES = 128
"""Different images; a list of more names them again."""


@dataclass
class DeviceLog:
    """What a simulated device did."""

    nominal_s: float
    calls: int = 0
    busy_s: float = 0.0
    first: float = 0.0
    last: float = 0.0

    @property
    def busy(self) -> float:
        """Share of the time from its first to its last moment of work in which it worked."""
        return self.busy_s / (self.last - self.first)

    @property
    def strict(self) -> float:
        """The same with what it was asked to work, not what that took: a sleep ends late."""
        return self.calls * self.nominal_s / (self.last - self.first)


class SleepingDevice:
    """A source that takes a fixed time a batch and no processor."""

    def __init__(self, spec: LatentSpec, _device: str, *, log: DeviceLog, side: int, shape: Sequence[int]) -> None:
        self.log = log
        self.latents = np.random.default_rng(0).normal(size=(BATCH, *shape)).astype(np.float16)
        self.recipe = Recipe(
            modality=spec.modality,
            source=spec.source,
            weights_sha256="",
            parameters={},
            seed=0,
            source_view_size=side,
            format=LatentFormat(
                kind="continuous", shape=tuple(shape), axes=("channel", "height", "width"), dtype="float16"
            ),
        )

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.generic]:
        started = time.perf_counter()
        if self.log.nominal_s:
            time.sleep(self.log.nominal_s)
        self.log.calls += 1
        self.log.first = self.log.first or started
        self.log.last = time.perf_counter()
        self.log.busy_s += self.log.last - started
        return self.latents[: len(pixels)]

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Task:
    """Images of one kind, and how long the device takes for a batch of them."""

    name: str
    manifest: Manifest
    device_s: float
    busy_goal: float
    cpu_goal_ms: float


@dataclass
class Figures:
    """Of one way to feed the device, a round each."""

    busy: list[float] = field(default_factory=list)
    strict: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    """Of one core, for an image, everything but the device."""
    images_per_s: list[float] = field(default_factory=list)


def write_images(folder: Path, kind: str, n_images: int) -> Manifest:
    """A list of `n_images`, of `FILES` files that look like photographs to a decoder: smooth, with grain."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows, listed = [], []
    for number in range(FILES):
        coarse = rng.integers(0, 256, (15, 15, 3)).astype(np.float32)
        smooth = np.kron(coarse, np.ones((15, 15, 1), np.float32))[:SIDE, :SIDE]
        pixels = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
        name = f"{number}.{kind}"
        raw = b"P6 %d %d 255\n" % (SIDE, SIDE) + pixels.tobytes()
        content = simplejpeg.encode_jpeg(pixels, 90, "RGB", "420") if kind == "jpg" else raw
        (folder / name).write_bytes(content)
        listed.append((name, hashlib.sha256(content).hexdigest()))
    for number in range(n_images):
        name, sha256 = listed[number % FILES]
        rows.append(ManifestRow(f"image-{number}", name, None, "train", sha256, SIDE, SIDE))
    return write_manifest(folder / "manifest.parquet", rows, [])


def feed_by_dla(task: Task, folder: Path, log: DeviceLog) -> None:
    """What `dla cache build` does."""
    build(task.manifest, folder / "store", [log])


def build(
    manifest: Manifest,
    folder: Path,
    logs: Sequence[DeviceLog],
    *,
    side: int = SIDE,
    shape: Sequence[int] = SHAPE,
    on_progress: Callable[[BuildProgress], None] | None = None,
) -> BuildReport:
    """Builds a store of as many modalities as there are devices; they take turns."""
    names = [Modality.DEPTH, Modality.NORMALS][: len(logs)]
    by_name = dict(zip(names, logs, strict=True))
    spec = CacheSpec(latents=tuple(LatentSpec(modality=name, source="sleeps") for name in names))
    return build_cache(
        manifest,
        spec,
        folder,
        open_source=lambda entry, device: SleepingDevice(
            entry, device, log=by_name[entry.modality], side=side, shape=shape
        ),
        batch_size=BATCH,
        on_progress=on_progress,
    )


def feed_plainly(task: Task, folder: Path, log: DeviceLog) -> None:
    """The loop that everybody writes first."""
    folder.mkdir()
    device = open_device(log)
    for number, start in enumerate(range(0, len(task.manifest), BATCH)):
        uris = task.manifest.table["uri"][start : start + BATCH].to_pylist()
        pixels = np.stack([read_view(task.manifest.root, uri) for uri in uris])
        np.save(folder / f"{number}.npy", device.encode(pixels, [0] * len(pixels)))


def feed_by_blocking_stages(task: Task, folder: Path, log: DeviceLog) -> None:
    """Reader → mapper → writer, as in clip-retrieval's `clip_inference`."""
    from torch.utils.data import DataLoader

    folder.mkdir()
    device = open_device(log)
    uris = task.manifest.table["uri"].to_pylist()
    reader: Any = DataLoader(
        _Views(task.manifest.root, uris),  # type: ignore[arg-type]
        batch_size=BATCH,
        num_workers=os.cpu_count() or 1,
        prefetch_factor=2,
        collate_fn=np.stack,
    )
    partition = [device.encode(pixels, [0] * len(pixels)).copy() for pixels in reader]
    np.save(folder / "partition.npy", np.concatenate(partition))


class _Views:
    """A data set of torch's."""

    def __init__(self, root: Path, uris: Sequence[str]) -> None:
        self.root, self.uris = root, uris

    def __len__(self) -> int:
        return len(self.uris)

    def __getitem__(self, place: int) -> NDArray[np.uint8]:
        return read_view(self.root, self.uris[place])


def read_view(root: Path, uri: str) -> NDArray[np.uint8]:
    return centre_square(decode_image(read_range(root, uri), uri), SIDE)


def open_device(log: DeviceLog) -> SleepingDevice:
    spec = LatentSpec(modality=Modality.DEPTH, source="sleeps")
    return SleepingDevice(spec, "cpu", log=log, side=SIDE, shape=SHAPE)


WAYS: dict[str, Callable[[Task, Path, DeviceLog], None]] = {
    "dla": feed_by_dla,
    "plain loop": feed_plainly,
    "blocking stages": feed_by_blocking_stages,
}
OURS = "dla"


def measure(way: Callable[[Task, Path, DeviceLog], None], task: Task, folder: Path, figures: Figures) -> None:
    """One round of one way, in a folder of its own."""
    log = DeviceLog(task.device_s)
    cpu, started = cpu_seconds(), time.perf_counter()
    way(task, folder, log)
    figures.images_per_s.append(len(task.manifest) / (time.perf_counter() - started))
    figures.cpu_ms.append(1e3 * (cpu_seconds() - cpu) / len(task.manifest))
    figures.busy.append(log.busy)
    figures.strict.append(log.strict)
    shutil.rmtree(folder)


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def measure_two(task: Task, folder: Path) -> float:
    """The time of one pass over two modalities, over the sum of the times that its two devices worked."""
    logs = [DeviceLog(task.device_s), DeviceLog(task.device_s)]
    started = time.perf_counter()
    build(task.manifest, folder / "two", logs)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder / "two")
    return seconds / sum(log.busy_s for log in logs)


TINY_SIDE, TINY_SHAPE = 8, (4, 2, 2)


def write_tiny_images(folder: Path, n_images: int) -> Manifest:
    """A list of so many images of 8 px in one tar, of a thousand different ones."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    listed = []
    with tarfile.open(folder / "tiny.tar", "w") as tar:
        for number in range(1000):
            raw = b"P6 %d %d 255\n" % (TINY_SIDE, TINY_SIDE) + rng.bytes(3 * TINY_SIDE**2)
            member = tarfile.TarInfo(f"{number}.ppm")
            member.size = len(raw)
            offset = tar.offset + tarfile.BLOCKSIZE
            tar.addfile(member, io.BytesIO(raw))
            listed.append((f"tiny.tar#{offset}+{len(raw)}", hashlib.sha256(raw).hexdigest()))
    rows = []
    for number in range(n_images):
        uri, sha256 = listed[number % 1000]
        rows.append(ManifestRow(f"image-{number}", uri, None, "train", sha256, TINY_SIDE, TINY_SIDE))
    return write_manifest(folder / "manifest.parquet", rows, [])


def own_bytes() -> int:
    """Of this process in memory, without files that it has mapped, as the list of images: those can be dropped."""
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * resource.getpagesize()


def measure_memory(folder: Path, n_images: int) -> dict[str, float]:
    """MB by which a process of its own has grown by a tenth of a build, at its most from there on, and at its end."""
    write_tiny_images(folder / "tiny", n_images)
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(grow, (folder, n_images))


def grow(folder: Path, n_images: int) -> dict[str, float]:
    """Builds a store and looks how large this process is meanwhile."""
    manifest = read_manifest(folder / "tiny" / "manifest.parquet")
    before, sizes = own_bytes(), []

    def look(progress: BuildProgress) -> None:
        if progress.images_done >= (len(sizes) + 1) * n_images // 100:
            sizes.append((own_bytes() - before) / 1e6)

    build(manifest, folder / "store", [DeviceLog(0.0)], side=TINY_SIDE, shape=TINY_SHAPE, on_progress=look)
    store = open_store(folder / "store")
    bound = memory_bound(store.metadata.recipes.values(), batch_size=BATCH, shard_size=store.shard_size)
    return {"at a tenth": sizes[9], "at most": max(sizes[9:]), "at the end": sizes[-1], "formula": bound / 1e6}


def show(tasks: Sequence[Task], figures: dict[str, dict[str, Figures]]) -> None:
    """One table of all ways and tasks."""
    rows = []
    for task in tasks:
        for way, found in figures[task.name].items():
            is_ours = way == OURS
            rows.append(
                [
                    task.name,
                    way,
                    told(found.busy, ".3f"),
                    verdict(statistics.median(found.busy) >= task.busy_goal) if is_ours else "",
                    told(found.cpu_ms, ".3f"),
                    verdict(statistics.median(found.cpu_ms) <= task.cpu_goal_ms) if is_ours else "",
                    told(found.images_per_s, ".0f"),
                ]
            )
    print_table(["images", "fed by", "device busy", "goal", "CPU ms/image", "goal", "images/s"], rows)


def told(values: Sequence[float], form: str) -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def verdict(is_reached: bool) -> str:
    return "reached" if is_reached else "MISSED"


def main() -> None:
    """Measures, prints, and writes JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="that the device works in each")
    parser.add_argument("--images", type=int, default=100_000, help="for the memory; 0 leaves that out")
    parser.add_argument("--full", action="store_true", help="a million images for the memory")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one if absent")
    parser.add_argument("--json", type=Path, help="write all figures here, too")
    options = parser.parse_args()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} cores, load average {load}, Python {platform.python_version()}, batches of {BATCH}")
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        results = run(Path(place), options)
    if options.json is not None:
        options.json.write_text(json.dumps({"load": load, **results}, indent=2) + "\n")


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures, as JSON has them; they are printed as they come."""
    tasks = []
    for name, kind, device_s, cpu_goal_ms in (("JPEG", "jpg", 0.02, 1.0), ("raw", "ppm", 0.005, 0.2)):
        n_images = BATCH * max(1, round(options.seconds / device_s))
        manifest = write_images(folder / kind, kind, n_images)
        tasks.append(Task(f"{name}, {1000 * device_s:g} ms a batch", manifest, device_s, 0.98, cpu_goal_ms))
    figures = {task.name: {way: Figures() for way in WAYS} for task in tasks}
    two: list[float] = []
    for _ in range(options.rounds):
        for task in tasks:
            for name, way in WAYS.items():
                measure(way, task, folder / "out", figures[task.name][name])
        two.append(measure_two(tasks[0], folder))
    show(tasks, figures)
    is_two = verdict(statistics.median(two) <= 1.05)
    print(f"two modalities in one pass, time over the sum of their devices' times: {told(two, '.3f')}, {is_two}")
    results: dict[str, Any] = {
        "ways": {task: {way: asdict(found) for way, found in ways.items()} for task, ways in figures.items()},
        "two": two,
    }
    n_images = 1_000_000 if options.full else options.images
    if n_images:
        memory = results["memory"] = measure_memory(folder, n_images)
        is_flat = verdict(memory["at most"] - memory["at a tenth"] <= memory["formula"])
        sizes = ", ".join(f"{size:.1f} MB {when}" for when, size in memory.items() if when != "formula")
        print(f"memory over {n_images:,} images of {TINY_SIDE} px of a tar, a device of no time; grown by {sizes};")
        print(f"    from a tenth on within the formula of dla_cache.memory, {memory['formula']:.0f} MB: {is_flat}")
    return results


if __name__ == "__main__":
    main()
