"""Commit records: their union is what is there, whoever consolidates meanwhile."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dla_cache
from dla_cache.errors import StoreError
from dla_cache.spec import Modality
from dla_cache.store.commits import CommitLog, CommitRecord


def make_record(shard: int) -> CommitRecord:
    return CommitRecord(
        modality=Modality.DEPTH,
        shard=shard,
        n_rows=3,
        size_bytes=100,
        file_sha256="0" * 64,
        content_sum="0" * 64,
        edge_crc32c=(1, 2**32 - 1),
        recipe_hash="0" * 64,
        statistics={},
        seconds=0.1,
        device="cpu",
    )


def commit(log: CommitLog, shard: int) -> None:
    log.commit_once(shard, lambda: make_record(shard))


@given(steps=st.lists(st.integers(-13, 12) | st.just("consolidate"), max_size=25))
@settings(deadline=None, max_examples=40)
def test_whatever_the_order_of_commits_withdrawals_and_consolidations_the_log_holds_what_it_should(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int | str]
) -> None:
    log = CommitLog(tmp_path_factory.mktemp("log"))
    committed = set()
    for step in steps:
        if step == "consolidate":
            log.consolidate()
        elif step < 0:
            log.withdraw({-step - 1: make_record(-step - 1)})
            committed.discard(-step - 1)
        else:
            commit(log, step)
            committed.add(step)
        assert CommitLog(log.folder).read() == {shard: make_record(shard) for shard in committed}
        assert log.read() == CommitLog(log.folder).read()


def test_consolidation_leaves_one_file(tmp_path: Path) -> None:
    log = CommitLog(tmp_path)
    for shard in range(10):
        commit(log, shard)
    assert log.loose_files() == 10
    log.consolidate()
    commit(log, 10)
    log.consolidate()
    assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == ["consolidated"]
    assert log.loose_files() == 0


def test_a_listing_that_a_consolidation_passed_by_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CommitLog(tmp_path)
    for shard in range(3):
        commit(log, shard)
    log.consolidate()
    # Read before the merged file came and after the loose ones went, a folder shows neither.
    late = list(os.scandir(tmp_path))
    listings = iter([[]])
    monkeypatch.setattr(os, "scandir", lambda _path: next(listings, late))
    assert CommitLog(tmp_path).read().keys() == {0, 1, 2}


def test_a_shard_is_written_once_even_after_consolidation(tmp_path: Path) -> None:
    log = CommitLog(tmp_path)
    commit(log, 0)
    commit(log, 1)
    log.consolidate()

    def write() -> CommitRecord:
        raise AssertionError("a committed shard was written again")

    assert CommitLog(tmp_path).commit_once(0, write) is False
    assert CommitLog(tmp_path).read()[0] == make_record(0)


def test_a_record_that_was_replaced_meanwhile_is_not_withdrawn(tmp_path: Path) -> None:
    log = CommitLog(tmp_path)
    commit(log, 0)
    log.withdraw({0: make_record(0).model_copy(update={"content_sum": "1" * 64})})
    assert log.read() == {0: make_record(0)}


def test_a_process_that_knew_a_withdrawn_record_sees_the_new_one(tmp_path: Path) -> None:
    log, other = CommitLog(tmp_path), CommitLog(tmp_path)
    commit(log, 0)
    commit(log, 1)
    assert other.read().keys() == {0, 1}
    log.withdraw({0: make_record(0)})
    new = make_record(0).model_copy(update={"content_sum": "1" * 64})
    assert log.commit_once(0, lambda: new)
    assert other.read() == {0: new, 1: make_record(1)}
    other.consolidate()
    assert CommitLog(tmp_path).read() == {0: new, 1: make_record(1)}


@pytest.mark.parametrize("loss", [Path.rmdir, lambda folder: (folder.rmdir(), folder.write_text(""))])
def test_a_lost_folder_of_records_is_one_error(tmp_path: Path, loss: Callable[[Path], object]) -> None:
    (tmp_path / "log").mkdir()
    loss(tmp_path / "log")
    with pytest.raises(StoreError, match=r"commit records in `.*log` cannot be listed[\s\S]*hint: "):
        CommitLog(tmp_path / "log").read()


def test_an_attempt_that_fails_commits_nothing_and_the_next_one_can(tmp_path: Path) -> None:
    log = CommitLog(tmp_path)

    def fail() -> CommitRecord:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        log.commit_once(0, fail)
    assert log.read() == {}
    assert list(tmp_path.iterdir()) == []
    commit(log, 0)
    assert log.read() == {0: make_record(0)}


PROCESS = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_commits import CommitLog, commit

log = CommitLog(Path(sys.argv[1]))
for shard in range(int(sys.argv[2]), 60, 2):
    commit(log, shard)
    if shard % 3 == 0:
        log.consolidate()
        own = set(range(int(sys.argv[2]), shard + 1, 2))
        assert own <= log.read().keys(), own - log.read().keys()
"""


def test_two_processes_that_commit_and_consolidate_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    code = PROCESS.format(tests=str(Path(__file__).parent))
    environment = {"PYTHONPATH": str(Path(dla_cache.__file__).parents[1])}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path, str(start)], stderr=subprocess.PIPE, env=environment)
        for start in (0, 1)
    ]
    # A reader never misses what it saw before.
    seen: set[int] = set()
    while any(process.poll() is None for process in processes):
        now = CommitLog(tmp_path).read().keys()
        assert seen <= now, seen - now
        seen = set(now)
    assert [process.communicate()[1] for process in processes] == [b"", b""]
    assert CommitLog(tmp_path).read().keys() == set(range(60))


def test_a_record_may_say_more_than_this_version_knows(tmp_path: Path) -> None:
    text = json.dumps(make_record(4).model_dump(mode="json") | {"said_by_a_later_version": [1, 2]})
    name = f"4-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    (tmp_path / name).write_text(text)
    log = CommitLog(tmp_path)
    commit(log, 5)
    assert log.read() == {4: make_record(4), 5: make_record(5)}
    log.consolidate()
    assert CommitLog(tmp_path).read() == {4: make_record(4), 5: make_record(5)}
