"""What a downstream task is: its data, what a training sample holds, how a model is scored.

A task is a frozen dataclass of its settings in a file of its own; `tasks/__init__.py` names them.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from elip_models.data import (
    ExampleSource,
    SkipReport,
    Source,
    apply_caption_rule,
    apply_seeded,
    image_transform,
    tokenize,
)
from elip_models.models.io.files import write_file
from elip_models.tasks.intervals import Interval
from elip_models.validation import check_fields

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

    from elip_models.data import Example, Sample
    from elip_models.models.base import PretrainedModel


class Loading(NamedTuple):
    """How evaluation reads: images a forward pass, loader processes, unreadable at most."""

    batch_size: int = 64
    num_workers: int = 0
    max_bad_share: float = 0.05


class Prediction(NamedTuple):
    """What a model said of an example, and how right that is; None where nobody knows."""

    id: str
    said: str
    score: float | None


@dataclass(frozen=True)
class TaskScores:
    """How well a model does a task.

    Args:
        task: its name.
        scores: by metric, over the examples, with its interval.
        baselines: what else would reach, by its name and by metric: {"chance": {"accuracy": 0.5}}.
        num_examples: scored.
        num_skipped: that could not be read.
        predictions: of each example, in order.
        notes: what else the scores depend on, by its name.
    """

    task: str
    scores: dict[str, Interval]
    baselines: dict[str, dict[str, float]]
    num_examples: int
    num_skipped: int = 0
    predictions: tuple[Prediction, ...] = field(default=(), repr=False)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """What a log shows."""
        return {f"{self.task}_{name}": found.mean for name, found in self.scores.items()}

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return {
            "task": self.task,
            "scores": {name: found._asdict() for name, found in self.scores.items()},
            "baselines": self.baselines,
            "num_examples": self.num_examples,
            "num_skipped": self.num_skipped,
            "notes": self.notes,
            "predictions": [each._asdict() for each in self.predictions],
        }

    def write(self, path: Path) -> Path:
        """Write `as_dict`, whole or not at all."""
        write_file(path, (json.dumps(self.as_dict(), indent=2) + "\n").encode())
        return path

    def summary(self) -> str:
        """The means, in words."""
        means = (f"{name} {found.mean:.1%}" for name, found in self.scores.items())
        return f"{self.task}: {', '.join(means)}"


@dataclass(frozen=True)
class SampleReader:
    """How images and texts become tensors.

    source: what samples come from. transform: of an image -> (3, S, S), may draw by torch's CPU
    generator. tokenizer: of the model, whose config is `model`. context_length: tokens of a text.
    """

    source: Source | ExampleSource
    transform: "Callable[[Image.Image], Tensor]"
    tokenizer: "PreTrainedTokenizerBase"
    model: Any
    context_length: int

    def image(self, image: "Image.Image", rng: np.random.Generator) -> Tensor:
        """-> (3, S, S), what the transform draws seeded by `rng`."""
        return apply_seeded(self.transform, image, rng)

    def text(self, text: str) -> dict[str, Tensor]:
        """-> input_ids and attention_mask, (L,) int64 each, L = `context_length`."""
        ruled = apply_caption_rule(text, self.model.captions)
        tokens = tokenize(self.tokenizer, [ruled], self.context_length)
        return {name: ids[0] for name, ids in tokens.items()}


@dataclass(frozen=True)
class Task(ABC):
    """Base of the tasks; a subclass has its settings as fields.

    Raises:
        TypeError, ValueError: a setting of another type, or out of range.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def open(self, spec: str, *, image_size: int) -> Source | ExampleSource:
        """Open the data that `spec` names; built-in worlds are drawn at `image_size`."""

    def fields(self, source: Source | ExampleSource, config: Any) -> dict[str, Any]:
        """The fields of the model's config that follow from the training data; `config` is it
        without them.
        """
        return {}

    @abstractmethod
    def sample(
        self,
        reading: SampleReader,
        sample: "Sample | Example",
        index: int,
        rng: np.random.Generator,
    ) -> dict[str, Tensor]:
        """What the model's forward takes of one sample, without the batch dim, always of the same
        shapes.
        """

    @abstractmethod
    def evaluate(
        self,
        model: "PretrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        source: Source | ExampleSource,
        loading: Loading,
        answers: Sequence[str] | None = None,
    ) -> TaskScores:
        """Score a model, which is put in eval mode and back; the state of the random generators is
        untouched.

        Args:
            answers: all that the model can answer, in the order of its outputs: those of the data
                that it learned from. None: those of `source`.

        Raises:
            DataError: too many samples cannot be read, or all; or other answers than the model
                tells apart.
        """


def evaluation_transform(model: "PretrainedModel") -> "Callable[[Image.Image], Tensor]":
    """What a model of ours is shown of an image in evaluation."""
    config = model.config
    return image_transform(config.image_size, train=False, resize=config.resize)


def read_all(
    batches: Callable[..., Iterator[Any]],
    model: "PretrainedModel",
    source: Source | ExampleSource,
    loading: Loading,
) -> tuple[Iterator[Any], SkipReport]:
    """All of a source as the model sees it, by `evaluation_batches` or `example_batches`, and the
    report of what cannot be read, which fills as they pass.
    """
    report = SkipReport(loading.max_bad_share, length=len(source))
    options = {"report": report, "num_workers": loading.num_workers}
    return batches(source, evaluation_transform(model), loading.batch_size, **options), report
