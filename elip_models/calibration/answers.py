"""Answers of a multimodal language model to questions about images.

score       exact match, ANLS or VQA accuracy of the greedy answer against the right answers
likelihood  exp of the mean log-probability of a token of the first right answer
agreement   the score of the answer against that of the dense model

Without right answers, agreement alone is measured. Questions about the same images are drawn
together. Each question is a prompt of its own, so that no result depends on a batch.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from elip_models.analysis.answer_scores import anls, exact_match, vqa_accuracy
from elip_models.api import record_stages
from elip_models.calibration.candidates import Candidates
from elip_models.calibration.data import Question
from elip_models.calibration.images import LEAST_IMAGES
from elip_models.calibration.language_candidates import (
    FewerPixels,
    LanguageCandidates,
    image_tokens,
)
from elip_models.calibration.task import Measure, Outputs, Part, Task, ratio
from elip_models.images import SampleError, decode_image
from elip_models.profiling.measure import Step
from elip_models.saving.files import file_sha256, tensors_sha256
from elip_models.validation import PositiveInt, check, did_you_mean, shortened
from elip_models.vlm.families import find_multimodal
from elip_models.vlm.strategies.base import LanguageStrategy

Score = Callable[[Sequence[str], str], float]
SCORES: dict[str, Score] = {
    "exact match": exact_match,
    "ANLS": anls,
    "VQA accuracy": lambda answers, predicted: vqa_accuracy(_shares(answers), predicted),
}
"""Functions of the right answers and a prediction that return a score in [0, 1]."""
LIKELIHOOD, AGREEMENT = "likelihood", "agreement"
NO_TOKEN = -1
GREEDY = {"do_sample": False, "num_beams": 1}
DECODED = 16
"""Tokens whose time is measured."""
SAMPLED = 8
"""Images on which a strategy is tried before it is measured."""
OF_TOKENS = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}
"""What a processor returns for each token of a prompt, and its value for a token of an answer."""


class WithFewerPixels(nn.Module):
    """A dense model whose processor gets smaller images.

    Attributes:
        share: of the pixels.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        super().__init__()
        self.model, self.share = model, share


