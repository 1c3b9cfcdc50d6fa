"""Data loaders with exact resuming: a batch depends on (seed, epoch, offset) only.

The order of an epoch is a permutation that depends on (seed, epoch). The caption and the crop of a
sample depend on (seed, turn, index), where the turn counts how often the sample was used before.
Neither the number of workers nor a restart changes a batch. An unreadable sample is replaced,
counted and reported.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from elip_models.images import SampleError
from elip_models.pretraining.data.checks import check_not_empty
from elip_models.pretraining.data.examples import Example, ExampleSource
from elip_models.pretraining.data.mixture import check_weights, epoch_positions, samples_per_epoch
from elip_models.pretraining.data.read_errors import DataError, SkipReport
from elip_models.pretraining.data.sample import Sample, Source
from elip_models.pretraining.data.training_samples import TrainingSamples
from elip_models.validation import ConfigError, Count, check

if TYPE_CHECKING:
    from PIL import Image

MAX_WORKERS = max(64, 4 * (os.cpu_count() or 1))
"""Largest number of worker processes of a loader: four for each CPU, and 64 on a small machine."""
_TOKENIZER_THREADS = "TOKENIZERS_PARALLELISM"


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of (turn, index) for one rank; without weights the turn is the epoch.

    A global batch has `world_size * batch_size` consecutive samples of the epoch's permutation over
    all sources; rank r takes the r-th part. The last, incomplete global batch of an epoch is
    dropped.

    Args:
        length: Number of samples, or that of each source of a `MixedSource`.
        batch_size: Samples of one rank in a batch.
        seed: Seed of the permutations.
        rank: Rank of this process.
        world_size: Number of processes.
        weights: How often the samples of each source appear in an epoch, such as 1, 2 or 0.5.

    Raises:
        ValueError: An epoch has no complete batch, or there is not one weight for each source.
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
        self.weights = check_weights(weights, len(self.lengths))
        self.samples = sum(map(samples_per_epoch, self.lengths, self.weights))
        if batch_size * world_size > self.samples:
            raise ValueError(
                f"batch_size: expected at most {self.samples // world_size} per rank "
                f"({self.samples} samples, {world_size} ranks), got {batch_size}"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.offset = 0

    @property
    def batches_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return self.samples // (self.batch_size * self.world_size)

    def set_position(self, epoch: int, offset: int) -> None:
        """Let the next iterator begin at batch `offset` of `epoch`."""
        batches = self.batches_per_epoch
        self.epoch, self.offset = divmod(epoch * batches + offset, batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, offset = self.epoch, self.offset
        while True:
            positions = epoch_positions(self.lengths, self.weights, self.seed, epoch)
            order = np.random.default_rng((self.seed, epoch)).permutation(self.samples)
            for batch in range(offset, self.batches_per_epoch):
                start = (batch * self.world_size + self.rank) * self.batch_size
                chosen = positions[order[start : start + self.batch_size]]
                yield [(turn, index) for turn, index in chosen.tolist()]
            epoch, offset = epoch + 1, 0


class WorkerLoader(DataLoader):
    """DataLoader that raises a DataError where one takes the place of a batch.

    `iter()` starts the worker processes, so that those of a run are forked before the threads of
    its progress bars and trackers. They tokenize in one thread, unless the environment sets this:
    the tokenizers library prints a warning in a process that is forked after parallel tokenization.
    """

    def __iter__(self) -> Iterator[Any]:
        is_set = _TOKENIZER_THREADS in os.environ
        os.environ.setdefault(_TOKENIZER_THREADS, "false")
        try:
            batches = super().__iter__()
        finally:
            if not is_set:
                os.environ.pop(_TOKENIZER_THREADS, None)
        return _without_errors(batches)


def _without_errors(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def worker_options(num_workers: int) -> dict[str, Any]:
    """Return the DataLoader arguments that all loaders share.

    Raises TypeError or ValueError unless `num_workers` is in [0, MAX_WORKERS].
    """
    check("num_workers", num_workers, Count)
    if num_workers > MAX_WORKERS:
        raise ConfigError(
            f"num_workers: expected at most {MAX_WORKERS} with the {os.cpu_count()} CPUs of this "
            f"machine, got {num_workers}"
        )
    return {
        "num_workers": num_workers,
        "pin_memory": torch.cuda.is_available(),
        # The loader draws a seed for its workers. A resumed run restores the global generator.
        "generator": torch.Generator(),
        "worker_init_fn": _ignore_interrupts if num_workers else None,
    }


def _ignore_interrupts(worker: int) -> None:
    """Ignore Ctrl-C and the first SIGTERM in a worker, so that the main process handles them.

    A terminal and Slurm send these signals to all processes. A second SIGTERM ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


