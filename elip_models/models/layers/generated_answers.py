"""Answers that a decoder writes, from the states of a question that saw its image.

    loss   sum of w_a (-log p(a | states)) over a question's answers, the mean over questions
    rank   the k candidates of the most probable first token; of those, by log p(a) in BLIP, by
           log p(first) + log p(a) in ALBEF, which counts the first token that is written twice

Each answer begins with a first token that is given and ends with an end token.
Source: ALBEF's models/model_vqa.py, and BLIP's models/blip_vqa.py.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from elip_models.models.layers.losses import distilled_cross_entropy, next_tokens
from elip_models.validation import PositiveInt, check


class States(NamedTuple):
    """Questions that saw their images: tokens (B, L, D), and which are real (B, L)."""

    tokens: Tensor
    mask: Tensor

    def repeated(self, times: int) -> "States":
        """Each question `times` times in a row -> (B * times, ..)."""
        return States(*(t.repeat_interleave(times, 0) for t in self))


class Decoder(Protocol):
    """Writes answers: input_ids, mask (B, La), of a question each -> logits (B, La, V) of the
    tokens behind each.
    """

    def __call__(self, input_ids: Tensor, mask: Tensor, states: States) -> Tensor: ...


class Answers(NamedTuple):
    """Up to A answers of each question: ids and mask (B, A, La), 1 = real; weights (B, A), 0 where
    there is no answer.
    """

    ids: Tensor
    mask: Tensor
    weights: Tensor

    def logits(self, decode: Decoder, states: States) -> Tensor:
        """(B * A, La, V) of a decoder. An answer that is not there has one token, for attention has
        to have any.
        """
        mask = self.mask.flatten(0, 1).clone()
        mask[:, 0] = 1
        return decode(self.ids.flatten(0, 1), mask, states.repeated(self.ids.shape[1]))

    def loss(
        self,
        logits: Tensor,
        teacher: Tensor | None = None,
        alpha: Tensor | float = 0.0,
        smoothing: float = 0.0,
    ) -> Tensor:
        """The weighted loss of logits (B * A, La, V), a scalar; the others: see
        `distilled_cross_entropy`.
        """
        labels = next_tokens(self.ids.flatten(0, 1), self.mask.flatten(0, 1))
        losses = distilled_cross_entropy(logits, labels, teacher, alpha, smoothing).sum(1)
        return (self.weights.flatten() * losses).sum() / len(self.weights)


class Candidates(NamedTuple):
    """The likeliest answers of each question, in the order of their first token's probability.

    numbers: (B, k) int64. first, whole: (B, k) fp32, log-probability of the first token, and of all
    of them; where labels are smoothed, the loss instead, negative.
    """

    numbers: Tensor
    first: Tensor
    whole: Tensor

    def best(self, scores: Tensor) -> Tensor:
        """The numbers (B,) of those with the largest scores (B, k)."""
        return self.numbers.gather(1, scores.argmax(1, keepdim=True))[:, 0]


def score_candidates(
    decode: Decoder, states: States, ids: Tensor, mask: Tensor, k: int, smoothing: float = 0.0
) -> Candidates:
    """Score the likeliest of C candidates as the answer of each question.

    Args:
        decode, states: see `Decoder` and `States`.
        ids, mask: (C, La) of the candidates, 1 = real, La at least 2.
        k: how many are written whole, at most C of them; B * k are at once.
        smoothing: of labels, as in training.

    Raises:
        TypeError, ValueError: k is no integer from 1 on.
    """
    check("k", k, PositiveInt)
    B = len(states.tokens)
    begin = ids[:1, :1].expand(B, 1)
    first = decode(begin, torch.ones_like(begin), states)[:, 0].float().softmax(1)
    chances, numbers = first[:, ids[:, 1]].topk(min(k, len(ids)), dim=1)
    chosen = Answers(ids[numbers], mask[numbers], torch.ones_like(chances))
    labels = next_tokens(chosen.ids.flatten(0, 1), chosen.mask.flatten(0, 1))
    losses = distilled_cross_entropy(chosen.logits(decode, states), labels, smoothing=smoothing)
    return Candidates(numbers, chances.log(), -losses.sum(1).view_as(chances))
