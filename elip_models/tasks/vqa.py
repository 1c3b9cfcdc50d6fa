"""Visual question answering: answers that a decoder writes and ranks, or classes.

ALBEF and BLIP learn to write each answer of a question, weighed, and rank the answers of a list:
the `candidates` whose first token is most likely, by the likelihood of the whole. METER tells the
3,129 most frequent answers apart, as many binary questions. An answer counts as much as the humans
who gave it say, in whatever writing.
Source: VQA v2 (Goyal et al., 2017); ALBEF (Li et al., 2021); METER (Dou et al., 2022).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from elip_models.data import Example, soft_scores, tokenize
from elip_models.data.tasks.vqa_answers import normalise_answer
from elip_models.tasks.class_task import ClassTask
from elip_models.tasks.task import SampleReader
from elip_models.validation import PositiveInt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.models.base import PretrainedModel


@dataclass(frozen=True)
class VQA(ClassTask):
    """Questions about an image.

    answers_per_question: that training reads at most, the heaviest ones.
    answer_length: tokens of an answer, the first and the last one counted; longer ones are cut.
    candidates: answers of the list whose likelihood is compared.
    """

    name: ClassVar[str] = "vqa"
    answers_per_question: PositiveInt = 10
    answer_length: PositiveInt = 10
    candidates: PositiveInt = 128

    def written(self, answer: str) -> str:
        return normalise_answer(answer) or answer

    def worth(self, answers: dict[str, float]) -> dict[str, float]:
        shares: dict[str, float] = {}
        for answer, share in answers.items():
            shares[self.written(answer)] = shares.get(self.written(answer), 0.0) + share
        return soft_scores(shares)

    def targets(self, reading: SampleReader, example: Example) -> dict[str, Tensor]:
        if classifies(reading.model):
            worth = self.worth(example.answers)
            scores = [worth.get(self.written(answer), 0.0) for answer in reading.source.answers]
            return {"answer_scores": torch.tensor(scores)}
        return self._answers(reading, example)

    def chooser(
        self, model: "PretrainedModel", tokenizer: "PreTrainedTokenizerBase", answers: Sequence[str]
    ) -> Callable[..., Tensor]:
        if classifies(model.config):
            return super().chooser(model, tokenizer, answers)
        device = next(model.parameters()).device
        listed = tokenize(tokenizer, answers, self.answer_length)
        texts = listed["input_ids"].to(device), listed["attention_mask"].to(device)
        k = min(self.candidates, len(answers))
        return partial(model.rank_answers, answer_ids=texts[0], answer_mask=texts[1], k=k)

    def _answers(self, reading: SampleReader, example: Example) -> dict[str, Tensor]:
        heaviest = sorted(example.answers.items(), key=lambda item: -item[1])
        kept = heaviest[: self.answers_per_question]
        texts = [text for text, _ in kept] + [""] * (self.answers_per_question - len(kept))
        tokens = tokenize(reading.tokenizer, texts, self.answer_length)
        weights = torch.zeros(self.answers_per_question)
        weights[: len(kept)] = torch.tensor([weight for _, weight in kept])
        return {
            "answer_ids": tokens["input_ids"],
            "answer_mask": tokens["attention_mask"],
            "answer_weights": weights,
        }


def classifies(config: Any) -> bool:
    """Whether a model with this config tells answers apart instead of writing them."""
    return hasattr(config, "num_classes")
