"""The order of training samples, their preparation, and a loader that resumes exactly.

The order of an epoch depends on (seed, epoch) only. All random choices for a sample depend on
(seed, turn, index), where the turn counts how often the sample was used before. A batch therefore
depends on (seed, epoch, offset) only: neither the number of workers nor a restart changes it. An
unreadable sample is replaced and reported.

An epoch has n_i = max(1, round(weight_i * length_i)) samples of source i. They are the next n_i
samples of an endless sequence of passes over source i. All samples of a source thus appear equally
often for any weight. Each pass is a permutation that depends on (seed, source, pass). The number of
the pass is the turn of a sample.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from elip_models.images import SampleError
from elip_models.pretraining.data.loader import WorkerLoader, stack_tensors, worker_options
from elip_models.pretraining.data.read_errors import DataError
from elip_models.pretraining.data.samples import Example, ExampleSource, Sample, Source
from elip_models.validation import Bounds, Positive, PositiveInt, check

_MAX_TRIES = 1000  # so that an unreadable source fails before all of it is tried


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of (turn, index) for one rank; without weights the turn is the epoch.

    A global batch has `world_size * batch_size` consecutive samples of the epoch's permutation over
    all sources; rank r takes the r-th part. The last, incomplete global batch of an epoch is
    dropped. The next iterator begins after `batches_done` batches.

    Args:
        length: Number of samples, or that of each source of a `MixedSource`.
        batch_size: Samples of one rank in a batch.
        seed: Seed of the permutations.
        rank: Rank of this process.
        world_size: Number of processes.
        weights: How often the samples of each source appear in an epoch, such as 1, 2 or 0.5.

    Raises:
        ValueError: An epoch has no complete batch, `rank` is not below `world_size`, or a weight
            is not above 0.
    """

    def __init__(
        self,
        length: int | Sequence[int],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        weights: Sequence[float] | None = None,
    ) -> None:
        check("batch_size", batch_size, PositiveInt)
        check("rank", rank, Annotated[int, Bounds(0, world_size - 1)])
        check("weights", tuple(weights or ()), tuple[Positive, ...])
        self.lengths = tuple(length) if isinstance(length, Sequence) else (length,)
        pairs = zip(self.lengths, weights or [1.0] * len(self.lengths), strict=True)
        self._counts = [max(1, round(weight * length)) for length, weight in pairs]
        self.samples = sum(self._counts)
        self.batches_per_epoch = self.samples // (batch_size * world_size)
        if not self.batches_per_epoch:
            raise ValueError(
                f"batch_size: expected at most {self.samples // world_size} per rank "
                f"({self.samples} samples, {world_size} ranks), got {batch_size}"
            )
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.batches_done = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, offset = divmod(self.batches_done, self.batches_per_epoch)
        while True:
            positions = self._positions(epoch)
            order = np.random.default_rng((self.seed, epoch)).permutation(self.samples)
            for batch in range(offset, self.batches_per_epoch):
                start = (batch * self.world_size + self.rank) * self.batch_size
                chosen = positions[order[start : start + self.batch_size]]
                yield [(turn, index) for turn, index in chosen.tolist()]
            epoch, offset = epoch + 1, 0

    def _positions(self, epoch: int) -> np.ndarray:
        """Return the samples of an epoch before their permutation: (n, 2) int64, turn and index."""
        parts, first = [], 0
        for number, (length, count) in enumerate(zip(self.lengths, self._counts, strict=True)):
            turns, places = np.divmod(np.arange(epoch * count, (epoch + 1) * count), length)
            for turn in np.unique(turns):
                is_turn = turns == turn
                if is_turn.sum() < length:  # a whole pass is shuffled with the epoch
                    rng = np.random.default_rng((self.seed, number, int(turn)))
                    places[is_turn] = rng.permutation(length)[places[is_turn]]
            parts.append(np.stack([turns, places + first], axis=1))
            first += length
        return np.concatenate(parts)


@dataclass(eq=False)
class TrainingSamples(Dataset):
    """Dataset of prepared training samples, indexed by (turn, index).

    A sample is the output of `prepare(sample, index, rng)`, tensors by name with fixed shapes, and
    "skipped": a list with the (id, reason, index) of the requested sample if another replaced it.
    If no sample can be read, it is a DataError. `seed` is that of all random choices.
    """

    source: Source | ExampleSource
    prepare: Callable[[Sample | Example, int, np.random.Generator], dict[str, Tensor]]
    _: KW_ONLY
    seed: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: tuple[int, int]) -> dict[str, Any] | DataError:
        turn, index = position
        rng = np.random.default_rng((self.seed, turn, index))
        skipped, place = [], index
        for _ in range(_MAX_TRIES):
            try:
                sample = self.source[place]
            except SampleError as error:
                skipped.append((error.id, error.reason, place))
                place = int(rng.integers(len(self)))
                continue
            # Replacements are reported when they are requested themselves. The share of reported
            # samples is therefore the share of unreadable ones.
            return {**self.prepare(sample, place, rng), "skipped": skipped[:1]}
        sample_id, reason, _ = skipped[0]
        return DataError(
            f"no readable sample in {_MAX_TRIES} tries, such as {sample_id} ({reason})"
        )


def train_loader(dataset: TrainingSamples, sampler: EpochSampler, num_workers: int) -> DataLoader:
    """Return a loader of endless batches, from the sampler's position at the time of `iter()`.

    A batch is {"images": (B, 3, S, S), "input_ids": (B, L), "attention_mask": (B, L), "skipped":
    list of (id, reason, index)}, with any other tensors of the samples.
    """
    options = worker_options(num_workers)
    return WorkerLoader(dataset, batch_sampler=sampler, collate_fn=_collate, **options)


def _collate(samples: Sequence[dict[str, Any] | DataError]) -> dict[str, Any] | DataError:
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    skipped = [skip for sample in samples for skip in sample["skipped"]]
    return stack_tensors(samples) | {"skipped": skipped}


def apply_seeded(
    transform: Callable[[Image.Image], Tensor], image: Image.Image, rng: np.random.Generator
) -> Tensor:
    """Return `transform(image)` with torch's CPU generator seeded by `rng`, then restored."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed the accelerators of this process.
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        return transform(image)