class Answers(Task):
    """Questions about images.

    Args:
        questions: each with right answers, or none of them.
        model: a multimodal language model of transformers with its language model head, dense.
        processor: of the model.
        score: 'exact match', 'ANLS' or 'VQA accuracy', of several people's answers.
        max_new_tokens: the length of an answer.
        prompt: a text with {question} and the processor's token of each image; None: the chat
            template of the processor.
    """

    name: ClassVar[str] = "answers"

    def __init__(
        self,
        questions: Sequence[Question],
        *,
        model: nn.Module,
        processor: Any,
        score: str = "exact match",
        max_new_tokens: int = 32,
        prompt: str | None = None,
    ) -> None:
        check_answering(model)
        if score not in SCORES:
            raise ValueError(
                f"score: expected {', '.join(SCORES)}, got {shortened(score)}"
                f"{did_you_mean(score, SCORES)}"
            )
        if prompt is None and not getattr(processor, "chat_template", None):
            raise ValueError(
                f"prompt: expected a text with {{question}}, since the {type(processor).__name__} "
                "has no chat template, got None; pass such as 'USER: <image>\\n{question} "
                "ASSISTANT:'"
            )
        if prompt is not None and "{question}" not in prompt:
            raise ValueError(f"prompt: expected a text with {{question}}, got {shortened(prompt)}")
        self.processor, self.prompt, self.score = processor, prompt, SCORES[score]
        self.max_new_tokens = check("max_new_tokens", max_new_tokens, PositiveInt)
        self.has_answers = _have_answers(questions)
        of_answers = (score, LIKELIHOOD) if self.has_answers else ()
        self.measures = (*of_answers, AGREEMENT)
        by_images: dict[tuple[Path, ...], list[Question]] = {}
        for question in questions:
            by_images.setdefault(question.images, []).append(question)
        self.questions = list(by_images.values())
        if len(self.questions) < LEAST_IMAGES:
            raise ValueError(
                f"questions: expected questions about at least {LEAST_IMAGES} images, got "
                f"{len(self.questions)}; add questions about others"
            )

    @property
    def count(self) -> int:
        return len(self.questions)

    def contents(self) -> dict[str, Any]:
        asked = [
            [*(file_sha256(path) for path in rows[0].images), [row[1:] for row in rows]]
            for rows in self.questions
        ]
        first = self._inputs([self.questions[0][0]])
        prompt = tensors_sha256({name: first[name] for name in first})
        return {"questions": asked, "prompt": prompt, "tokens": self.max_new_tokens}

    @torch.no_grad()
    def outputs(
        self, model: nn.Module, images: Sequence[int], advance: Callable[[int], object]
    ) -> Outputs:
        most = max(map(len, self.questions))
        tokens = torch.full((len(images), most, self.max_new_tokens), NO_TOKEN, dtype=torch.int32)
        likelihoods = torch.zeros(len(images), most)
        for row, number in enumerate(images):
            for place, question in enumerate(self.questions[number]):
                prompt = self._prompt(model, [question])
                answer = self._answer(_inner(model), prompt)
                tokens[row, place, : len(answer)] = answer.cpu()
                if question.answers:
                    likelihoods[row, place] = self._likelihood(_inner(model), prompt, question)
            advance(1)
        return {"tokens": tokens, "likelihoods": likelihoods}

    def measured(self, chosen_on: Part, held_back: Part | None = None) -> dict[str, Measure]:
        part = held_back or chosen_on
        answers = self._texts(part.images, part.outputs)
        dense = answers if part.outputs is part.dense else self._texts(part.images, part.dense)
        totals = {name: np.zeros(len(answers)) for name in self.measures}
        counts = np.array([len(texts) for texts in answers], dtype=np.float64)
        for row, number in enumerate(part.images):
            for question, answer, other in zip(
                self.questions[number], answers[row], dense[row], strict=True
            ):
                if self.has_answers:
                    totals[self.measures[0]][row] += self.score(question.answers, answer)
                totals[AGREEMENT][row] += 1.0 if answer == other else self.score([other], answer)
        if self.has_answers:
            totals[LIKELIHOOD] = part.outputs["likelihoods"].double().sum(1).numpy()
            if part.outputs is part.dense and not totals[self.measures[0]].any():
                raise ValueError(
                    "questions: expected some that the dense model answers rightly, got none of "
                    f"{int(counts.sum())}, such as {answers[0][0]!r:.80} for "
                    f"{self.questions[part.images[0]][0].answers[0]!r:.80}; ask for short answers "
                    "in the question, or take another model"
                )
        rows = {name: np.stack([total, counts], axis=1) for name, total in totals.items()}
        return {name: Measure(rows[name], ratio) for name in self.measures}

    def answers(self, images: Sequence[int], outputs: Outputs) -> list[str]:
        return ["; ".join(texts) for texts in self._texts(images, outputs)]

    def truths(self, images: Sequence[int]) -> list[str] | None:
        if not self.has_answers:
            return None
        return ["; ".join(row.answers[0] for row in self.questions[i]) for i in images]

    @torch.no_grad()
    def steps(self, model: nn.Module, images: Sequence[int]) -> dict[str, Step]:
        """Return the prefill, and the decoding of `DECODED` tokens behind it."""
        prompt = self._prompt(model, [self.questions[i][0] for i in images])
        generate = partial(_inner(model).generate, **GREEDY)
        once = {"max_new_tokens": 1, "min_new_tokens": 1}
        prefill = partial(generate, **prompt, **once)
        filled = prefill(return_dict_in_generate=True)
        cache = "cache" if "cache" in filled else "past_key_values"
        mask = prompt["attention_mask"]
        behind = {
            "input_ids": filled["sequences"],
            "attention_mask": torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1),
            "max_new_tokens": DECODED,
            "min_new_tokens": DECODED,
        }

        def decode() -> object:
            return generate(**behind, **{cache: copy.deepcopy(filled[cache])})

        return {"prefill": prefill, "decoding": decode}

    def candidates(self, model: nn.Module, *, class_token_only: bool = False) -> Candidates:
        if class_token_only:
            raise ValueError(
                f"class_token_only: expected False with the task {self.name!r}, which reads the "
                "features of patches, got True"
            )
        first = [self.questions[0][0]]
        return LanguageCandidates(
            model,
            self._prompt(model, first),
            kept_by=partial(self._kept_by, model),
            tokens_at=lambda share: image_tokens(model, self._inputs(first, share)),
        )

    def reduced(self, model: nn.Module, strategy: Any) -> nn.Module:
        if isinstance(strategy, FewerPixels):
            return WithFewerPixels(model, strategy.share)
        return super().reduced(model, strategy)

    @torch.no_grad()
    def _kept_by(self, model: nn.Module, strategy: LanguageStrategy) -> float:
        """Return the mean share of image tokens that stay in the prompts of some images."""
        reduced = self.reduced(model, strategy)
        with record_stages(reduced) as infos:
            for rows in self.questions[:SAMPLED]:
                reduced(**self._prompt(reduced, [rows[0]]))
        return sum(
            (info.images & info.kept).sum().item() / info.images.sum().item() for info in infos
        ) / len(infos)

    def _inputs(self, questions: Sequence[Question], share: float = 1.0) -> Any:
        """Return what the processor makes of prompts, with images of a share of their pixels."""
        texts = [self._text(question) for question in questions]
        images = [[_picture(path, share) for path in row.images] for row in questions]
        begin = self.processor.tokenizer.bos_token
        has_begin = begin is not None and texts[0].startswith(begin)
        options = {"add_special_tokens": False} if has_begin else {}
        if len(questions) > 1:
            options |= {"padding": True, "padding_side": "left"}
        return self.processor(text=texts, images=images, return_tensors="pt", **options)

    def _text(self, question: Question) -> str:
        if self.prompt is not None:
            return self.prompt.replace("{question}", question.question)
        content = [{"type": "image"} for _ in question.images]
        content.append({"type": "text", "text": question.question})
        turn = {"role": "user", "content": content}
        return self.processor.apply_chat_template([turn], add_generation_prompt=True)

    def _prompt(self, model: nn.Module, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Return the arguments of the model's forward pass for prompts."""
        share = model.share if isinstance(model, WithFewerPixels) else 1.0
        weight = next(model.parameters())
        return dict(self._inputs(questions, share).to(weight.device, weight.dtype))

    def _answer(self, model: nn.Module, prompt: dict[str, Tensor]) -> Tensor:
        """Return the tokens (T,) of the greedy answer."""
        tokens = model.generate(**prompt, **GREEDY, max_new_tokens=self.max_new_tokens)
        return tokens[0, prompt["input_ids"].shape[1] :]

    def _likelihood(self, model: nn.Module, prompt: dict[str, Tensor], question: Question) -> float:
        """Return the likelihood of the first answer; labels mark it, so that it selects nothing."""
        ids = prompt["input_ids"]
        answer = self.processor.tokenizer(question.answers[0], add_special_tokens=False)
        answer = ids.new_tensor([answer["input_ids"]])
        whole = {
            name: torch.cat([prompt[name], torch.full_like(answer, value)], dim=1)
            for name, value in OF_TOKENS.items()
            if name in prompt
        }
        whole["input_ids"] = torch.cat([ids, answer], dim=1)
        labels = torch.cat([torch.full_like(ids, -100), answer], dim=1)
        return model(**prompt | whole, labels=labels).loss.float().neg().exp().item()

    def _texts(self, images: Sequence[int], outputs: Outputs) -> list[list[str]]:
        """Return the answers to the questions about each image."""
        decode = partial(self.processor.tokenizer.decode, skip_special_tokens=True)
        return [
            [
                decode(answer[answer != NO_TOKEN].tolist()).strip()
                for answer in tokens[: len(self.questions[number])]
            ]
            for number, tokens in zip(images, outputs["tokens"], strict=True)
        ]


def _inner(model: nn.Module) -> nn.Module:
    """Return the model itself."""
    return model.model if isinstance(model, WithFewerPixels) else model


def _picture(path: Path, share: float) -> Image.Image:
    """Return an image at a share of its pixels; ValueError if it cannot be read."""
    try:
        image = decode_image(path, str(path))
    except SampleError as error:
        raise ValueError(f"questions: expected readable images, got {error}") from error
    if share == 1:
        return image
    sides = (max(1, round(side * share**0.5)) for side in image.size)
    return image.resize(tuple(sides), Image.Resampling.BICUBIC)


def _shares(answers: Sequence[str]) -> dict[str, float]:
    """Return the share of the people who gave each answer."""
    return {answer: answers.count(answer) / len(answers) for answer in answers}


def _have_answers(questions: Sequence[Question]) -> bool:
    """Return whether all questions have right answers; ValueError if only some have."""
    for i, row in enumerate(questions):
        if not row.question.strip() or not row.images:
            raise ValueError(
                f"questions: expected a text and images in each, got {shortened(row)} as "
                f"questions[{i}]; add them, or remove it"
            )
    without = [i for i, row in enumerate(questions) if not row.answers]
    if without and len(without) < len(questions):
        raise ValueError(
            f"questions: expected right answers to all questions or to none, got none to "
            f"{len(without)} of {len(questions)}, such as questions[{without[0]}], "
            f"{questions[without[0]].question!r:.80}; add answers, or remove all"
        )
    return not without


def check_answering(model: nn.Module) -> None:
    """Raise TypeError for a model that answers no questions about images."""
    multimodal, name = find_multimodal(model), type(model).__name__
    if multimodal is None or multimodal.head is None or not hasattr(model, "generate"):
        raise TypeError(
            "model: expected a multimodal language model of a supported family with its language "
            f"model head, such as AutoModelForImageTextToText opens, got a {name}; take another "
            "task, or see `elip models --language`"
        )
    if multimodal.cross_attention_layers:
        raise TypeError(
            f"model: expected one whose prompt has the tokens of its images, got a {name}, which "
            "reads images by cross-attention; take LLaVA, Qwen-VL or another one"
        )
