"""`dla demo`: what it refuses before it works, and how a signal ends it in any of its phases."""

import os
import shutil
import signal
import threading
import time

import pytest

from cli.arms import plan_arms
from cli.demo import build_embedded_cache, check_cache, read_arms
from dla_cache.errors import WorkInterrupted
from dla_cache.store import open_store


def test_results_of_another_seed_are_refused_before_anything_is_built(dla, tmp_path):
    places = {"store": tmp_path / "cache.zarr", "images": tmp_path / "data"}
    probe = plan_arms(read_arms(), tmp_path, **places, seed=0, steps=None)[0]
    probe.folder.mkdir(parents=True)
    shutil.copy(probe.run_file, probe.folder / "config.yaml")
    ended = dla("demo", "--out", tmp_path, "--seed", 5)
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert f"`{probe.folder}` holds a run with other settings: `seed` is 0 there, 5 here" in ended.stderr
    assert ended.stderr.count("hint: ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "specs"]


def test_a_signal_while_it_draws_its_images_ends_it_with_one_message(dla, tmp_path):
    def send_when_it_draws():
        until = time.monotonic() + 10
        while not (tmp_path / "data" / "images").exists() and time.monotonic() < until:
            time.sleep(0.001)
        if (tmp_path / "data" / "images").exists():
            os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send_when_it_draws)
    sender.start()
    ended = dla("demo", "--out", tmp_path)
    sender.join()
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert ended.stderr.count("error: interrupted") == ended.stderr.count("hint: ") == 1
    assert not (tmp_path / "data" / "manifest.parquet").exists()


def test_a_stop_is_heeded_while_images_are_drawn_and_while_the_store_is_checked(tiny, tmp_path):
    with pytest.raises(WorkInterrupted):
        build_embedded_cache(tmp_path, should_stop=lambda: True)
    with pytest.raises(WorkInterrupted):
        check_cache(open_store(tiny.store), tiny.manifest, lambda: True)
