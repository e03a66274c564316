"""One process a device: together they make one store, and none of them can die unnoticed."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from dla_cache.build import BuildReport, build_cache
from dla_cache.errors import LostProcessError, SourceError, WorkInterrupted
from dla_cache.progress import BuildProgress
from dla_cache.shares import parse_allowance
from dla_cache.sources import open_source
from dla_cache.spec import CacheSpec, LatentSpec, Modality
from dla_cache.store import open_store
from dla_cache.verify import verify_store

LAYOUTS = ["zarr"]


@pytest.fixture
def build(tmp_path: Path, made: SimpleNamespace) -> Callable[..., BuildReport]:
    """Builds a store of 23 images in five shards on two devices, by a source of `tests/device_source.py`."""
    manifest = made.manifest(tmp_path / "data", 23)

    def run(source: str = "Corners", name: str = "s", device: str = "cpu,cpu", **options: object) -> BuildReport:
        latents = (LatentSpec(modality=Modality.DEPTH, source=f"tests.device_source:{source}"),)
        spec = CacheSpec(latents=latents, shard_size=5)
        return build_cache(
            manifest, spec, tmp_path / name, open_source=open_source, device=device, batch_size=4, **options
        )

    run.manifest = manifest
    return run


def test_two_devices_make_the_store_of_one_each_with_a_part_of_the_shards(tmp_path: Path, build: Callable) -> None:
    seen: list[BuildProgress] = []
    report = build(on_progress=seen.append)
    alone = build(name="alone", device="cpu")
    assert (report.content_hash, report.images_encoded, report.shards_committed) == (alone.content_hash, 23, 5)
    records = open_store(tmp_path / "s").committed("depth")
    assert len({records[shard].made_with["process"] for shard in (0, 2, 4)}) == 1
    assert len({record.made_with["process"] for record in records.values()}) == 2
    assert (seen[-1].images_done, seen[-1].images_total, seen[-1].done_of) == (23, 23, {"depth": 23})
    assert 0 < report.device_busy <= 1
    assert verify_store(open_store(tmp_path / "s"), build.manifest).problems == ()


def test_a_process_that_dies_ends_the_build_with_its_device_and_signal_and_loses_nothing_committed(
    tmp_path: Path, build: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "victim").touch()
    monkeypatch.setenv("DLA_TEST_VICTIM", str(tmp_path / "victim"))
    with pytest.raises(LostProcessError, match=r"(?s)device `cpu` was killed by SIGKILL.*hint: .*run it again"):
        build("Dies")
    assert multiprocessing.active_children() == []


def test_an_error_of_one_process_is_the_error_of_the_build(build: Callable) -> None:
    with pytest.raises(SourceError, match=r"(?s)failed for `image-\d+`.*no such block.*hint: "):
        build("Fails")
    assert multiprocessing.active_children() == []


def test_who_stops_a_build_stops_all_its_processes_between_batches(tmp_path: Path, build: Callable) -> None:
    seen: list[BuildProgress] = []
    with pytest.raises(WorkInterrupted, match=r"[0-4] of 5 shards"):
        build("Slow", on_progress=seen.append, should_stop=lambda: bool(seen))
    assert multiprocessing.active_children() == []


def test_bad_images_of_all_processes_are_left_out_together(build: Callable) -> None:
    for number in (2, 7):
        build.manifest.path_of(f"images/image-{number}.png").unlink()
    report = build(allow_bad=parse_allowance("2"))
    assert (report.put_aside.keys(), report.n_images, report.images_encoded) == ({"image-2", "image-7"}, 21, 21)
