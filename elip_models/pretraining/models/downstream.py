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
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_models.pretraining.models.base import PretrainedModel, eval_mode
from elip_models.pretraining.models.layers.losses import (
    at_least_fp32,
    distilled_cross_entropy,
    next_tokens,
)
from elip_models.pretraining.models.momentum_model import (
    DistilledModel,
    MomentumConfig,
    MomentumModel,
)

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


class Classifier(PretrainedModel):
    """A model whose loss is the cross entropy of its `logits`."""

    def logits(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, 3, H, W), or pairs, and texts (B, L)."""
        raise NotImplementedError

    def forward(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> TaskOutput:
        """Return the loss of a batch; labels (B,) int64 are the correct classes."""
        logits = self.logits(images, input_ids, attention_mask)
        return TaskOutput(F.cross_entropy(at_least_fp32(logits), labels), logits)


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
    rules, online = list(rules), renamed(weights, [("encoders.", "")])
    result = renamed(renamed(online, rules), [("", "encoders.")])
    if distill:
        copies = online | renamed(weights, [("encoders_m.", "")])
        result |= renamed(renamed(copies, rules), [("", "encoders_m.")])
    return result


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


class AnsweringModel(DistilledModel):
    """VQA: fuse a question with its image, and generate or rank answers by a decoder.

    Attributes:
        counts_first_token_twice: ranking adds the score of the first token to that of all tokens.
        answer_smoothing: label smoothing of losses and scores.
    """

    task: ClassVar[str] = "vqa"
    counts_first_token_twice: ClassVar[bool] = False
    answer_smoothing: float = 0.0

    def fuse_question(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the states (B, L, D) of questions (B, L), fused with images (B, 3, H, W)."""
        raise NotImplementedError

    def fuse_for_loss(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the states of questions for a loss, and those of the momentum encoders, if any."""
        return self.fuse_question(images, input_ids, attention_mask), None

    def decode_answers(
        self, ids: Tensor, mask: Tensor, states: Tensor, states_mask: Tensor, *, teacher: bool
    ) -> Tensor:
        """Return logits (B, La, V) of the tokens after each position of answers (B, La).

        `teacher` selects the decoder of the momentum encoders.
        """
        raise NotImplementedError

    def answer_logits(
        self,
        ids: Tensor,
        mask: Tensor,
        states: Tensor,
        states_mask: Tensor,
        *,
        teacher: bool = False,
    ) -> Tensor:
        """Return logits (B * A, La, V) of A answers (B, A, La) to each of B questions.

        A missing answer has one real token, as attention needs.
        """
        A, mask = ids.shape[1], mask.flatten(0, 1).clone()
        mask[:, 0] = 1
        repeated = (part.repeat_interleave(A, 0) for part in (states, states_mask))
        return self.decode_answers(ids.flatten(0, 1), mask, *repeated, teacher=teacher)

    def answer_losses(
        self, logits: Tensor, ids: Tensor, mask: Tensor, teacher: Tensor | None = None
    ) -> Tensor:
        """Return the losses (B, A) of answers (B, A, La) from their logits (B * A, La, V).

        `teacher` are the logits of the momentum encoders.
        """
        labels = next_tokens(ids.flatten(0, 1), mask.flatten(0, 1))
        smoothing = self.answer_smoothing
        losses = distilled_cross_entropy(logits, labels, teacher, self.alpha, smoothing)
        return losses.sum(1).view(ids.shape[:2])

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        answer_weights: Tensor,
    ) -> TaskOutput:
        """Return the loss of a batch; in training, update the momentum encoders, if any.

        answer_ids and answer_mask (B, A, La) are answers with weights (B, A), 0 if one is missing.
        """
        states, states_m = self.fuse_for_loss(images, input_ids, attention_mask)
        answers, teacher = (answer_ids, answer_mask), None
        logits = self.answer_logits(*answers, states, attention_mask)
        if states_m is not None:
            with torch.no_grad():
                teacher = self.answer_logits(*answers, states_m, attention_mask, teacher=True)
        losses = self.answer_losses(logits, *answers, teacher)
        return TaskOutput((answer_weights * losses).sum() / len(images), logits)

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
        with eval_mode(self):
            states = self.fuse_question(images, input_ids, attention_mask), attention_mask
            numbers, scores = self.score_answers(*states, answer_ids, answer_mask, k)
        return numbers.gather(1, scores.argmax(1, keepdim=True))[:, 0]

    def score_answers(
        self, states: Tensor, states_mask: Tensor, ids: Tensor, mask: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Return the indices (B, k) of the candidates (C, La) that are scored, and their scores."""
        questions = states, states_mask
        first_token = ids[:1, :1].expand(len(states), 1)[:, None]
        first = self.answer_logits(first_token, torch.ones_like(first_token), *questions)[:, 0]
        chances = first.float().softmax(1)[:, ids[:, 1]]
        chances, numbers = chances.topk(min(k, len(ids)), dim=1)
        answers = ids[numbers], mask[numbers]
        scores = -self.answer_losses(self.answer_logits(*answers, *questions), *answers)
        return numbers, scores + chances.log() if self.counts_first_token_twice else scores
