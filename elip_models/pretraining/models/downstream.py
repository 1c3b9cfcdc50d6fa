"""Shared parts of the downstream models: outputs, momentum distillation, retrieval.

Retrieval by ALBEF and BLIP trains on images that have several captions each. The losses are those
of `models/momentum_model.py` with two changes:

    ITC   y = alpha softmax(s_m) + (1 - alpha) p over [batch | queue], where p is uniform over the
          columns that show the image of the row
    ITM   the negatives of a row never show the image of the row

Source: models/model_retrieval.py of ALBEF and models/blip_retrieval.py of BLIP.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from elip_models.pretraining.models.base import eval_mode
from elip_models.pretraining.models.distilled_model import DistilledModel, MomentumConfig
from elip_models.pretraining.models.layers.generated_answers import QuestionStates, score_candidates
from elip_models.pretraining.models.momentum_model import MomentumModel, MomentumOutput, Negatives

Weights = dict[str, Tensor]


@dataclass
class TaskOutput:
    """Output of a downstream model whose loss has one part.

    Attributes:
        loss: scalar.
        logits: (B, num_classes) of the classes, or (.., L, V) of each next token.
    """

    loss: Tensor
    logits: Tensor


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(MomentumConfig):
    """Momentum distillation of a fine-tuned model; a base after the pre-training config.

    Attributes:
        distill: train on the predictions of the momentum encoders too, with the weight alpha.
    """

    distill: bool = True

    @property
    def full_alpha(self) -> float:
        """Weight of the momentum targets after its warm-up; 0 without distillation."""
        return self.alpha if self.distill else 0.0


class MomentumRetrieval(MomentumModel):
    """Fine-tuning on images with several captions; a base before the pre-training class."""

    task: ClassVar[str] = "retrieval"
    stores_image_ids = True

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_ids: Tensor,
        *,
        guide_ids: Tensor | None = None,
        guide_mask: Tensor | None = None,
        drawn: Negatives | None = None,
    ) -> MomentumOutput:
        """Return the losses of a batch of pairs; in training, update momentum encoders and queue.

        `drawn` replaces random negatives, to repeat the step of another implementation. For the
        other arguments, see `contrast`.
        """
        text = input_ids, attention_mask
        contrast = self.contrast(images, *text, guide_ids, guide_mask, image_ids)
        if drawn is None:
            drawn = self.draw_negatives(contrast.similar, image_ids)
        fused = input_ids if self.fuses_ids else contrast.text
        loss_itm = self.matching_loss(
            fused, attention_mask, contrast.image, drawn, image_mask=contrast.image_mask
        )
        loss = contrast.loss + loss_itm
        return MomentumOutput(loss, contrast.loss, loss_itm, *contrast.features)

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Return the inputs of the base class and `image_ids`, another one for each pair."""
        ids = torch.arange(len(images), device=images.device)
        return super().random_inputs(images) | {"image_ids": ids}


class AnsweringModel(DistilledModel):
    """VQA: fuse a question with its image, and rank candidate answers by a decoder.

    Attributes:
        random_answers: number of answers of each question in `random_inputs`.
        counts_first_token_twice: ranking adds the score of the first token to that of all tokens.
        answer_smoothing: label smoothing of the scores.
    """

    task: ClassVar[str] = "vqa"
    random_answers: ClassVar[int] = 1
    counts_first_token_twice: ClassVar[bool] = False
    answer_smoothing: float = 0.0

    def fuse_question(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the states (B, L, D) of questions (B, L), fused with images (B, 3, H, W)."""
        raise NotImplementedError

    def predict_answer(self, input_ids: Tensor, mask: Tensor, states: QuestionStates) -> Tensor:
        """Return logits (B, La, V) of the next tokens of answers (B, La), see `Decoder`."""
        raise NotImplementedError

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Return the inputs of the base class, and answers of two tokens behind the first."""
        inputs, count = super().random_inputs(images), self.random_answers
        ids = inputs["input_ids"][:, None, -3:].repeat(1, count, 1)
        answers = {"answer_ids": ids, "answer_mask": torch.ones_like(ids)}
        weights = torch.full(ids.shape[:2], 1 / count, device=ids.device)
        return inputs | answers | {"answer_weights": weights}

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
            fused = self.fuse_question(images, input_ids, attention_mask)
            states, answers = QuestionStates(fused, attention_mask), (answer_ids, answer_mask)
            smoothing = self.answer_smoothing
            found = score_candidates(self.predict_answer, states, *answers, k, smoothing)
        twice = self.counts_first_token_twice
        return found.best(found.first + found.whole if twice else found.whole)


def select_parts(weights: Weights, *prefixes: str) -> Weights:
    """Return the weights whose names start with one of the prefixes."""
    return {name: weight for name, weight in weights.items() if name.startswith(prefixes)}


def encoder_weights(
    weights: Weights, convert: Callable[[Weights], Weights], *, distill: bool = True
) -> Weights:
    """Return pre-trained weights for the encoders and, with `distill`, their momentum copies.

    `convert` maps weights of the pre-trained encoders to the names inside the new ones. A copy
    without a momentum weight gets the weight of the encoder.
    """
    online = _strip_prefix(weights, "encoders.")
    found = {f"encoders.{name}": weight for name, weight in convert(online).items()}
    if not distill:
        return found
    copies = convert(online | _strip_prefix(weights, "encoders_m."))
    return found | {f"encoders_m.{name}": weight for name, weight in copies.items()}


def retrieval_weights(
    weights: Weights, config: MomentumConfig, convert: Callable[[Weights], Weights]
) -> Weights:
    """Return pre-trained weights for a retrieval model; for `convert`, see `encoder_weights`.

    The queue is kept if both models have the same queue size. Its features have no image id, so
    they are negatives of all pairs.
    """
    prefixes = ["itm_head.", "temperature"]
    if "queue.image" in weights and weights["queue.image"].shape[1] == config.queue_size:
        prefixes.append("queue.")
    return encoder_weights(weights, convert) | select_parts(weights, *prefixes)


def _strip_prefix(weights: Weights, prefix: str) -> Weights:
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
