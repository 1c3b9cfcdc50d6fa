"""Batches whose content depends on (seed, epoch, offset) alone, so that a run resumes exactly.

The order of an epoch is a permutation of (seed, epoch); the caption and the crop of a sample are a
function of (seed, turn, index), its turn being how often it has come before. Neither the number of
workers nor the moment of a restart changes a batch. A sample that cannot be read is replaced,
counted and reported.
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from elip_models.data.checks import check_not_empty
from elip_models.data.examples import Example, ExampleSource
from elip_models.data.mixture import check_weights, samples_an_epoch, turns
from elip_models.data.read_errors import DataError, SkipReport
from elip_models.data.sample import Sample, SampleError, Source
from elip_models.data.training_samples import TrainingSamples
from elip_models.validation import Count, PositiveInt, check

if TYPE_CHECKING:
    from PIL import Image


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of (turn, index) for one rank; without weights the turn is the epoch.

    `length` is the number of samples, or those of each source of a `MixedSource`; `weights`, one a
    source, how often its samples come in an epoch, such as 1, 2 or 0.5. `batch_size` is that of one
    rank. A global batch is `world_size` of them, consecutive in the epoch's permutation of all
    sources together; rank r takes the r-th. The last, incomplete global batch of an epoch is
    dropped. Raises TypeError or ValueError for an argument out of range.
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
        self.lengths = tuple(length) if isinstance(length, Sequence) else (length,)
        for each in self.lengths:
            check("length", each, PositiveInt)
        check("batch_size", batch_size, PositiveInt)
        check("seed", seed, Count)
        check("rank", rank, Count)
        check("world_size", world_size, PositiveInt)
        self.weights = check_weights(weights, len(self.lengths))
        if rank >= world_size:
            raise ValueError(f"rank: expected less than world_size = {world_size}, got {rank}")
        self.samples = sum(map(samples_an_epoch, self.lengths, self.weights))
        if batch_size * world_size > self.samples:
            raise ValueError(
                f"batch_size: expected at most {self.samples // world_size} a rank "
                f"({self.samples} samples, {world_size} ranks), got {batch_size}"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.offset = 0

    @property
    def length(self) -> int:
        """Samples of all sources; an epoch has `samples` of them."""
        return sum(self.lengths)

    @property
    def batches_per_epoch(self) -> int:
        return self.samples // (self.batch_size * self.world_size)

    def set_position(self, epoch: int, offset: int) -> None:
        """The next iterator begins at batch `offset` of `epoch`.

        `offset` may equal `batches_per_epoch`, which is the beginning of the next epoch: after a
        batch with epoch e and offset o was consumed, resume with `set_position(e, o + 1)`.
        """
        check("epoch", epoch, Count)
        check("offset", offset, Count)
        if offset > self.batches_per_epoch:
            raise ValueError(
                f"offset: expected at most batches_per_epoch = {self.batches_per_epoch}, "
                f"got {offset}; the data or the batch size is not that of the saved run"
            )
        self.epoch, self.offset = divmod(
            epoch * self.batches_per_epoch + offset, self.batches_per_epoch
        )

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, offset = self.epoch, self.offset
        while True:
            drawn = turns(self.lengths, self.weights, self.seed, epoch)
            order = np.random.default_rng((self.seed, epoch)).permutation(self.samples)
            for batch in range(offset, self.batches_per_epoch):
                start = (batch * self.world_size + self.rank) * self.batch_size
                chosen = drawn[order[start : start + self.batch_size]]
                yield [(turn, index) for turn, index in chosen.tolist()]
            epoch, offset = epoch + 1, 0


class _ErrorsAsSamples(Dataset):
    """Returns a DataError as the sample: raised in a worker, it would reach the user as the text of
    that worker's traceback.
    """

    def __init__(self, dataset: TrainingSamples) -> None:
        self.dataset = dataset

    def __getitem__(self, position: tuple[int, int]) -> dict[str, Any] | DataError:
        try:
            return self.dataset[position]
        except DataError as error:
            return error


class _TrainLoader(DataLoader):
    """Adds to each batch the "epoch" and "offset" it has, whatever the workers have prefetched."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        sampler = self.batch_sampler
        start = sampler.epoch * sampler.batches_per_epoch + sampler.offset
        for step, batch in enumerate(super().__iter__(), start):
            if isinstance(batch, DataError):
                raise batch
            epoch, offset = divmod(step, sampler.batches_per_epoch)
            yield {**batch, "epoch": epoch, "offset": offset}


def train_loader(dataset: TrainingSamples, sampler: EpochSampler, num_workers: int) -> DataLoader:
    """Endless batches over epochs, from the sampler's position at the time of `iter()`.

    A batch is {"images": (B, 3, S, S), "input_ids": (B, L), "attention_mask": (B, L), "skipped":
    [(id, reason)] of the whole batch, "epoch": int, "offset": int}, and what else the samples have.
    `num_workers` changes no batch.
    """
    check("num_workers", num_workers, Count)
    if sampler.length != len(dataset):
        raise ValueError(
            f"sampler: expected one of length {len(dataset)}, as the dataset, got {sampler.length}"
        )
    return _TrainLoader(
        _ErrorsAsSamples(dataset),
        batch_sampler=sampler,
        collate_fn=_collate,
        **worker_options(num_workers),
    )