class _ErrorsAsItems(Dataset):
    """Dataset that returns an error as the item; raised in a worker, only its text would arrive."""

    def __init__(
        self, items: Any, error: type[Exception], prepare: Callable[[Any], Any] | None = None
    ) -> None:
        self.items, self.error, self.prepare = items, error, prepare

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: Any) -> Any:
        try:
            item = self.items[position]
        except self.error as error:
            return error
        return item if self.prepare is None else self.prepare(item)


def train_loader(dataset: TrainingSamples, sampler: EpochSampler, num_workers: int) -> DataLoader:
    """Return a loader of endless batches, from the sampler's position at the time of `iter()`.

    A batch is {"images": (B, 3, S, S), "input_ids": (B, L), "attention_mask": (B, L), "skipped":
    list of (id, reason, index)}, with any other tensors of the samples. The number of workers
    changes no batch.
    """
    return WorkerLoader(
        _ErrorsAsItems(dataset, DataError),
        batch_sampler=sampler,
        collate_fn=_collate,
        **worker_options(num_workers),
    )


def _collate(samples: Sequence[dict[str, Any] | DataError]) -> dict[str, Any] | DataError:
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    skipped = [skip for sample in samples for skip in sample["skipped"]]
    return stack_tensors(samples) | {"skipped": skipped}


def stack_tensors(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the tensors of the samples, stacked by name."""
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
    """Yield every readable sample once, in order, in batches; the last one may be smaller.

    Args:
        source: Images with captions.
        transform: Maps an image to a tensor (3, S, S).
        batch_size: Images in a batch.
        report: Counts unreadable samples, which are left out. None: at most 5% are allowed.
        num_workers: Worker processes; 0 loads in this process.

    Raises:
        DataError: More samples are unreadable than `report` allows, or all of them.
    """
    prepare = partial(_with_captions, transform)
    for images, ids, captions, _ in _columns(source, prepare, batch_size, report, num_workers):
        yield EvaluationBatch(torch.stack(images), list(ids), list(captions))


class ExampleBatch(NamedTuple):
    """Images and examples (without their images) in the order of the source.

    The images are (B, 3, S, S), or (B, I, 3, S, S) if each example has I of them. `indices` are
    the places of the examples in the source.
    """

    images: Tensor
    examples: list[Example]
    indices: list[int]


def example_batches(
    source: ExampleSource,
    transform: Callable[["Image.Image"], Tensor],
    batch_size: int,
    *,
    report: SkipReport | None = None,
    num_workers: int = 0,
) -> Iterator[ExampleBatch]:
    """Yield every readable example once, as `evaluation_batches` does for samples."""
    prepare = partial(_as_tensors, transform)
    for images, examples, indices in _columns(source, prepare, batch_size, report, num_workers):
        yield ExampleBatch(torch.stack(images), list(examples), list(indices))


def _with_captions(
    transform: Callable[["Image.Image"], Tensor], sample: Sample
) -> tuple[Tensor, str, tuple[str, ...]]:
    return transform(sample.image), sample.id, sample.captions


def _as_tensors(
    transform: Callable[["Image.Image"], Tensor], example: Example
) -> tuple[Tensor, Example]:
    images = torch.stack([transform(image) for image in example.images])
    return images[0] if len(images) == 1 else images, example._replace(images=())


def _columns(
    source: Source | ExampleSource,
    prepare: Callable[[Any], tuple],
    batch_size: int,
    report: SkipReport | None,
    num_workers: int,
) -> Iterator[Iterator[tuple]]:
    """Yield the columns of each batch of readable samples: those of `prepare`, and the index."""
    check_not_empty("source", source)
    report = SkipReport(length=len(source)) if report is None else report
    dataset, options = _ErrorsAsItems(source, SampleError, prepare), worker_options(num_workers)
    first, is_readable = 0, False
    for rows in WorkerLoader(dataset, batch_size=batch_size, collate_fn=list, **options):
        skipped, readable = [], []
        for index, row in enumerate(rows, first):
            if isinstance(row, SampleError):
                skipped.append((row.id, row.reason, index))
            else:
                readable.append((*row, index))
        first += len(rows)
        report.update(skipped, len(rows))
        if readable:
            is_readable = True
            yield zip(*readable, strict=True)
    if not is_readable:
        raise DataError(f"no readable sample: {report.summary()}")
