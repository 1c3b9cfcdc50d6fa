"""Tasks whose answer is one of a few classes: `logits` of the model, and accuracy.

The classes are the answers of the source, in the order of the model's outputs.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from elip_models.data import Example, ExampleSource, example_batches
from elip_models.models.base import evaluating
from elip_models.tasks.intervals import bootstrap_interval
from elip_models.tasks.task import (
    Loading,
    Prediction,
    Reading,
    Task,
    TaskScores,
    evaluation_transform,
    skip_report,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.models.base import PretrainedModel


@dataclass(frozen=True)
class ClassTask(Task):
    """Base of these tasks. `reads_text`: the model's `logits` take a text too."""

    reads_text: ClassVar[bool] = True

    @abstractmethod
    def open(self, spec: str, *, image_size: int) -> ExampleSource: ...

    def fields(self, source: ExampleSource, config: Any) -> dict[str, Any]:
        return {"num_classes": len(source.answers)} if hasattr(config, "num_classes") else {}

    def sample(
        self, reading: Reading, example: Example, index: int, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        images = torch.stack([reading.image(image, rng) for image in example.images])
        found = {"images": images[0] if len(images) == 1 else images}
        if self.reads_text:
            found |= reading.text(example.text)
        return found | self.targets(reading, example)

    def targets(self, reading: Reading, example: Example) -> dict[str, Tensor]:
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
    ) -> TaskScores:
        report = skip_report(source, loading.max_bad_share)
        batches = example_batches(
            source,
            evaluation_transform(model),
            loading.batch_size,
            report=report,
            num_workers=loading.num_workers,
        )
        examples: list[Example] = []
        chosen: list[int] = []
        with evaluating(model), torch.no_grad():
            device = next(model.parameters()).device
            choose = self.chooser(model, tokenizer, source.answers)
            for batch in batches:
                inputs = {"images": batch.images}
                if self.reads_text:
                    inputs |= model.tokenise(tokenizer, [each.text for each in batch.examples])
                inputs = {name: value.to(device) for name, value in inputs.items()}
                chosen += choose(**inputs).tolist()
                examples += batch.examples
        return self._scores(source.answers, examples, chosen, num_skipped=len(report.reasons))

    def _scores(
        self,
        answers: Sequence[str],
        examples: Sequence[Example],
        chosen: Sequence[int],
        *,
        num_skipped: int,
    ) -> TaskScores:
        """An answer is as right as its example says that it counts."""
        said = [answers[number] for number in chosen]
        right = [each.answers.get(text, 0.0) for each, text in zip(examples, said, strict=True)]
        heaviest = Counter(max(each.answers, key=each.answers.get) for each in examples)
        always = heaviest.most_common(1)[0][0]
        ids = [each.id for each in examples]
        return TaskScores(
            task=self.name,
            scores={"accuracy": bootstrap_interval(right)},
            baselines={
                "chance": {"accuracy": 1 / len(answers)},
                "majority": {"accuracy": fmean(each.answers.get(always, 0.0) for each in examples)},
            },
            num_examples=len(examples),
            num_skipped=num_skipped,
            predictions=tuple(map(Prediction, ids, said, right)),
        )