def worker_options(num_workers: int) -> dict[str, Any]:
    """What every loader passes to DataLoader."""
    if num_workers:
        # A fork after parallel tokenisation makes the tokenizer warn in every worker otherwise.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return {
        "num_workers": num_workers,
        "pin_memory": torch.cuda.is_available(),
        # The loader draws a seed for its workers: not from the global generator, which a resumed
        # run restores.
        "generator": torch.Generator(),
        "worker_init_fn": _leave_signals if num_workers else None,
    }


def _leave_signals(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal, and SIGTERM those of a Slurm job: the run decides
    what they mean. A second SIGTERM ends the worker, as does the end of the run.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def _collate(samples: Sequence[dict[str, Any] | DataError]) -> dict[str, Any] | DataError:
    """One batch, or the first error among the samples."""
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    return stacked(samples) | {"skipped": [skip for each in samples for skip in each["skipped"]]}


def stacked(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The tensors of samples, by name, as those of a batch."""
    names = [name for name, value in samples[0].items() if isinstance(value, Tensor)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in names}


class EvaluationBatch(NamedTuple):
    """Images (B, 3, S, S) in the order of the source, with the id and all captions of each."""

    images: Tensor
    ids: list[str]
    captions: list[tuple[str, ...]]


def evaluation_batches(
    source: Source,
    transform: Callable[["Image.Image"], Tensor],
    batch_size: int,
    *,
    report: SkipReport | None = None,
    num_workers: int = 0,
) -> Iterator[EvaluationBatch]:
    """Every readable sample once, in order; the last batch may be smaller.

    Samples that cannot be read are left out and counted in `report`, which raises DataError above
    its limit (default: 5%). DataError also where none can be read.
    """
    check("transform", transform, Callable)
    prepare = partial(_with_captions, transform)
    rows = _in_order(source, prepare, batch_size, report, num_workers)
    batches = (zip(*each, strict=True) for each in rows)
    return (
        EvaluationBatch(torch.stack(images), list(ids), list(captions))
        for images, ids, captions in batches
    )


class ExampleBatch(NamedTuple):
    """Images (B, 3, S, S) in the order of the source, or (B, I, 3, S, S) where an example has
    several, and the examples without their images.
    """

    images: Tensor
    examples: list[Example]


def example_batches(
    source: ExampleSource,
    transform: Callable[["Image.Image"], Tensor],
    batch_size: int,
    *,
    report: SkipReport | None = None,
    num_workers: int = 0,
) -> Iterator[ExampleBatch]:
    """Every readable example once, in order, as `evaluation_batches` does; raises alike."""
    check("transform", transform, Callable)
    prepare = partial(_as_tensors, transform)
    rows = _in_order(source, prepare, batch_size, report, num_workers)
    batches = (zip(*each, strict=True) for each in rows)
    return (ExampleBatch(torch.stack(images), list(examples)) for images, examples in batches)


def _with_captions(
    transform: Callable[["Image.Image"], Tensor], sample: Sample
) -> tuple[Tensor, str, tuple[str, ...]]:
    return transform(sample.image), sample.id, sample.captions


def _as_tensors(
    transform: Callable[["Image.Image"], Tensor], example: Example
) -> tuple[Tensor, Example]:
    images = torch.stack([transform(image) for image in example.images])
    return images[0] if len(images) == 1 else images, example._replace(images=())


class _Evaluated(Dataset):
    """What `prepare` makes of each sample, or the SampleError."""

    def __init__(self, source: Source | ExampleSource, prepare: Callable[[Any], tuple]) -> None:
        self.source = source
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple | SampleError:
        try:
            sample = self.source[index]
        except SampleError as error:
            return error
        return self.prepare(sample)


def _in_order(
    source: Source | ExampleSource,
    prepare: Callable[[Any], tuple],
    batch_size: int,
    report: SkipReport | None,
    num_workers: int,
) -> Iterator[list[tuple]]:
    """What `prepare` makes of all samples that can be read, in batches."""
    check_not_empty("source", source)
    check("batch_size", batch_size, PositiveInt)
    check("num_workers", num_workers, Count)
    report = SkipReport(length=len(source)) if report is None else report
    options = worker_options(num_workers)
    dataset = _Evaluated(source, prepare)
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=list, **options)
    return _readable(loader, report)


def _readable(
    loader: Iterable[list[tuple | SampleError]], report: SkipReport
) -> Iterator[list[tuple]]:
    """The rows that could be read, batch by batch, the others counted."""
    found = False
    for rows in loader:
        errors = [row for row in rows if isinstance(row, SampleError)]
        readable = [row for row in rows if not isinstance(row, SampleError)]
        report.update([(error.id, error.reason) for error in errors], len(rows))
        if readable:
            found = True
            yield readable
    if not found:
        raise DataError(f"no readable sample: {report.summary()}")
