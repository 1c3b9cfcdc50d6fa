"""Losses and ranking of answers that a decoder generates from a question fused with its image.

    loss   mean over questions of sum_a w_a (-log p(a | states))
    rank   choose the k candidates whose first token is most probable; among them, BLIP takes the
           largest log p(a), ALBEF the largest log p(first) + log p(a)

The first token of an answer is given, and its last one is an end token.
Source: models/model_vqa.py of ALBEF, models/blip_vqa.py of BLIP.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from elip_models.pretraining.models.layers.losses import distilled_cross_entropy, next_tokens
from elip_models.validation import PositiveInt, check


class QuestionStates(NamedTuple):
    """Questions fused with their images: tokens (B, L, D), and mask (B, L), 1 = real token."""

    tokens: Tensor
    mask: Tensor

    def repeat(self, times: int) -> "QuestionStates":
        """Repeat each question `times` times in a row -> (B * times, ..)."""
        return QuestionStates(*(t.repeat_interleave(times, 0) for t in self))


class Decoder(Protocol):
    """Decoder of answers: ids and mask (B, La) with states -> logits (B, La, V) of next tokens."""

    def __call__(self, input_ids: Tensor, mask: Tensor, states: QuestionStates) -> Tensor:
        """Return logits (B, La, V) of the tokens after each position."""


class Answers(NamedTuple):
    """Up to A answers of each question: ids and mask (B, A, La), weights (B, A), 0 if missing."""

    ids: Tensor
    mask: Tensor
    weights: Tensor

    def logits(self, decode: Decoder, states: QuestionStates) -> Tensor:
        """Return logits (B * A, La, V); a missing answer has one real token, as attention needs."""
        mask = self.mask.flatten(0, 1).clone()
        mask[:, 0] = 1
        return decode(self.ids.flatten(0, 1), mask, states.repeat(self.ids.shape[1]))

    def loss(
        self,
        logits: Tensor,
        teacher: Tensor | None = None,
        alpha: Tensor | float = 0.0,
        smoothing: float = 0.0,
    ) -> Tensor:
        """Return the weighted loss, a scalar; for the arguments, see `distilled_cross_entropy`."""
        labels = next_tokens(self.ids.flatten(0, 1), self.mask.flatten(0, 1))
        losses = distilled_cross_entropy(logits, labels, teacher, alpha, smoothing).sum(1)
        return (self.weights.flatten() * losses).sum() / len(self.weights)


class Candidates(NamedTuple):
    """The k candidates of each question, in the order of their first token's probability.

    Attributes:
        numbers: (B, k) int64, indices of the candidates.
        first: (B, k) fp32, log-probability of the first token.
        whole: (B, k) fp32, log-probability of all tokens; with label smoothing, the negative loss.
    """

    numbers: Tensor
    first: Tensor
    whole: Tensor

    def best(self, scores: Tensor) -> Tensor:
        """Return the indices (B,) of the candidates with the largest scores (B, k)."""
        return self.numbers.gather(1, scores.argmax(1, keepdim=True))[:, 0]


def score_candidates(
    decode: Decoder,
    states: QuestionStates,
    ids: Tensor,
    mask: Tensor,
    k: int,
    smoothing: float = 0.0,
) -> Candidates:
    """Score the k most probable of C candidates as the answer of each question, B * k at once.

    `ids` and `mask` (C, La) are the candidates, La at least 2; `smoothing` is that of training.
    """
    check("k", k, PositiveInt)
    B = len(states.tokens)
    first_token = ids[:1, :1].expand(B, 1)
    first = decode(first_token, torch.ones_like(first_token), states)[:, 0].float().softmax(1)
    probabilities, numbers = first[:, ids[:, 1]].topk(min(k, len(ids)), dim=1)
    chosen = Answers(ids[numbers], mask[numbers], torch.ones_like(probabilities))
    labels = next_tokens(chosen.ids.flatten(0, 1), chosen.mask.flatten(0, 1))
    losses = distilled_cross_entropy(chosen.logits(decode, states), labels, smoothing=smoothing)
    return Candidates(numbers, probabilities.log(), -losses.sum(1).view_as(probabilities))
