"""The training batches of a process: next batch, position in the data, unreadable samples.

For a source of known samples the position is a function of the step, so that nothing is saved. For
a stream, a checkpoint contains for each process the next sample of each of its workers.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from elip_models.validation import ConfigError, as_config_error

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase


def make_train_batches(
    config: RunConfig,
    model: VisionConfig,
    source: Source | ExampleSource | StreamSource,
    tokenizer: "PreTrainedTokenizerBase",
    accelerator: "Accelerator",
) -> "TrainBatches":
    """Return the batches of this process from the training data of a recipe.

    Data and settings that do not fit each other raise ConfigError.
    """
    with as_config_error("data"):
        prepare = make_preparation(config, model, source, tokenizer)
    batches = _StreamedBatches if isinstance(source, StreamSource) else TrainBatches
    place = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    return batches(config, source, prepare, **place)


class TrainBatches:
    """The infinite sequence of training batches of one process.

    Attributes:
        batches_per_epoch: Number of batches of this process in an epoch.
    """

    _batches: Iterator[dict[str, Any]]

    def __init__(
        self, config: RunConfig, source: Any, prepare: Any, *, rank: int, world_size: int
    ) -> None:
        data = config.data
        with as_config_error("optim.batch_size"):
            self._sampler = EpochSampler(
                source.lengths if isinstance(source, MixedSource) else len(source),
                config.optim.batch_size,
                config.seed,
                rank=rank,
                world_size=world_size,
                weights=data.weights,
            )
        dataset = TrainingSamples(source, prepare, seed=config.seed)
        self._loader = train_loader(dataset, self._sampler, data.num_workers)
        self._skips = SkipReport(data.max_bad_share, length=len(source))
        self.batches_per_epoch = self._sampler.batches_per_epoch

    def start(self, batches_done: int, checkpoint: Path | None) -> None:
        """Set the position behind `batches_done` batches, after which `checkpoint` was written."""
        self._sampler.batches_done = batches_done
        self._batches = iter(self._loader)

    def next_batch(self) -> dict[str, Tensor]:
        """Return the next batch; raise DataError if too many samples cannot be read."""
        batch = next(self._batches)
        self._skips.update(batch.pop("skipped"), len(batch["images"]))
        return batch

    def save(self, folder: Path) -> None:
        """Write the part of the position that does not follow from the step."""

    def invariants(self) -> dict[str, int | list[int]]:
        """Return numbers that a resumed run must share, besides the recipe."""
        lengths = self._sampler.lengths
        return {"num_samples": list(lengths) if len(lengths) > 1 else lengths[0]}

    def summary(self) -> str:
        """Return a summary of the samples that could not be read."""
        return self._skips.summary()


class _StreamedBatches(TrainBatches):
    """The same from a stream, whose position is saved."""

    def __init__(
        self, config: RunConfig, source: StreamSource, prepare: Any, *, rank: int, world_size: int
    ) -> None:
        data, batch_size = config.data, config.optim.batch_size
        options = {"seed": config.seed, "num_workers": data.num_workers}
        with as_config_error("data.train", inner="spec"):
            self._stream = StreamBatches(
                source, prepare, batch_size, rank=rank, world_size=world_size, **options
            )
        self.batches_per_epoch = len(source) // (batch_size * world_size)
        if not self.batches_per_epoch:
            raise ConfigError(
                f"optim.batch_size: expected at most {len(source) // world_size}, the samples of "
                f"an epoch of the stream for each process, got {batch_size}"
            )
        self._file = f"stream_{rank}.json"
        self._skips = SkipReport(data.max_bad_share)
        self._shards = SkipReport(data.max_bad_share, what="shards")

    def start(self, batches_done: int, checkpoint: Path | None) -> None:
        self._positions = [(0, 0)] * self._stream.workers
        if checkpoint is not None:
            positions = json.loads((checkpoint / self._file).read_bytes())
            self._positions = [(turn, place) for turn, place in positions]
        self._batches = iter(stream_loader(self._stream, self._positions, batches_done))

    def next_batch(self) -> dict[str, Tensor]:
        batch = next(self._batches)
        skipped, shards = batch.pop("skipped"), batch.pop("shards")
        self._skips.update(skipped, len(batch["images"]) + len(skipped))
        self._shards.update([shard for shard in shards if shard[1]], len(shards))
        self._positions[batch.pop("worker")] = batch.pop("position")
        return batch

    def save(self, folder: Path) -> None:
        (folder / self._file).write_text(json.dumps(self._positions), encoding="utf-8")

    def invariants(self) -> dict[str, int | list[int]]:
        source, num_workers = self._stream.source, self._stream.num_workers
        shards = len(source.shards)
        return {"num_samples": len(source), "num_shards": shards, "num_workers": num_workers}

    def summary(self) -> str:
        shards = f" {self._shards.summary()}" if self._shards.reasons else ""
        return self._skips.summary() + shards
