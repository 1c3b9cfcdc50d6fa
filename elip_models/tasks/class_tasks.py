"""Tasks whose answer is one of several classes: `logits` of the model, and accuracy.

The classes are the answers of the source, in the order of the model's outputs.
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

from elip_models.data import DataError, Example, ExampleSource, example_batches, open_examples
from elip_models.models.base import eval_mode
from elip_models.tasks.features import isolated_rng
from elip_models.tasks.intervals import bootstrap_interval
from elip_models.tasks.task import Loading, Prediction, Preprocessor, Task, TaskScores, read_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.models.base import PretrainedModel


@dataclass(frozen=True)
class ClassTask(Task):
    """Base of the tasks with classes. `reads_text`: the model's `logits` also take a text."""

    reads_text: ClassVar[bool] = True

    def answer_scores(self, answers: dict[str, float]) -> dict[str, float]:
        """Return the score of each answer of an example, in [0, 1]."""
        return answers

    def normalise(self, answer: str) -> str:
        """Return an answer in the form in which answers are compared, in `answer_scores` too."""
        return answer

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
        found = {"images": images[0] if len(images) == 1 else images}
        if self.reads_text:
            found |= preprocessor.text(example.text)
        return found | self.targets(preprocessor, example)

    def targets(self, preprocessor: Preprocessor, example: Example) -> dict[str, Tensor]:
        """Return the targets of the loss: here the index of the answer with the largest weight."""
        best = max(example.answers, key=example.answers.get)
        return {"labels": torch.tensor(preprocessor.source.answers.index(best))}

    def predictor(
        self, model: "PretrainedModel", tokenizer: "PreTrainedTokenizerBase", answers: Sequence[str]
    ) -> Callable[..., Tensor]:
        """Return a function of images and texts that returns answer indices (B,) int64."""
        return lambda **inputs: model.logits(**inputs)[:, : len(answers)].argmax(1)

    def evaluate(
        self,
        model: "PretrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        source: ExampleSource,
        loading: Loading,
        answers: Sequence[str] | None = None,
    ) -> TaskScores:
        """Score the predicted answers; see `Task.evaluate`."""
        if answers is None:
            answers = _source_answers(source, getattr(model.config, "num_classes", None))
        batches, report = read_all(example_batches, model, source, loading)
        examples: list[Example] = []
        chosen: list[int] = []
        device = next(model.parameters()).device
        with eval_mode(model), torch.no_grad(), isolated_rng(device):
            predict = self.predictor(model, tokenizer, answers)
            for batch in batches:
                inputs = {"images": batch.images}
                if self.reads_text:
                    inputs |= model.tokenise(tokenizer, [each.text for each in batch.examples])
                inputs = {name: value.to(device) for name, value in inputs.items()}
                chosen += predict(**inputs).tolist()
                examples += batch.examples
        return self._scores(answers, examples, chosen, num_skipped=len(report.reasons))

    def _scores(
        self,
        answers: Sequence[str],
        examples: Sequence[Example],
        chosen: Sequence[int],
        *,
        num_skipped: int,
    ) -> TaskScores:
        """Return the mean of `answer_scores`; examples without answers are left out."""
        predicted = [answers[number] for number in chosen]
        targets = [self.answer_scores(each.answers) for each in examples]
        scores = [
            each.get(self.normalise(text), 0.0) if each else None
            for each, text in zip(targets, predicted, strict=True)
        ]
        known = [each for each in targets if each]
        if not known:
            raise DataError("examples: expected answers, got none; use data with answers")
        if not any(each.keys() & set(map(self.normalise, answers)) for each in known):
            raise DataError(
                f"answers: expected some among the {len(answers)} of the model, such as "
                f"{answers[0]!r}, got none of them, but {next(iter(known[0]))!r}; use other data"
            )
        heaviest = Counter(max(each, key=each.get) for each in known)
        always = heaviest.most_common(1)[0][0]
        return TaskScores(
            task=self.name,
            scores={"accuracy": bootstrap_interval([s for s in scores if s is not None])},
            baselines={
                "chance": {"accuracy": 1 / len(answers)},
                "majority": {"accuracy": fmean(each.get(always, 0.0) for each in known)},
            },
            num_examples=len(known),
            num_skipped=num_skipped,
            predictions=tuple(map(Prediction, (each.id for each in examples), predicted, scores)),
        )


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
    """Image classification with a linear probe or a fully fine-tuned image tower."""

    name: ClassVar[str] = "classification"
    reads_text: ClassVar[bool] = False


@dataclass(frozen=True)
class Entailment(ClassTask):
    """Visual entailment: an image entails a hypothesis, contradicts it, or neither."""

    name: ClassVar[str] = "entailment"


@dataclass(frozen=True)
class NLVR2(ClassTask):
    """Statements about two images, which are true or false."""

    name: ClassVar[str] = "nlvr2"
