"""Endless batches of a stream; they depend on (seed, number of readers) only.

A reader is one worker of one rank. Every pass over the shards is a permutation that depends on
(seed, pass), and each reader takes every n-th shard. A reader begins its next pass without waiting
for the others. The order of the samples of a shard depends on (seed, reader, turn), where the turn
counts the shards of the reader; the caption and the crop of a sample also on its index.

Each batch has the position after it: the turn, and the place in the order of that shard. A
resumed reader downloads this shard again and continues with exactly the next sample.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from queue import Queue
from threading import Thread
from typing import Annotated, Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from elip_models.images import SampleError
from elip_models.pretraining.data.loader import WorkerLoader, stack_tensors, worker_options
from elip_models.pretraining.data.read_errors import DataError
from elip_models.pretraining.data.samples import Sample
from elip_models.pretraining.data.streams import MAX_LOST_SHARDS, DownloadedShard, StreamSource
from elip_models.validation import Bounds, PositiveInt, check


@dataclass(eq=False)
class StreamBatches(IterableDataset):
    """Batches of one rank: {"images": (B, 3, S, S), ..}, the output of `prepare` for each sample.

    A batch also has:

        skipped  list of (id, reason) of samples that could not be read before this batch
        shards   list of (name, problem) of shards that began; the problem is "" for a complete one
        worker   number of the worker that made it
        position (turn, place) of the next sample of this worker

    If no sample can be read, a DataError takes the place of a batch. `prepare` maps (sample, index,
    random generator) to tensors by name; `num_workers` are the worker processes of this rank.

    Raises:
        ValueError: There are fewer shards than readers, and the stream is not resampled.
    """

    source: StreamSource
    prepare: Callable[[Sample, int, np.random.Generator], dict[str, Tensor]]
    batch_size: int
    _: KW_ONLY
    seed: int
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0

    def __post_init__(self) -> None:
        check("batch_size", self.batch_size, PositiveInt)
        check("rank", self.rank, Annotated[int, Bounds(0, self.world_size - 1)])
        self.workers = max(1, self.num_workers)
        self.readers = self.world_size * self.workers
        if len(self.source.shards) < self.readers and not self.source.resample:
            raise ValueError(
                f"stream: expected at least {self.readers} shards, one for each reader (processes "
                f"x workers: {self.world_size} x {self.workers}), got {len(self.source.shards)}; "
                "use fewer processes, a lower data.num_workers, or resample: true"
            )
        self.positions = [(0, 0)] * self.workers
        self.done = 0

    def __iter__(self) -> Iterator[dict[str, Any] | DataError]:
        info = get_worker_info()
        first = 0 if info is None else info.id  # the loader takes one batch from each worker
        try:
            yield from self._batches((first + self.done) % self.workers)
        except DataError as error:
            yield error

    def _batches(self, worker: int) -> Iterator[dict[str, Any]]:
        reader = self.rank * self.workers + worker
        first_turn, first_place = self.positions[worker]
        samples, skipped, shards, lost = [], [], [], 0
        for turn, shard in self._shards(reader, first_turn):
            shards.append((shard.name, shard.problem))
            lost += 1
            order = np.random.default_rng((self.seed, reader, turn)).permutation(len(shard))
            for place in range(first_place if turn == first_turn else 0, len(shard)):
                index = int(order[place])
                rng = np.random.default_rng((self.seed, reader, turn, index))
                try:
                    samples.append(self.prepare(shard[index], index, rng))
                    lost = 0
                except SampleError as error:
                    skipped.append((error.id, error.reason))
                if len(samples) == self.batch_size:
                    state = {"skipped": skipped, "shards": shards, "worker": worker}
                    yield stack_tensors(samples) | state | {"position": (turn, place + 1)}
                    samples, skipped, shards = [], [], []
            if lost == MAX_LOST_SHARDS:
                problem = shard.problem or (skipped[-1][1] if skipped else "it has no sample")
                raise DataError(
                    f"no readable sample in {lost} consecutive shards, the last of which is "
                    f"{shard.name}: {problem}"
                )

    def _shards(self, reader: int, turn: int) -> Iterator[tuple[int, DownloadedShard]]:
        """Yield the turns of a reader with their shards; the next one is downloaded meanwhile."""
        following = self._start_download(reader, turn)
        while True:
            shard = following.get()
            if isinstance(shard, DataError):
                raise shard
            following = self._start_download(reader, turn + 1)
            yield turn, shard
            turn += 1

    def _start_download(self, reader: int, turn: int) -> "Queue[DownloadedShard | DataError]":
        """Download a shard in a thread, which does not delay the end of the process."""
        url = self.source.shards[self._number(reader, turn)]
        result: Queue[DownloadedShard | DataError] = Queue()
        Thread(target=_download, args=(url, result), daemon=True).start()
        return result

    def _number(self, reader: int, turn: int) -> int:
        """Return the number of the shard that a reader takes in this turn."""
        count = len(self.source.shards)
        if self.source.resample:
            return int(np.random.default_rng((self.seed, reader, turn)).integers(count))
        this_pass, place = divmod(turn, len(range(reader, count, self.readers)))
        order = np.random.default_rng((self.seed, this_pass)).permutation(count)
        return int(order[reader + place * self.readers])


def _download(url: str, result: "Queue[DownloadedShard | DataError]") -> None:
    try:
        result.put(DownloadedShard(url))
    except DataError as error:
        result.put(error)


def stream_loader(
    batches: StreamBatches, positions: Sequence[tuple[int, int]] = (), done: int = 0
) -> DataLoader:
    """Return a loader of `batches`, which continues at `positions` after `done` batches.

    `positions` has the position of the last batch of each worker, or (0, 0); it is empty at the
    beginning.
    """
    batches.positions = list(positions) or [(0, 0)] * batches.workers
    batches.done = done
    return WorkerLoader(batches, batch_size=None, **worker_options(batches.num_workers))
