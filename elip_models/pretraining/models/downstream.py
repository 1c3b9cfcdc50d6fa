"""Shared parts of the downstream models: outputs, initial weights, retrieval, answers.

Retrieval by ALBEF and BLIP trains on images that have several captions each. The losses are those
of `models/momentum_model.py` with two changes:

    ITC   y = alpha softmax(s_m) + (1 - alpha) p over [batch | queue], where p is uniform over the
          columns that show the image of the row
    ITM   the negatives of a row never show the image of the row

VQA by ALBEF and BLIP generates an answer from a question fused with its image. The first token of
an answer is fixed, and its last one is an end token.

    loss  mean over questions of sum_a w_a (-log p(a | states))
    rank  choose the k candidates whose first token is most probable; among them, BLIP takes the
          largest log p(a), ALBEF the largest log p(first) + log p(a)

Source: model_retrieval.py and model_vqa.py of ALBEF, blip_retrieval.py and blip_vqa.py of BLIP.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from elip_models.pretraining.models.base import eval_mode
from elip_models.pretraining.models.layers.losses import distilled_cross_entropy, next_tokens
from elip_models.pretraining.models.momentum_model import (
    DistilledModel,
    MomentumConfig,
    MomentumModel,
)
from elip_models.validation import PositiveInt, check

Weights = dict[str, Tensor]
RETRIEVAL_ENCODERS = ("visual.",), ("text.",), ("image_projection.",), ("text_projection.",)


@dataclass
class TaskOutput:
    """Output of a downstream model whose loss has one part.

    Attributes:
        loss: scalar.
        logits: (B, num_classes) of the classes, or (.., L, V) of each next token.
    """

    loss: Tensor
    logits: Tensor


def renamed(weights: Weights, rules: Iterable[tuple[str, ...]]) -> Weights:
    """Return the weights whose names start with the first prefix of a rule, under its others.

    A rule of one prefix keeps the names. Where two rules give the same name, the later one counts.
    """
    result = {}
    for prefix, *targets in rules:
        for name, weight in weights.items():
            if name.startswith(prefix):
                rest = name.removeprefix(prefix)
                result |= {target + rest: weight for target in targets or [prefix]}
    return result


def encoder_weights(
    weights: Weights, rules: Iterable[tuple[str, ...]], *, distill: bool = True
) -> Weights:
    """Return pre-trained weights for the encoders and, with `distill`, their momentum copies.

    `rules` rename weights inside the encoders. A copy without a momentum weight gets the weight of
    the encoder.
    """
    parts = {"encoders.": renamed(weights, [("encoders.", "")])}
    if distill:
        parts["encoders_m."] = parts["encoders."] | renamed(weights, [("encoders_m.", "")])
    rules = list(rules)
    named = ((part, renamed(inside, rules)) for part, inside in parts.items())
    return {part + name: weight for part, inside in named for name, weight in inside.items()}


class MomentumRetrieval(MomentumModel):
    """Fine-tuning on images with several captions; a base before the pre-training class."""

    task: ClassVar[str] = "retrieval"
    stores_image_ids = True

    @classmethod
    def from_pretraining(cls, weights: Weights, config: MomentumConfig) -> Weights:
        """Map weights of a pre-trained model, and of its momentum encoders, to this model.

        The queue is kept if both models have the same queue size. Its features have no image id, so
        they are negatives of all pairs.
        """
        rules = [("itm_head.",), ("temperature",)]
        if "queue.image" in weights and weights["queue.image"].shape[1] == config.queue_size:
            rules.append(("queue.",))
        return encoder_weights(weights, RETRIEVAL_ENCODERS) | renamed(weights, rules)

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Return the inputs of the base class and `image_ids`, another one for each pair."""
        ids = torch.arange(len(images), device=images.device)
        return super().random_inputs(images) | {"image_ids": ids}


class Decoder(Protocol):
    """Decoder of answers from fused questions, see `AnsweringModel.predict_answer`."""

    def __call__(
        self, input_ids: Tensor, mask: Tensor, states: Tensor, states_mask: Tensor
    ) -> Tensor:
        """Return logits (B, La, V) of the tokens after each position of answers (B, La)."""


def decode_answers(
    decode: Decoder, ids: Tensor, mask: Tensor, states: Tensor, states_mask: Tensor
) -> Tensor:
    """Return logits (B * A, La, V) of A answers (B, A, La) to each of B questions.

    A missing answer has one real token, as attention needs.
    """
    A, mask = ids.shape[1], mask.flatten(0, 1).clone()
    mask[:, 0] = 1
    repeated = (part.repeat_interleave(A, 0) for part in (states, states_mask))
    return decode(ids.flatten(0, 1), mask, *repeated)


class AnsweringModel(DistilledModel):
    """VQA: fuse a question with its image, and rank candidate answers by a decoder.

    Attributes:
        counts_first_token_twice: ranking adds the score of the first token to that of all tokens.
        answer_smoothing: label smoothing of the scores.
    """

    task: ClassVar[str] = "vqa"
    counts_first_token_twice: ClassVar[bool] = False
    answer_smoothing: float = 0.0

    def fuse_question(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the states (B, L, D) of questions (B, L), fused with images (B, 3, H, W)."""
        raise NotImplementedError

    def predict_answer(
        self, input_ids: Tensor, mask: Tensor, states: Tensor, states_mask: Tensor
    ) -> Tensor:
        """Return logits (B, La, V) of the tokens after each position of answers (B, La)."""
        raise NotImplementedError

    def answer_losses(
        self,
        logits: Tensor,
        ids: Tensor,
        mask: Tensor,
        teacher: Tensor | None = None,
    ) -> Tensor:
        """Return the losses (B, A) of answers (B, A, La) from their logits (B * A, La, V).

        `teacher` are the logits of the momentum encoders.
        """
        labels = next_tokens(ids.flatten(0, 1), mask.flatten(0, 1))
        losses = distilled_cross_entropy(
            logits, labels, teacher, self.alpha, smoothing=self.answer_smoothing
        )
        return losses.sum(1).view(ids.shape[:2])

    @torch.no_grad()
    def rank_answers(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        k: int,
    ) -> Tensor:
        """Return the index (B,) of the best candidate of each question, always without dropout.

        The candidates are answer_ids and answer_mask (C, La), La at least 2. Those k with the most
        probable first tokens are scored completely: B * k answers are decoded at once.
        """
        check("k", k, PositiveInt)
        with eval_mode(self):
            states = self.fuse_question(images, input_ids, attention_mask), attention_mask
            numbers, scores = self.score_answers(states, answer_ids, answer_mask, k)
        return numbers.gather(1, scores.argmax(1, keepdim=True))[:, 0]

    def score_answers(
        self, states: tuple[Tensor, Tensor], ids: Tensor, mask: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Return the indices (B, k) of the candidates (C, La) that are scored, and their scores.

        `states` are the fused questions and their mask.
        """
        first_token = ids[:1, :1].expand(len(states[0]), 1)
        first = self.predict_answer(first_token, torch.ones_like(first_token), *states)[:, 0]
        chances = first.float().softmax(1)[:, ids[:, 1]]
        chances, numbers = chances.topk(min(k, len(ids)), dim=1)
        candidates = ids[numbers], mask[numbers]
        logits = decode_answers(self.predict_answer, *candidates, *states)
        scores = -self.answer_losses(logits, *candidates)
        return numbers, scores + chances.log() if self.counts_first_token_twice else scores
