"""What all loaders share, and the loaders of evaluation, which read every sample once, in order."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from elip_models.images import SampleError
from elip_models.pretraining.data.read_errors import DataError, SkipReport
from elip_models.pretraining.data.samples import Example, ExampleSource, Sample, Source

_TOKENIZER_THREADS = "TOKENIZERS_PARALLELISM"
GRACE_SECONDS = 20


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
    """Return the DataLoader arguments that all loaders share."""
    return {
        "num_workers": num_workers,
        "pin_memory": torch.cuda.is_available(),
        # The loader draws a seed for its workers. A resumed run restores the global generator.
        "generator": torch.Generator(),
        "worker_init_fn": _ignore_interrupts if num_workers else None,
    }


def _ignore_interrupts(worker: int) -> None:
    """Ignore Ctrl-C and the first SIGTERM in a worker, so that the main process handles them.

    A terminal and Slurm send these signals to all processes. A second SIGTERM ends the worker
    `GRACE_SECONDS` later: the main process may not have noticed it, because it handles two that
    arrive during one operation of PyTorch as one.
    """

    def end_later(*_: object) -> None:
        signal.alarm(GRACE_SECONDS)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, end_later))


def stack_tensors(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the tensors of the samples, stacked by name."""
    names = [name for name, value in samples[0].items() if isinstance(value, Tensor)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in names}


class EvaluationBatch(NamedTuple):
    """Images and samples, or examples, without their images, in the order of the source.

    The images are (B, 3, S, S), or (B, I, 3, S, S) if each example has I of them. `indices` are
    the places of the samples in the source.
    """

    images: Tensor
    samples: list[Sample] | list[Example]
    indices: list[int]


@dataclass(eq=False)
class _Prepared(Dataset):
    """Images as tensors, each with its sample or example without images, or with its error.

    An error is returned, since only the text of one that is raised in a worker would arrive.
    """

    source: Source | ExampleSource
    transform: Callable[[Image.Image], Tensor]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor | None, Sample | Example | SampleError]:
        try:
            item = self.source[index]
        except SampleError as error:
            return None, error
        if isinstance(item, Sample):
            return self.transform(item.image), item._replace(image=None)
        images = torch.stack([self.transform(image) for image in item.images])
        return images[0] if len(images) == 1 else images, item._replace(images=())


def evaluation_batches(
    source: Source | ExampleSource,
    transform: Callable[[Image.Image], Tensor],
    batch_size: int,
    *,
    report: SkipReport | None = None,
    num_workers: int = 0,
) -> Iterator[EvaluationBatch]:
    """Yield every readable sample once, in order, in batches; the last one may be smaller.

    Args:
        source: Images with captions, or examples.
        transform: Maps an image to a tensor (3, S, S).
        batch_size: Samples in a batch.
        report: Counts unreadable samples, which are left out. None: at most 5% are allowed.
        num_workers: Worker processes; 0 loads in this process.

    Raises:
        DataError: More samples are unreadable than `report` allows, or all of them.
    """
    report = SkipReport(length=len(source)) if report is None else report
    dataset, options = _Prepared(source, transform), worker_options(num_workers)
    first, is_readable = 0, False
    for rows in WorkerLoader(dataset, batch_size=batch_size, collate_fn=list, **options):
        skipped, readable = [], []
        for index, (images, item) in enumerate(rows, first):
            if isinstance(item, SampleError):
                skipped.append((item.id, item.reason, index))
            else:
                readable.append((images, item, index))
        first += len(rows)
        report.update(skipped, len(rows))
        if readable:
            is_readable = True
            images, samples, indices = zip(*readable, strict=True)
            yield EvaluationBatch(torch.stack(images), list(samples), list(indices))
    if not is_readable:
        raise DataError(f"no readable sample: {report.summary()}")
