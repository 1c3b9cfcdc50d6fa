"""Base classes of the tasks: `EvaluationTask` scores a model on data, `Task` also trains it.

A task is a frozen dataclass of its settings, in a file of its own. `registry` lists all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from elip_models.intervals import Interval
from elip_models.pretraining.data import (
    EvaluationBatch,
    ExampleSource,
    SkipReport,
    Source,
    apply_caption_rule,
    apply_seeded,
    evaluation_batches,
    image_transform,
    tokenize,
)
from elip_models.pretraining.models.base import eval_mode
from elip_models.pretraining.tasks.features import Progress, isolated_rng, no_progress
from elip_models.validation import check_fields

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

    from elip_models.pretraining.data import Example, Sample, StreamSource
    from elip_models.pretraining.models.base import PretrainedModel


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
        prefix = f"{self.task}_" if self.task else ""
        return {f"{prefix}{name}": score.mean for name, score in self.scores.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-compatible values."""
        scores = {name: score._asdict() for name, score in self.scores.items()}
        predictions = [prediction._asdict() for prediction in self.predictions]
        return {**vars(self), "scores": scores, "predictions": predictions}

    def summary(self) -> str:
        """Return one line with the means."""
        means = ", ".join(f"{name} {score.mean:.1%}" for name, score in self.scores.items())
        return f"{self.task}: {means}" if self.task else means


class EvaluationRun(NamedTuple):
    """What `EvaluationTask.score` reads: a model in eval mode, and batches of the data."""

    model: "PretrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    source: Source | ExampleSource
    batches: Iterator[EvaluationBatch]
    report: SkipReport  # complete after the last batch
    loading: Loading
    answers: Sequence[str] | None

    @property
    def device(self) -> torch.device:
        """Return the device of the model."""
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class EvaluationTask(ABC):
    """A measure of models on data; a subclass has its settings as fields, which are checked."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def open(self, spec: str, *, image_size: int) -> Source | ExampleSource:
        """Open the data that `spec` names; built-in images are drawn at `image_size`."""

    @abstractmethod
    def check(self, model: "PretrainedModel") -> None:
        """Raise ValueError, which names the argument, for a model without a score."""

    def samples(self, source: Source | ExampleSource) -> Source | ExampleSource:
        """Return what is read of the source."""
        return source

    @abstractmethod
    def score(self, run: EvaluationRun) -> TaskScores:
        """Score the model of a run; gradients are off, and the random state is restored."""

    def evaluate(
        self,
        model: "PretrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        source: Source | ExampleSource,
        loading: Loading = Loading(),  # noqa: B008
        answers: Sequence[str] | None = None,
    ) -> TaskScores:
        """Score a model in eval mode; its mode and the random state are restored.

        `answers` are all possible answers of the model, in the order of its outputs, as in its
        training data. None: those of `source`. Raises DataError if too many samples are unreadable,
        or if the number of answers is not that of the model's outputs.
        """
        samples = self.samples(source)
        report = SkipReport(loading.max_bad_share, length=len(samples))
        batches = evaluation_batches(
            samples,
            evaluation_transform(model),
            loading.batch_size,
            report=report,
            num_workers=loading.num_workers,
        )
        batches = _counted(batches, len(samples), loading.progress)
        run = EvaluationRun(model, tokenizer, source, batches, report, loading, answers)
        with eval_mode(model), torch.no_grad(), isolated_rng(run.device):
            scores = self.score(run)
        return replace(scores, num_skipped=len(report.reasons))


def _counted(
    batches: Iterator[EvaluationBatch], total: int, progress: Progress
) -> Iterator[EvaluationBatch]:
    """Yield batches, and report each one as done when the next one is requested."""
    done = 0
    progress("sample", done, total)
    for batch in batches:
        yield batch
        done += len(batch.images)
        progress("sample", done, total)


def evaluation_transform(model: "PretrainedModel") -> "Callable[[Image.Image], Tensor]":
    """Return the image transform for evaluation, from the config of the model."""
    config = model.config
    return image_transform(config.image_size, train=False, resize=config.resize)


@dataclass(frozen=True)
class Preprocessor:
    """Conversion of images and texts to tensors."""

    source: "Source | ExampleSource | StreamSource"
    transform: "Callable[[Image.Image], Tensor]"  # to (3, S, S); may draw from the CPU generator
    tokenizer: "PreTrainedTokenizerBase"
    model: Any  # the config of the model
    context_length: int

    def image(self, image: "Image.Image", rng: np.random.Generator) -> Tensor:
        """Return the image as (3, S, S); `rng` seeds the transform."""
        return apply_seeded(self.transform, image, rng)

    def text(self, text: str) -> dict[str, Tensor]:
        """Return "input_ids" and "attention_mask", (L,) int64 each, with L = `context_length`."""
        tokens = tokenize(self.tokenizer, [self.clean(text)], self.context_length)
        return {name: ids[0] for name, ids in tokens.items()}

    def clean(self, text: str) -> str:
        """Return the text by the rule of the model's config."""
        return apply_caption_rule(text, self.model.captions, self.model.max_words)


def image_with_caption(
    preprocessor: Preprocessor,
    sample: "Sample",
    index: int,
    rng: np.random.Generator,
    prompt: str = "",
) -> dict[str, Tensor]:
    """Return "images" (3, S, S) and the text of one of its captions, which begins with `prompt`."""
    caption = sample.captions[rng.integers(len(sample.captions))]
    return {"images": preprocessor.image(sample.image, rng), **preprocessor.text(prompt + caption)}


@dataclass(frozen=True)
class Task(EvaluationTask):
    """A downstream task: models are fine-tuned for it, and scored.

    `metrics` are the names of the scores, higher is better.
    """

    metrics: ClassVar[tuple[str, ...]]

    def check(self, model: "PretrainedModel") -> None:
        """Raise ValueError unless the model was trained for this task."""
        if model.task != self.name:
            kind = f"one for {model.task}" if model.task else "a pre-trained one"
            raise ValueError(
                f"model: expected a model trained by `elip finetune {self.name}`, got "
                f"{type(model).__name__}, {kind}"
            )

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
