"""Base class of a downstream task: its data, its training samples, and its evaluation.

A task is a frozen dataclass of its settings, in a file of its own. `registry.TASKS` lists all
tasks.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from elip_models.intervals import Interval
from elip_models.pretraining.data import (
    ExampleSource,
    SkipReport,
    Source,
    apply_caption_rule,
    apply_seeded,
    image_transform,
)
from elip_models.pretraining.data.training_samples import tokenize_text
from elip_models.saving.files import write_file
from elip_models.validation import check_fields

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

    from elip_models.pretraining.data import Example, Sample
    from elip_models.pretraining.models.base import PretrainedModel


Progress = Callable[[str, int, int], object]
"""Called with what is counted, such as "sample", how many of them are done, and their number."""


def no_progress(unit: str, done: int, total: int) -> None:
    """Show nothing."""


class Loading(NamedTuple):
    """How evaluation reads data; `batch_size` images are in one forward pass."""

    batch_size: int = 64
    num_workers: int = 0
    max_bad_share: float = 0.05
    progress: Progress = no_progress


class Prediction(NamedTuple):
    """The output of a model for one example, and its score, or None if the answer is unknown."""

    id: str
    output: str
    score: float | None


@dataclass(frozen=True)
class TaskScores:
    """Scores of a model on a task."""

    task: str
    scores: dict[str, Interval]  # mean over the examples, by metric
    baselines: dict[str, dict[str, float]]  # by name and metric: {"chance": {"accuracy": 0.5}}
    num_examples: int  # scored ones
    num_skipped: int = 0  # examples that could not be read
    predictions: tuple[Prediction, ...] = field(default=(), repr=False)  # of each example, in order
    notes: dict[str, str] = field(default_factory=dict)  # other facts that the scores depend on

    @property
    def metrics(self) -> dict[str, float]:
        """Means by name, for logs."""
        return {f"{self.task}_{name}": found.mean for name, found in self.scores.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-compatible values."""
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
        """Write `as_dict` as JSON, atomically."""
        write_file(path, (json.dumps(self.as_dict(), indent=2) + "\n").encode())
        return path

    def summary(self) -> str:
        """Return one line with the means."""
        means = (f"{name} {found.mean:.1%}" for name, found in self.scores.items())
        return f"{self.task}: {', '.join(means)}"


@dataclass(frozen=True)
class Preprocessor:
    """Conversion of images and texts to tensors."""

    source: Source | ExampleSource
    transform: "Callable[[Image.Image], Tensor]"  # to (3, S, S); may draw from the CPU generator
    tokenizer: "PreTrainedTokenizerBase"
    model: Any  # the config of the model
    context_length: int

    def image(self, image: "Image.Image", rng: np.random.Generator) -> Tensor:
        """Return the image as (3, S, S); `rng` seeds the transform."""
        return apply_seeded(self.transform, image, rng)

    def text(self, text: str) -> dict[str, Tensor]:
        """Return "input_ids" and "attention_mask", (L,) int64 each, with L = `context_length`."""
        return tokenize_text(self.clean(text), self.tokenizer, self.context_length)

    def clean(self, text: str) -> str:
        """Return the text by the rule of the model's config."""
        return apply_caption_rule(text, self.model.captions, self.model.max_words)


@dataclass(frozen=True)
class Task(ABC):
    """Base of the tasks; a subclass has its settings as fields, which are checked.

    `metrics` are the names of the scores, higher is better.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def open(self, spec: str, *, image_size: int) -> Source | ExampleSource:
        """Open the data that `spec` names; built-in images are drawn at `image_size`."""

    def fields(self, source: Source | ExampleSource, config: Any) -> dict[str, Any]:
        """Return the fields that the training data adds to the model's `config`."""
        return {}

    def training_source(
        self, source: Source | ExampleSource, config: Any
    ) -> Source | ExampleSource:
        """Return the samples of `source` that a model with this `config` is trained on."""
        return source

    @abstractmethod
    def sample(
        self,
        preprocessor: Preprocessor,
        sample: "Sample | Example",
        index: int,
        rng: np.random.Generator,
    ) -> dict[str, Tensor]:
        """Return the model's arguments for one sample: no batch dimension, always equal shapes."""

    @abstractmethod
    def evaluate(
        self,
        model: "PretrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        source: Source | ExampleSource,
        loading: Loading,
        answers: Sequence[str] | None = None,
    ) -> TaskScores:
        """Score a model in eval mode; its mode and the random state are restored.

        `answers` are all possible answers of the model, in the order of its outputs, as in its
        training data. None: those of `source`. Raises DataError if too many samples are unreadable,
        or if the number of answers is not that of the model's outputs.
        """


def evaluation_transform(model: "PretrainedModel") -> "Callable[[Image.Image], Tensor]":
    """Return the image transform for evaluation, from the config of the model."""
    config = model.config
    return image_transform(config.image_size, train=False, resize=config.resize)


def read_all(
    batches: Callable[..., Iterator[Any]],
    model: "PretrainedModel",
    source: Source | ExampleSource,
    loading: Loading,
) -> tuple[Iterator[Any], SkipReport]:
    """Return batches of the whole source, and the report of what cannot be read.

    `batches` is `evaluation_batches` or `example_batches`. The report is complete after the last
    batch.
    """
    report = SkipReport(loading.max_bad_share, length=len(source))
    options = {"report": report, "num_workers": loading.num_workers}
    found = batches(source, evaluation_transform(model), loading.batch_size, **options)
    return _counted(found, len(source), loading.progress), report


def _counted(batches: Iterator[Any], total: int, progress: Progress) -> Iterator[Any]:
    """Yield batches, and report when the next one is requested that a batch is done."""
    done = 0
    progress("sample", done, total)
    for batch in batches:
        yield batch
        done += len(batch.images)
        progress("sample", done, total)
