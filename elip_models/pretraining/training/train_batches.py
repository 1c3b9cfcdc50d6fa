"""The training batches of a process: next batch, position in the data, unreadable samples.

For a source of known samples the position is a function of the step, so that nothing is saved. For
a stream, a checkpoint contains for each process the next sample of each of its workers.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from elip_models.pretraining.data import (
    EpochSampler,
    ExampleSource,
    MixedSource,
    SkipReport,
    Source,
    StreamBatches,
    StreamSource,
    TrainingSamples,
    stream_loader,
    train_loader,
)
from elip_models.pretraining.models.config import VisionConfig
from elip_models.pretraining.training.run_config import RunConfig
from elip_models.pretraining.training.training_data import make_preparation
from elip_models.validation import ConfigError, TrainingError, as_config_error

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase


class TrainBatches(Protocol):
    """The infinite sequence of training batches of one process."""

    batches_per_epoch: int

    def start(self, batches_done: int, checkpoint: Path | None) -> None:
        """Set the position behind `batches_done` batches, after which `checkpoint` was written."""

    def next_batch(self) -> dict[str, Tensor]:
        """Return the next batch; raise DataError if too many samples cannot be read."""

    def save(self, folder: Path) -> None:
        """Write the part of the position that does not follow from the step."""

    def invariants(self) -> dict[str, int | list[int]]:
        """Return numbers that a resumed run must share, besides the recipe."""

    def summary(self) -> str:
        """Return a summary of the samples that could not be read."""


def make_train_batches(
    config: RunConfig,
    model: VisionConfig,
    source: Source | ExampleSource | StreamSource,
    tokenizer: "PreTrainedTokenizerBase",
    accelerator: "Accelerator",
) -> TrainBatches:
    """Return the batches of this process from the training data of a recipe.

    Data and settings that do not fit each other raise ConfigError.
    """
    with as_config_error("data"):
        prepare = make_preparation(config, model, source, tokenizer)
    batches = _StreamedBatches if isinstance(source, StreamSource) else _IndexedBatches
    return batches(config, source, prepare, accelerator.process_index, accelerator.num_processes)


class _IndexedBatches:
    def __init__(
        self,
        config: RunConfig,
        source: Source | ExampleSource,
        prepare: Any,
        rank: int,
        world_size: int,
    ) -> None:
        data, seed = config.data, config.seed
        with as_config_error("data"):
            dataset = TrainingSamples(source, prepare, seed=seed, max_bad_share=data.max_bad_share)
        with as_config_error("optim.batch_size"):
            self._sampler = EpochSampler(
                source.lengths if isinstance(source, MixedSource) else len(source),
                config.optim.batch_size,
                seed,
                rank=rank,
                world_size=world_size,
                weights=data.weights,
            )
        self._loader = train_loader(dataset, self._sampler, data.num_workers)
        self._skips = dataset.skip_report()
        self.batches_per_epoch = self._sampler.batches_per_epoch

    def start(self, batches_done: int, checkpoint: Path | None) -> None:
        self._sampler.set_position(*divmod(batches_done, self.batches_per_epoch))
        self._batches = iter(self._loader)

    def next_batch(self) -> dict[str, Tensor]:
        batch = next(self._batches)
        self._skips.update(batch["skipped"], len(batch["images"]))
        return _tensors(batch)

    def save(self, folder: Path) -> None:
        pass

    def invariants(self) -> dict[str, int | list[int]]:
        lengths = self._sampler.lengths
        return {"num_samples": list(lengths) if len(lengths) > 1 else self._sampler.length}

    def summary(self) -> str:
        return self._skips.summary()


class _StreamedBatches:
    def __init__(
        self, config: RunConfig, source: StreamSource, prepare: Any, rank: int, world_size: int
    ) -> None:
        data, batch_size = config.data, config.optim.batch_size
        with as_config_error("data.train", inner="spec"):
            self._stream = StreamBatches(
                source,
                prepare,
                batch_size,
                seed=config.seed,
                rank=rank,
                world_size=world_size,
                num_workers=data.num_workers,
            )
        self.batches_per_epoch = len(source) // (batch_size * world_size)
        if not self.batches_per_epoch:
            raise ConfigError(
                f"optim.batch_size: expected at most {len(source) // world_size}, the samples of "
                f"an epoch of the stream for each process, got {batch_size}"
            )
        self._source = source
        self._file = f"stream_{rank}.json"
        self._skips = SkipReport(data.max_bad_share)
        self._shards = SkipReport(data.max_bad_share, what="shards")

    def start(self, batches_done: int, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            positions = _read_positions(checkpoint / self._file, len(self._stream.positions))
            self._stream.positions = positions
        self._stream.done = batches_done
        self._positions = list(self._stream.positions)
        self._batches = iter(stream_loader(self._stream))

    def next_batch(self) -> dict[str, Tensor]:
        batch = next(self._batches)
        self._skips.update(batch["skipped"], len(batch["images"]) + len(batch["skipped"]))
        lost = [(name, problem) for name, problem in batch["shards"] if problem]
        self._shards.update(lost, len(batch["shards"]))
        self._positions[batch["worker"]] = batch["position"]
        return _tensors(batch)

    def save(self, folder: Path) -> None:
        (folder / self._file).write_text(json.dumps(self._positions), encoding="utf-8")

    def invariants(self) -> dict[str, int | list[int]]:
        return {
            "num_samples": len(self._source),
            "num_shards": len(self._source.shards),
            "num_workers": self._stream.num_workers,
        }

    def summary(self) -> str:
        summaries = [self._skips.summary()]
        if self._shards.reasons:
            summaries.append(self._shards.summary())
        return " ".join(summaries)


def _read_positions(path: Path, workers: int) -> list[tuple[int, int]]:
    """Return the position of each worker; raise TrainingError if the file has none."""
    try:
        positions = [(int(turn), int(place)) for turn, place in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError):
        positions = []
    if len(positions) != workers:
        raise TrainingError(
            f"{path}: expected the position of each of {workers} workers, got another content; "
            "remove this checkpoint to resume an older one"
        )
    return positions


def _tensors(batch: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}
