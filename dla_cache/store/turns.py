"""Which of several builders of one store computes which shard: by claims that are renewed while it works."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from dla_cache.errors import StoreError
from dla_cache.remote import ObjectStore
from dla_cache.shards import Shard
from dla_cache.store.claims import Claims

LEASE_S = 60.0
"""How long others wait, and the skew of clocks besides, for a builder that was killed. A living one renews."""

POLL_S = 1.0
"""Between two looks at the shards that other builders have."""


class ClaimedTurns:
    """Turns by claims. Claims that are held are renewed by a thread until `close`, which gives back what is left."""

    def __init__(self, objects: ObjectStore, is_committed: Callable[[str, int], bool]) -> None:
        self._claims = Claims(objects, LEASE_S)
        self._is_committed = is_committed
        self._held: dict[tuple[str, int], int] = {}
        self._others: dict[str, list[Shard]] = defaultdict(list)
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="claims", daemon=True)
        self._renewing.start()

    def take(self, series: str, shards: Sequence[Shard]) -> Iterator[Shard]:
        for shard in shards:
            if self._is_committed(series, shard.index):
                continue
            generation = self._claims.acquire(series, shard.index)
            if generation is None:
                self._others[series].append(shard)
                continue
            with self._lock:
                self._held[series, shard.index] = generation
            if self._is_committed(series, shard.index):  # by who released it just now
                self.release(series, shard.index)
            else:
                yield shard

    def release(self, series: str, shard: int) -> None:
        with self._lock:
            generation = self._held.pop((series, shard), None)
            if generation is not None:
                self._claims.release(series, shard, generation)

    def left(self, series: str) -> Sequence[Shard]:
        others = [shard for shard in self._others.pop(series, []) if not self._is_committed(series, shard.index)]
        if others:
            time.sleep(POLL_S)
        return others

    def close(self) -> None:
        self._is_over.set()
        self._renewing.join()
        for series, shard in list(self._held):
            with suppress(StoreError):  # it ends by itself
                self.release(series, shard)

    def _renew(self) -> None:
        while not self._is_over.wait(self._claims.lease_s / 4):
            for key in list(self._held):
                with self._lock, suppress(StoreError):  # a claim that lapses costs double work and nothing else
                    if key in self._held:
                        renewed = self._claims.renew(*key, self._held[key])
                        if renewed is None:  # another has taken it over; who commits first has done it
                            del self._held[key]
                        else:
                            self._held[key] = renewed
