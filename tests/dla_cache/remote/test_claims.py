"""Claims: one process at a shard at a time, in a folder, below a prefix, and whatever happens in between."""

import json
import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dla_cache.errors import StoreError
from dla_cache.remote import FolderObjects, ObjectStore
from dla_cache.store.claims import CLAIMS, CLOCK_SKEW_S, LONGEST_LEASE_S, Claims

LEASE_S = 100.0
N_SHARDS = 12


class Clock:
    def __init__(self) -> None:
        self.seconds = 1e9

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def claims(objects: ObjectStore, clock: Clock) -> Callable[[str], Claims]:
    """`claims(owner)`: those of one process."""
    return lambda owner: Claims(objects, LEASE_S, owner=owner, now=clock)


def test_a_claimed_shard_is_nobody_elses_until_it_is_released(claims: Callable[[str], Claims]) -> None:
    one, other = claims("one"), claims("other")
    generation = one.acquire("depth", 3)
    assert generation == 1
    assert other.acquire("depth", 3) is None
    assert other.acquire("depth", 33) == 1
    assert other.acquire("images", 3) == 1
    one.release("depth", 3, generation)
    assert one.holder("depth", 3) is None
    assert other.acquire("depth", 3) == 1


def test_a_claim_is_taken_over_once_it_has_expired_and_clocks_may_differ(
    claims: Callable[[str], Claims], clock: Clock
) -> None:
    one, other = claims("one"), claims("other")
    assert one.acquire("depth", 3) == 1
    clock.seconds += LEASE_S + CLOCK_SKEW_S - 1
    assert other.acquire("depth", 3) is None
    clock.seconds += 1
    assert other.acquire("depth", 3) == 2
    holder = other.holder("depth", 3)
    assert holder is not None
    assert (holder.owner, holder.expires - holder.acquired) == ("other", LEASE_S)
    assert one.renew("depth", 3, 1) is None
    one.release("depth", 3, 1)
    assert claims("third").acquire("depth", 3) is None


def test_a_renewed_claim_holds_as_long_again_and_leaves_one_object(
    claims: Callable[[str], Claims], clock: Clock, objects: ObjectStore
) -> None:
    one, generation = claims("one"), 1
    assert one.acquire("depth", 3) == generation
    for _ in range(5):
        clock.seconds += LEASE_S - 1
        renewed = one.renew("depth", 3, generation)
        assert renewed == generation + 1
        generation = renewed
        assert claims("other").acquire("depth", 3) is None
    assert [*objects.names()] == [f"{CLAIMS}/depth/3.6.json"]


def _claim_all(folder: Path, owner: str, start: Any, results: Any) -> None:
    claims = Claims(FolderObjects(folder), LEASE_S, owner=owner)
    start.wait()
    results.put([shard for shard in range(N_SHARDS) if claims.acquire("depth", shard) is not None])


@pytest.mark.parametrize("expired", [False, True])
def test_of_several_processes_at_one_shard_exactly_one_holds_it(tmp_path: Path, expired: bool) -> None:
    if expired:
        dead = Claims(FolderObjects(tmp_path), LEASE_S, now=lambda: 0)
        assert all(dead.acquire("depth", shard) == 1 for shard in range(N_SHARDS))
    fork = multiprocessing.get_context("fork")
    start, results = fork.Barrier(4), fork.Queue()
    processes = [fork.Process(target=_claim_all, args=(tmp_path, f"p{n}", start, results)) for n in range(4)]
    for process in processes:
        process.start()
    held = [shard for _ in processes for shard in results.get(timeout=60)]
    for process in processes:
        process.join(60)
    assert sorted(held) == [*range(N_SHARDS)]
    assert len([*FolderObjects(tmp_path).names()]) == N_SHARDS * (2 if expired else 1)


def test_of_several_threads_at_one_prefix_exactly_one_holds_a_shard(s3: ObjectStore) -> None:
    held, start = [], threading.Barrier(4)

    def claim() -> None:
        claims = Claims(s3, LEASE_S)
        start.wait()
        held.extend(shard for shard in range(3) if claims.acquire("depth", shard) is not None)

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(held) == [0, 1, 2]


