"""Tasks whose answer is one of several classes: `logits` of the model, and accuracy.

The classes are the answers of the source, in the order of the model's outputs. Intervals are over
images, see `intervals`. The first of equal logits is the prediction.
Source: SNLI-VE (Xie et al., 2019); NLVR2 (Suhr et al., 2019).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from elip_models.intervals import score_interval
from elip_models.pretraining.data import (
    DataError,
    Example,
    ExampleSource,
    open_examples,
)
from elip_models.pretraining.data.samples import image_number
from elip_models.pretraining.tasks.task import (
    EvaluationRun,
    Prediction,
    Preprocessor,
    Task,
    TaskScores,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.pretraining.models.base import PretrainedModel

SWAPPED_WORDS = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class ClassTask(Task):
    """Base of the tasks with classes. `reads_text`: the model's `logits` also take a text."""

    reads_text: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def accuracy(self, answers: dict[str, float], predicted: str) -> float:
        """Return the score in [0, 1] of a predicted answer, given the answers of an example."""
        return answers.get(predicted, 0.0)

    def outputs(self, answers: Sequence[str], source: ExampleSource) -> list[int]:
        """Return the outputs of a classifier that are compared, as indices of `answers`."""
        return list(range(len(answers)))

    def open(self, spec: str, *, image_size: int) -> ExampleSource:
        """Open the examples that `spec` names."""
        return open_examples(self.name, spec, image_size=image_size)

    def fields(self, source: ExampleSource, config: Any) -> dict[str, Any]:
        """Return the number of classes, if the model's config has one."""
        return {"num_classes": len(source.answers)} if hasattr(config, "num_classes") else {}

    def sample(
        self, preprocessor: Preprocessor, example: Example, index: int, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Return the images, the text and the targets of an example."""
        images = torch.stack([preprocessor.image(image, rng) for image in example.images])
        tensors = {"images": images[0] if len(images) == 1 else images}
        if self.reads_text:
            tensors |= preprocessor.text(example.text)
        return tensors | self.targets(preprocessor, example)

    def targets(self, preprocessor: Preprocessor, example: Example) -> dict[str, Tensor]:
        """Return the targets of the loss: here the index of the answer with the largest weight."""
        best = max(example.answers, key=example.answers.get)
        return {"labels": torch.tensor(preprocessor.source.answers.index(best))}

    def predictor(
        self,
        model: "PretrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        answers: Sequence[str],
        outputs: Sequence[int],
    ) -> Callable[..., Tensor]:
        """Return a function of images and texts that returns answer indices (B,) int64."""
        columns = torch.tensor(outputs, device=next(model.parameters()).device)
        return lambda **inputs: columns[model.logits(**inputs)[:, columns].argmax(1)]

    def score(self, run: EvaluationRun) -> TaskScores:
        """Return the mean accuracy of the predicted answers; examples without one are left out.

        The baselines are a random answer and the most frequent one.
        """
        model, source = run.model, run.source
        answers = run.answers or _source_answers(source, getattr(model.config, "num_classes", None))
        outputs = self.outputs(answers, source)
        predict = self.predictor(model, run.tokenizer, answers, outputs)
        examples: list[Example] = []
        images: list[int] = []
        predicted: list[str] = []
        for batch in run.batches:
            inputs = {"images": batch.images}
            if self.reads_text:
                texts = [example.text for example in batch.samples]
                inputs |= model.tokenise(run.tokenizer, texts)
            inputs = {name: value.to(run.device) for name, value in inputs.items()}
            predicted += [answers[number] for number in predict(**inputs).tolist()]
            examples += batch.samples
            images += [image_number(source, index) for index in batch.indices]
        possible = [answers[number] for number in outputs]
        majority = _most_frequent([e.answers for e in examples if e.answers], possible)
        predictions, scores, of_majority, clusters = [], [], [], []
        for example, image, text in zip(examples, images, predicted, strict=True):
            score = self.accuracy(example.answers, text) if example.answers else None
            predictions.append(Prediction(example.id, text, score))
            if score is not None:
                scores.append(score)
                of_majority.append(self.accuracy(example.answers, majority))
                clusters.append(image)
        baselines = {"chance": 1 / len(possible), "majority": fmean(of_majority)}
        return TaskScores(
            self.name,
            {"accuracy": score_interval(scores, clusters)},
            {name: {"accuracy": share} for name, share in baselines.items()},
            num_examples=len(scores),
            predictions=tuple(predictions),
        )


def _most_frequent(known: Sequence[dict[str, float]], answers: Sequence[str]) -> str:
    """Return the most frequent answer; raise DataError if none is among the possible `answers`."""
    if not known:
        raise DataError("examples: expected answers, got none; use data with answers")
    if set(answers).isdisjoint(answer for weights in known for answer in weights):
        raise DataError(
            f"answers: expected some among the {len(answers)} of the model, such as "
            f"{answers[0]!r}, got none of them, but {next(iter(known[0]))!r}; use other data"
        )
    heaviest = Counter(max(weights, key=weights.get) for weights in known)
    return heaviest.most_common(1)[0][0]


def _source_answers(source: ExampleSource, outputs: int | None) -> tuple[str, ...]:
    """Return the answers of the source; raise DataError unless the model has as many outputs."""
    if outputs not in (None, len(source.answers)):
        raise DataError(
            f"answers: expected {outputs}, one for each output of the model in its order, got the "
            f"{len(source.answers)} of the data; pass those in answers.json in the folder that "
            "`elip finetune` wrote"
        )
    return source.answers


@dataclass(frozen=True)
class Classification(ClassTask):
    """Image classification with a linear probe or a fully fine-tuned image tower.

    Only the classes of the data are compared: for ImageNet-R, 200 of the 1,000 outputs.
    """

    name: ClassVar[str] = "classification"
    reads_text: ClassVar[bool] = False

    def outputs(self, answers: Sequence[str], source: ExampleSource) -> list[int]:
        """Return the outputs of the classes of the source, as indices of `answers`."""
        classes = set(source.answers)
        numbers = [number for number, answer in enumerate(answers) if answer in classes]
        return numbers or super().outputs(answers, source)


@dataclass(frozen=True)
class Entailment(ClassTask):
    """Visual entailment: an image entails a hypothesis, contradicts it, or neither."""

    name: ClassVar[str] = "entailment"


@dataclass(frozen=True)
class NLVR2(ClassTask):
    """Statements about two images, which are true or false.

    Args:
        swap_images: In training, reverse the images of every second example at random, and swap
            "left" and "right" in its statement. BLIP does so.
    """

    name: ClassVar[str] = "nlvr2"
    swap_images: bool = False

    def sample(
        self, preprocessor: Preprocessor, example: Example, index: int, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        if self.swap_images and rng.random() < 0.5:
            words = preprocessor.clean(example.text).split(" ")
            text = " ".join(SWAPPED_WORDS.get(word, word) for word in words)
            example = example._replace(images=example.images[::-1], text=text)
        return super().sample(preprocessor, example, index, rng)
