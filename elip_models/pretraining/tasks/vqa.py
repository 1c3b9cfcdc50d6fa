"""Visual question answering, with generated and ranked answers or with classes.

ALBEF and BLIP learn to generate each answer of a question, weighted. They rank the answers of a
list: the `candidates` whose first token is most likely, by the likelihood of the whole answer.
METER classifies into the 3,129 most frequent answers, with binary losses; the target of an answer
is min(1, 3 x share of the people who wrote exactly this). METER is not trained on questions without
a listed answer; evaluation scores them. The accuracy is the official one, see
`vqa_accuracy`.
Source: VQA v2 (Goyal et al., 2017); ALBEF (Li et al., 2021); METER (Dou et al., 2022).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from elip_models.analysis.answer_scores import vqa_accuracy
from elip_models.pretraining.data import Example, ExampleSource, soft_scores, tokenize
from elip_models.pretraining.data.derived_sources import AnswerableExamples
from elip_models.pretraining.tasks.class_tasks import ClassTask
from elip_models.pretraining.tasks.task import Preprocessor
from elip_models.validation import PositiveInt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.pretraining.models.base import PretrainedModel


@dataclass(frozen=True)
class VQA(ClassTask):
    """Questions about an image.

    Args:
        answers_per_question: Number of answers used in training, those with the largest weights.
        answer_length: Tokens of an answer with its first and last token; longer ones are truncated.
        candidates: Number of answers whose likelihood is compared.
    """

    name: ClassVar[str] = "vqa"
    answers_per_question: PositiveInt = 10
    answer_length: PositiveInt = 10
    candidates: PositiveInt = 128

    def training_source(self, source: ExampleSource, config: Any) -> ExampleSource:
        """Return the questions with a listed answer for a classifier, as METER, or all."""
        return AnswerableExamples(source) if is_classifier(config) else source

    def accuracy(self, answers: dict[str, float], predicted: str) -> float:
        """Return the official accuracy of a predicted answer."""
        return vqa_accuracy(answers, predicted)

    def targets(self, preprocessor: Preprocessor, example: Example) -> dict[str, Tensor]:
        """Return the scores of all answers for a classifier, or the answers as tokens."""
        if is_classifier(preprocessor.model):
            scores, answers = soft_scores(example.answers), preprocessor.source.answers
            targets = [scores.get(answer, 0.0) for answer in answers]
            return {"answer_scores": torch.tensor(targets)}
        heaviest = sorted(example.answers.items(), key=lambda item: -item[1])
        kept = heaviest[: self.answers_per_question]
        texts = [text for text, _ in kept] + [""] * (self.answers_per_question - len(kept))
        tokens = tokenize(preprocessor.tokenizer, texts, self.answer_length)
        weights = torch.zeros(self.answers_per_question)
        weights[: len(kept)] = torch.tensor([weight for _, weight in kept])
        return {
            "answer_ids": tokens["input_ids"],
            "answer_mask": tokens["attention_mask"],
            "answer_weights": weights,
        }

    def predictor(
        self,
        model: "PretrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        answers: Sequence[str],
        outputs: Sequence[int],
    ) -> Callable[..., Tensor]:
        """Return a classifier of answers, or a ranking of the listed answers."""
        if is_classifier(model.config):
            return super().predictor(model, tokenizer, answers, outputs)
        device = next(model.parameters()).device
        listed = tokenize(tokenizer, answers, self.answer_length)
        texts = listed["input_ids"].to(device), listed["attention_mask"].to(device)
        k = min(self.candidates, len(answers))
        return partial(model.rank_answers, answer_ids=texts[0], answer_mask=texts[1], k=k)


def is_classifier(config: Any) -> bool:
    """Return whether a model with this config classifies instead of generating answers."""
    return hasattr(config, "num_classes")