def test_a_number_that_became_free_while_one_looked_is_no_claim(memory_objects: Any) -> None:
    objects = memory_objects()
    one, other = Claims(objects, LEASE_S, owner="one"), Claims(objects, LEASE_S, owner="other")

    def take_and_renew() -> None:
        assert other.acquire("depth", 0) == 1
        assert other.renew("depth", 0, 1) == 2

    objects.meanwhile[2] = take_and_renew  # after `one` has seen no claim, and before it creates generation 1
    assert one.acquire("depth", 0) is None
    assert [*objects.contents] == [f"{CLAIMS}/depth/0.2.json"]


def test_who_slept_through_its_lease_does_not_renew_what_is_anothers_by_now(
    claims: Callable[[str], Claims], clock: Clock
) -> None:
    one, other = claims("one"), claims("other")
    assert one.acquire("depth", 0) == 1
    clock.seconds += LEASE_S + CLOCK_SKEW_S
    assert other.acquire("depth", 0) == 2
    other.release("depth", 0, 2)
    assert other.acquire("depth", 0) == 1  # the number that the other believes to be its own
    assert one.renew("depth", 0, 1) is None
    holder = one.holder("depth", 0)
    assert holder is not None
    assert holder.owner == "other"


STEPS = st.lists(st.sampled_from(["acquire", "renew", "release", "expire"]), max_size=6)


@given(before=STEPS, work=st.lists(st.sampled_from(["acquire", "renew", "release"]), max_size=4), others=st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_two_never_hold_one_shard_whatever_another_does_between_any_two_steps(
    memory_objects: Any, before: list[str], work: list[str], others: st.DataObject
) -> None:
    clock, objects = Clock(), memory_objects()
    claims = {owner: Claims(objects, LEASE_S, owner=owner, now=clock) for owner in ("one", "other")}
    held: dict[str, tuple[int, float]] = {}  # what each believes: generation, and until when
    busy = set()

    def play(owner: str, step: str) -> None:
        if owner in busy:  # a process does one thing at a time
            return
        busy.add(owner)
        do(owner, step)
        busy.remove(owner)
        assert sum(clock.seconds < until for _, until in held.values()) <= 1

    def do(owner: str, step: str) -> None:
        began = clock.seconds
        if step == "expire":
            clock.seconds += LEASE_S + CLOCK_SKEW_S
        elif step == "acquire" and owner not in held:
            generation = claims[owner].acquire("depth", 0)
            if generation is not None:
                held[owner] = generation, began + LEASE_S
        elif step == "renew" and owner in held:
            generation = claims[owner].renew("depth", 0, held[owner][0])
            held.pop(owner)
            if generation is not None:
                held[owner] = generation, began + LEASE_S
        elif step == "release" and owner in held:
            claims[owner].release("depth", 0, held.pop(owner)[0])

    for step in before:
        play(others.draw(st.sampled_from(["one", "other"])), step)
    meanwhile = others.draw(st.dictionaries(st.integers(1, 12), STEPS, max_size=3))
    objects.steps = 0
    for number, steps in meanwhile.items():
        objects.meanwhile[number] = lambda steps=steps: [play("other", step) for step in steps]
    for step in work:
        play("one", step)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"owner": "x", "acquired": 5}',
        b'{"owner": "", "acquired": 5, "expires": 6}',
        b'{"owner": "x", "acquired": 6, "expires": 5}',
        b'{"owner": "x", "acquired": 5, "expires": 1e300}',
        json.dumps({"owner": "x", "acquired": 5, "expires": 6 + LONGEST_LEASE_S}).encode(),
    ],
)
def test_a_damaged_claim_is_named_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    objects = FolderObjects(tmp_path)
    objects.write(f"{CLAIMS}/depth/0.1.json", content)
    with pytest.raises(StoreError, match=r"(?s)claims/depth/0\.1\.json` is no claim.*hint: remove it"):
        Claims(objects, LEASE_S).acquire("depth", 0)


def test_what_is_no_claim_of_the_shard_is_not_looked_at(tmp_path: Path) -> None:
    objects = FolderObjects(tmp_path)
    for name in ("0.json", "0.01.json", "0.0.json", "0.1.json.bak", "00.1.json", "0.1.2.json", "0.x.json"):
        objects.write(f"{CLAIMS}/depth/{name}", b"")
    assert Claims(objects, LEASE_S).acquire("depth", 0) == 1
