"""Pairs for torch's loaders: whole batches from worker processes, in the order of the stream."""

from collections.abc import Generator, Mapping
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from dla_cache.errors import StoreError
from dla_cache.pairs import PairBatch, PairStream


class PairDataset(IterableDataset[PairBatch]):
    """Batches of a stream for `DataLoader(dataset, batch_size=None)` or torchdata's `StatefulDataLoader`.

    Worker w of W takes batches w, w + W, w + 2W, …; a loader asks its workers in turn, so the batches come in the same
    order with any number of them. To go on after another number of workers or ranks, keep
    `stream.state_after(batch.number)` of the last batch that was used, and start at `stream.start_of(state)`.
    """

    def __init__(self, stream: PairStream, *, epochs: int | None = 1, start_batch: int = 0) -> None:
        """
        Args:
            epochs: the batches end with so many epochs, counted from the beginning of the first; None for no end.
            start_batch: the number of the first batch, counted over all epochs.
        """
        super().__init__()
        self.stream = stream
        self.stop = None if epochs is None else epochs * len(stream)
        self.start_batch = start_batch
        self._position: tuple[int, int] | None = None
        """Number of this worker's next batch, and how many workers there are."""
        self._resume_from: tuple[int, int] | None = None

    def set_epoch(self, epoch: int) -> None:
        """From the next time on it gives the batches of this epoch alone, counted from 0.

        Each epoch has an order of its own, and a loader that is gone through twice without this gives the same twice.
        Workers that live on (`persistent_workers`) do not hear of it: give those all `epochs` at once.
        """
        self.start_batch, self.stop = epoch * len(self.stream), (epoch + 1) * len(self.stream)

    def __len__(self) -> int:
        """Batches that are left, over all workers.

        Raises:
            TypeError: if there is no end.
        """
        if self.stop is None:
            raise TypeError("a stream without end has no length")
        return max(0, self.stop - self.start_batch)

    def __iter__(self) -> Generator[PairBatch, None, None]:
        worker = get_worker_info()
        if worker is not None and self.stream.pins_memory:
            raise StoreError(
                "a worker process cannot pin memory for another", hint="give `pin_memory=True` to the loader instead"
            )
        number, n_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # A state is gone on with once: a loop that was left early is no state, and the next one begins anew.
        start, n_workers = self._resume_from or (self.start_batch + number, n_workers)
        self._resume_from = None
        self._position = (start, n_workers)
        batches = self.stream.batches(start, step=n_workers, stop=self.stop)
        try:
            for batch in batches:
                self._position = (batch.number + n_workers, n_workers)
                yield batch
        finally:
            batches.close()
        self._position = None

    def state_dict(self) -> dict[str, Any]:
        """Where this worker is; a `StatefulDataLoader` keeps one for each, and gives it back to the same one."""
        number, n_workers = self._resume_from or self._position or (None, None)
        return {"next_batch": number, "n_workers": n_workers, "stream": self.stream.state_after(None)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a state was.

        Raises:
            StoreError: if it is of a stream of other images or another order.
        """
        self.stream.start_of(state["stream"])
        self._resume_from = None if state["next_batch"] is None else (state["next_batch"], state["n_workers"])
