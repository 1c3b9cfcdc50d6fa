"""Tasks whose answer is one of a few classes: `logits` of the model, and accuracy.

The classes are the answers of the source, in the order of the model's outputs.
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
from elip_models.tasks.task import (
    Loading,
    Prediction,
    SampleReader,
    Task,
    TaskScores,
    read_all,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.models.base import PretrainedModel


@dataclass(frozen=True)
class ClassTask(Task):
    """Base of these tasks. `reads_text`: the model's `logits` take a text too."""

    reads_text: ClassVar[bool] = True

    def worth(self, answers: dict[str, float]) -> dict[str, float]:
        """How right each answer of an example is, in [0, 1]."""
        return answers

    def written(self, answer: str) -> str:
        """How an answer is written where answers are compared, in `worth` too."""
        return answer

    def open(self, spec: str, *, image_size: int) -> ExampleSource:
        return open_examples(self.name, spec, image_size=image_size)

    def fields(self, source: ExampleSource, config: Any) -> dict[str, Any]:
        return {"num_classes": len(source.answers)} if hasattr(config, "num_classes") else {}

    def sample(
        self, reading: SampleReader, example: Example, index: int, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        images = torch.stack([reading.image(image, rng) for image in example.images])
        found = {"images": images[0] if len(images) == 1 else images}
        if self.reads_text:
            found |= reading.text(example.text)
        return found | self.targets(reading, example)

    def targets(self, reading: SampleReader, example: Example) -> dict[str, Tensor]:
        """What the loss compares with: here the number of the heaviest answer."""
        best = max(example.answers, key=example.answers.get)
        return {"labels": torch.tensor(reading.source.answers.index(best))}

    def chooser(
        self, model: "PretrainedModel", tokenizer: "PreTrainedTokenizerBase", answers: Sequence[str]
    ) -> Callable[..., Tensor]:
        """A function of images and texts -> (B,) int64, the numbers of the answers chosen."""
        return lambda **inputs: model.logits(**inputs)[:, : len(answers)].argmax(1)

    def evaluate(
        self,
        model: "PretrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        source: ExampleSource,
        loading: Loading,
        answers: Sequence[str] | None = None,
    ) -> TaskScores:
        if answers is None:
            answers = _all_of(source, getattr(model.config, "num_classes", None))
        batches, report = read_all(example_batches, model, source, loading)
        examples: list[Example] = []
        chosen: list[int] = []
        device = next(model.parameters()).device
        with eval_mode(model), torch.no_grad(), isolated_rng(device):
            choose = self.chooser(model, tokenizer, answers)
            for batch in batches:
                inputs = {"images": batch.images}
                if self.reads_text:
                    inputs |= model.tokenise(tokenizer, [each.text for each in batch.examples])
                inputs = {name: value.to(device) for name, value in inputs.items()}
                chosen += choose(**inputs).tolist()
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
        """An answer is as right as `worth` says; examples without answers are not judged."""
        said = [answers[number] for number in chosen]
        worth = [self.worth(each.answers) for each in examples]
        scores = [
            each.get(self.written(text), 0.0) if each else None
            for each, text in zip(worth, said, strict=True)
        ]
        right, known = [s for s in scores if s is not None], [each for each in worth if each]
        if not known:
            raise DataError("no example says what is right: expected answers, got none")
        if not any(each.keys() & set(map(self.written, answers)) for each in known):
            raise DataError(
                f"expected answers among the {len(answers)} that the model chooses from, such as "
                f"{answers[0]!r}, got none of them, but {next(iter(known[0]))!r}"
            )
        heaviest = Counter(max(each, key=each.get) for each in known)
        always = heaviest.most_common(1)[0][0]
        return TaskScores(
            task=self.name,
            scores={"accuracy": bootstrap_interval(right)},
            baselines={
                "chance": {"accuracy": 1 / len(answers)},
                "majority": {"accuracy": fmean(each.get(always, 0.0) for each in known)},
            },
            num_examples=len(right),
            num_skipped=num_skipped,
            predictions=tuple(map(Prediction, (each.id for each in examples), said, scores)),
        )


def _all_of(source: ExampleSource, outputs: int | None) -> tuple[str, ...]:
    """The answers of the source; DataError where a model has another number of outputs."""
    if outputs not in (None, len(source.answers)):
        raise DataError(
            f"answers: expected {outputs}, one for each output of the model in its order, got the "
            f"{len(source.answers)} of the data; those that it learned stand in answers.json in "
            "the folder that `elip finetune` left"
        )
    return source.answers
