"""``Loader``: batches of clips, decoded ahead by worker threads; any batch of any epoch can be had again.

FFmpeg and the resize run without the interpreter's lock, so threads keep up, and they share one cache of decoded
frames. Each worker uses one FFmpeg thread and one torch thread. Which workers there are changes no value: order and
clips are functions of (seed, epoch) and (seed, epoch, index).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from sidestream.data.dataset import ClipDataset, ClipItem
from sidestream.data.pictures import Times
from sidestream.data.sampling import random_generator
from sidestream.errors import InputError, SourceError
from sidestream.intra_op import use_one_thread

NUM_BATCHES_AHEAD = 3


@dataclass(frozen=True, slots=True)
class Batch:
    """Collated clips; fewer than asked for where a record could not be read, and at the end of an epoch."""

    clip_BTCHW: Tensor
    labels_B: Tensor
    """int64."""
    keys: tuple[str, ...]
    pts_seconds: tuple[Times, ...]
    number: int
    """The batch's place in its epoch; numbers are missing where no record of a batch could be read."""
    points_BTP3: Tensor | None = None
    """Of data sets with keypoints: x, y in pixels of the clips' pictures, and 1 where the point lies inside, else 0."""

    def __len__(self) -> int:
        return len(self.keys)


class Loader:
    """Batches of ``dataset``. ``loader.batches(epoch, start_batch)`` iterates over one epoch from any batch on.

    ``for batch in loader`` goes on where ``state()`` is, to the end of that epoch, and ``load_state`` takes it up
    again: the same batches follow.

    Args:
        batch_size: clips of a batch; the last one of an epoch may have fewer, unless ``drop_last``.
        shuffle: a new order in every epoch; by default for the train part only.
        num_workers: decoding threads; 0 decodes in the caller's.
        shard: (number, count): every count-th clip from number on, for several processes; each gets equally many.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool | None = None,
        num_workers: int = 2,
        drop_last: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if batch_size < 1 or num_workers < 0 or seed < 0:
            raise InputError(f"{batch_size = }, {num_workers = }, {seed = }; give 1 or more, and 0 or more")
        if not 0 <= shard[0] < shard[1]:
            raise InputError(f"{shard = }; give (number, count) with 0 <= number < count")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.shuffle = dataset.part == "train" if shuffle is None else shuffle
        self.num_workers, self.drop_last, self.shard = num_workers, drop_last, shard
        self._epoch, self._batch = 0, 0
        if len(self) == 0:
            raise InputError(
                f"{dataset.name} has {len(dataset)} clips, too few for a whole batch of {batch_size}; "
                "lower batch_size, or leave drop_last out"
            )

    def __len__(self) -> int:
        """Batches of an epoch."""
        num_clips = len(self.dataset) // self.shard[1] if self.shard[1] > 1 else len(self.dataset)
        return num_clips // self.batch_size if self.drop_last else -(-num_clips // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches(self._epoch, self._batch):
            self._batch = batch.number + 1
            yield batch
        self._epoch, self._batch = self._epoch + 1, 0

    def state(self) -> dict[str, int]:
        """Where the iteration stands: the next batch. Plain numbers, for JSON."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state(self, state: dict[str, int]) -> None:
        self._epoch, self._batch = state["epoch"], state["batch"]

    def order(self, epoch: int) -> list[int]:
        """The clips of that epoch in order (of this shard)."""
        numbers = list(range(len(self.dataset)))
        if self.shuffle:
            numbers = random_generator(self.seed, epoch).permutation(len(numbers)).tolist()
        number, count = self.shard
        return numbers[number : len(numbers) // count * count : count] if count > 1 else numbers

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from ``start_batch`` on.

        Raises ``InputError`` when not one record of the whole epoch can be read.
        """
        order = self.order(epoch)
        plan = [order[n * self.batch_size : (n + 1) * self.batch_size] for n in range(len(self))]
        num_given = 0
        with _Workers(self.num_workers) as workers:
            ahead: deque[tuple[int, list[tuple[int, Future[ClipItem]]]]] = deque()
            todo = iter(range(start_batch, len(plan)))
            while True:
                while len(ahead) < NUM_BATCHES_AHEAD and (number := next(todo, None)) is not None:
                    ahead.append((number, [(i, workers.submit(self.dataset, i, epoch)) for i in plan[number]]))
                if not ahead:
                    break
                number, futures = ahead.popleft()
                batch = self._collate(number, futures)
                if batch is not None:
                    num_given += 1
                    yield batch
        if not num_given and start_batch == 0:
            first = next(iter(self.dataset.skipped.values()), "")
            raise InputError(f"{self.dataset.name}: not one of {len(self.dataset)} clips can be read; {first}")

    def _collate(self, number: int, futures: list[tuple[int, Future[ClipItem]]]) -> Batch | None:
        items = []
        for index, future in futures:
            try:
                items.append(future.result())
            except SourceError as error:
                self.dataset.skip(index, error)
        if not items:
            return None
        has_points = items[0].points_TP3 is not None
        return Batch(
            torch.stack([item.clip_TCHW for item in items]),
            torch.tensor([item.label for item in items]),
            tuple(item.key for item in items),
            tuple(item.pts_seconds for item in items),
            number,
            torch.stack([item.points_TP3 for item in items if item.points_TP3 is not None]) if has_points else None,
        )


class _Workers:
    """Decoding threads for one pass over the data; with none, the work is done at once where it is asked for."""

    def __init__(self, num_workers: int) -> None:
        self._pool = None
        if num_workers:
            started = threading.Barrier(num_workers + 1)
            before = torch.get_num_threads()
            self._pool = ThreadPoolExecutor(num_workers, "clip-decoder")
            for _ in range(num_workers):
                self._pool.submit(_start_worker, started)
            started.wait()
            torch.set_num_threads(before)  # what a worker sets would be the default of later threads

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, dataset: ClipDataset, index: int, epoch: int) -> Future[ClipItem]:
        if self._pool is not None:
            return self._pool.submit(dataset.item, index, epoch)
        future: Future[ClipItem] = Future()
        try:
            future.set_result(dataset.item(index, epoch))
        except Exception as error:
            future.set_exception(error)
        return future


def _start_worker(started: threading.Barrier) -> None:
    use_one_thread()
    started.wait()
