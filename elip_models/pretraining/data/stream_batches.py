"""Endless batches of a stream; they depend on (seed, number of readers) only.

A reader is one worker of one rank. Every pass over the shards is a permutation that depends on
(seed, pass), and each reader takes every n-th shard. A reader begins its next pass without waiting
for the others. The caption and the crop of a sample depend on (seed, reader, turn, place): the turn
counts the shards of the reader, the place counts the samples of the shard.

Each batch holds the turn to resume at, so that no sample is left out.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from elip_models.images import SampleError
from elip_models.pretraining.data.loader import ForkSafeLoader, stack_tensors, worker_options
from elip_models.pretraining.data.read_errors import DataError, SkipReport
from elip_models.pretraining.data.sample import Sample
from elip_models.pretraining.data.stream_source import (
    LOST_SHARD,
    MAX_IN_A_ROW,
    ShardEnd,
    StreamSource,
    decode_stored,
)
from elip_models.pretraining.data.tar_samples import TarSample
from elip_models.validation import Count, PositiveInt, check

_MAX_BUFFER_BYTES = 2**28


class _Stored(NamedTuple):
    stored: TarSample | ShardEnd
    turn: int
    place: int


class StreamBatches(IterableDataset):
    """Batches of one rank: {"images": (B, 3, S, S), ..}, the output of `prepare` for each sample.

    A batch also has:

        skipped  list of (id, reason) of samples that could not be read before this batch
        shards   list of (id, problem) of shards that ended; the problem is "" for a complete one
        worker   number of the worker that made it; turn: the shard to resume at

    To resume, set `turns` (one for each worker) and `done` (the number of batches before). If no
    sample can be read, a DataError takes the place of a batch.

    Args:
        source: The stream.
        prepare: Maps (sample, place, random generator) to tensors by name.
        batch_size: Samples in a batch.
        seed: Seed of all random choices.
        rank: Rank of this process.
        world_size: Number of processes.
        num_workers: Worker processes of this rank.

    Raises:
        ValueError: There are fewer shards than readers, and the stream is not resampled.
    """

    def __init__(
        self,
        source: StreamSource,
        prepare: Callable[[Sample, int, np.random.Generator], dict[str, Tensor]],
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        check("batch_size", batch_size, PositiveInt)
        check("seed", seed, Count)
        check("num_workers", num_workers, Count)
        self.source = source
        self.prepare = prepare
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.num_workers = num_workers
        self.workers = max(1, num_workers)
        self.readers = world_size * self.workers
        if len(source.shards) < self.readers and not source.spec.resample:
            raise ValueError(
                f"stream: expected at least {self.readers} shards, one for each reader (processes "
                f"x workers: {world_size} x {self.workers}), got {len(source.shards)}; use fewer "
                "processes, a lower data.num_workers, or resample: true"
            )
        self.turns = [0] * self.workers
        self.done = 0

    def __iter__(self) -> Iterator[dict[str, Any] | DataError]:
        info = get_worker_info()
        first = 0 if info is None else info.id  # the loader takes one batch from each worker
        try:
            yield from self._batches((first + self.done) % self.workers)
        except DataError as error:
            yield error

    def _batches(self, worker: int) -> Iterator[dict[str, Any]]:
        reader, first = self.rank * self.workers + worker, self.turns[worker]
        buffer = _ShuffleBuffer(
            self.source.spec.shuffle, np.random.default_rng((self.seed, reader, first))
        )
        samples, skipped, shards, undecoded = [], [], [], 0
        for stored, turn, place in buffer.shuffled(self._stored(reader, first)):
            try:
                if isinstance(stored, ShardEnd):
                    shards.append(tuple(stored))
                    stored.check()
                else:
                    rng = np.random.default_rng((self.seed, reader, turn, place))
                    samples.append(self.prepare(decode_stored(stored), place, rng))
                    undecoded = 0
            except SampleError as error:
                skipped.append((error.id, error.reason))
                if not stored.problem:
                    undecoded += 1
            if undecoded + buffer.lost_in_a_row >= MAX_IN_A_ROW:
                raise DataError(f"no readable sample: {SkipReport.from_skipped(skipped).summary()}")
            if len(samples) == self.batch_size:
                state = {"worker": worker, "turn": buffer.oldest_turn}
                yield stack_tensors(samples) | {"skipped": skipped, "shards": shards} | state
                samples, skipped, shards = [], [], []

    def _stored(self, reader: int, first: int) -> Iterator[_Stored]:
        for turn in itertools.count(first):
            for place, stored in enumerate(self.source.read(self._shard(reader, turn))):
                yield _Stored(stored, turn, place)

    def _shard(self, reader: int, turn: int) -> int:
        number = len(self.source.shards)
        if self.source.spec.resample:
            return int(np.random.default_rng((self.seed, reader, turn)).integers(number))
        this_pass, place = divmod(turn, len(range(reader, number, self.readers)))
        order = np.random.default_rng((self.seed, this_pass)).permutation(number)
        return int(order[reader + place * self.readers])


class _ShuffleBuffer:
    """Shuffle buffer of stored samples, bounded by `size` and by bytes.

    Lost samples bypass the buffer and are counted until the next sample arrives.
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self._size, self._rng = size, rng
        self._items: list[_Stored] = []
        self._bytes = 0
        self._turn = 0
        self.lost_in_a_row = 0

    @property
    def oldest_turn(self) -> int:
        """The first turn of which a sample is still in the buffer."""
        return min((each.turn for each in self._items), default=self._turn)

    def shuffled(self, stored: Iterator[_Stored]) -> Iterator[_Stored]:
        for each in stored:
            self._turn = each.turn
            is_end = isinstance(each.stored, ShardEnd)
            if is_end or each.stored.problem:
                if each.stored.problem:
                    self.lost_in_a_row += LOST_SHARD if is_end else 1
                yield each
                continue
            self.lost_in_a_row = 0
            self._items.append(each)
            self._bytes += len(each.stored.image)
            while len(self._items) >= self._size or self._bytes > _MAX_BUFFER_BYTES:
                number = self._rng.integers(len(self._items))
                self._items[number], self._items[-1] = self._items[-1], self._items[number]
                item = self._items.pop()
                self._bytes -= len(item.stored.image)
                yield item


def stream_loader(batches: StreamBatches) -> DataLoader:
    """Return a loader of `batches`, from their position at the time of `iter()`."""
    options = worker_options(batches.num_workers)
    return ForkSafeLoader(batches, batch_size=None, collate_fn=_identity, **options)


def _identity(batch: Any) -> Any:
    return batch
