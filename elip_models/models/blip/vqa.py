"""BLIP answers questions: an encoder reads question and image, a decoder writes the answer.

    question   [ENC] q_1 .. q_n, each layer attending to the image tokens -> states
    answer     [DEC] a_1 .. a_m [SEP], each layer attending to the states
    loss       sum over answers of weight * sum over tokens of CE (label smoothing), over images
    ranking    k candidates by their first token, then the one of the least loss, smoothing included

Source: BLIP's models/blip_vqa.py, configs/vqa.yaml. Its generation attends to the padding of the
questions too; this one does not.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elip_models.models.base import eval_mode
from elip_models.models.blip.model import BLIP
from elip_models.models.blip.shared import BLIPEncoders, Writer
from elip_models.models.downstream.blip import (
    BLIPAloneConfig,
    BLIPReadingTask,
    decoder_weights,
    under,
)
from elip_models.models.layers.bert import (
    BertTower,
    masked_language_head,
    untied_decoder,
)
from elip_models.models.layers.generated_answers import Answers, States, score_candidates
from elip_models.models.layers.generation import Decoding
from elip_models.models.task_output import TaskOutput
from elip_models.validation import Rate, Size

ANSWERS = Decoding(max_length=10, min_length=1)
"""How the original writes answers."""


@dataclass(frozen=True, kw_only=True)
class BLIPVQAConfig(BLIPAloneConfig):
    """Hyper-parameters of BLIP for VQA: see `BLIPAloneConfig`."""

    image_size: Size = 480
    context_length: Size = 35
    drop_path: Rate = 0.1


class BLIPVQA(Writer, BLIPReadingTask):
    """Image tower, question encoder, answer decoder."""

    family = "blip_vqa"
    task = "vqa"
    config_class = BLIPVQAConfig
    config: BLIPVQAConfig
    pretraining = BLIP

    def __init__(self, config: BLIPVQAConfig) -> None:
        super().__init__(config, BLIPEncoders(config, projects=False))
        self.decoder = untied_decoder(self.encoders.text)
        self.language_head = masked_language_head(self.decoder)

    @classmethod
    def from_pretraining(
        cls, weights: dict[str, Tensor], config: BLIPVQAConfig
    ) -> dict[str, Tensor]:
        """Weights of BLIP -> of this model, all of them: towers, decoder and head as they are."""
        return under(("encoders.visual.", "encoders.text."), weights) | decoder_weights(weights)

    @property
    def text_towers(self) -> tuple[BertTower, ...]:
        return self.encoders.text, self.decoder

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Also an answer, of two tokens behind the first."""
        inputs = super().random_inputs(images)
        ids = inputs["input_ids"][:, None, -3:]
        weights = torch.ones(ids.shape[:2], device=ids.device)
        answers = {"answer_ids": ids, "answer_mask": torch.ones_like(ids)}
        return inputs | answers | {"answer_weights": weights}

    def read_question(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Images (B, 3, H, W), input_ids, attention_mask (B, L) -> states (B, L, D) of the
        questions.
        """
        image = self.see(images, self.task_guides(input_ids, attention_mask))
        return self.fuse(input_ids, attention_mask, *image)

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        answer_weights: Tensor,
    ) -> TaskOutput:
        """Compute the loss of the answers to a batch of questions.

        Args:
            images: (B, 3, H, W).
            input_ids, attention_mask: (B, L) of the questions, 1 = real.
            answer_ids, answer_mask: (B, A, La), up to A answers a question.
            answer_weights: (B, A) fp32; 0 where there is no answer.
        """
        states = States(self.read_question(images, input_ids, attention_mask), attention_mask)
        answers = Answers(answer_ids, answer_mask, answer_weights)
        logits = answers.logits(self.write, states)
        loss = answers.loss(logits, smoothing=self.config.label_smoothing)
        return TaskOutput(loss, logits)

    def write(self, input_ids: Tensor, mask: Tensor, states: States) -> Tensor:
        """Predict the token behind each of an answer, input_ids, mask (B, La), from the states of
        its question -> (B, La, V).
        """
        return self.predict(input_ids, mask, *states)

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
        """Choose an answer to each question, without dropout, whatever the mode of the model.

        Args:
            images: (B, 3, H, W).
            input_ids, attention_mask: (B, L) of the questions, 1 = real.
            answer_ids, answer_mask: (C, La), the candidates, La at least 2.
            k: candidates by the probability of their first token whose whole is compared; all where
                there are fewer. B * k answers are read at once.

        Returns:
            (B,) int64, which candidate.
        """
        with eval_mode(self):
            states = States(self.read_question(images, input_ids, attention_mask), attention_mask)
            answers, smoothing = (answer_ids, answer_mask), self.config.label_smoothing
            candidates = score_candidates(self.write, states, *answers, k, smoothing)
        return candidates.best(candidates.whole)

    @torch.no_grad()
    def generate_answers(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        decoding: Decoding = ANSWERS,
    ) -> Tensor:
        """Write an answer to each question, without dropout, whatever the mode of the model.

        Args:
            images: (B, 3, H, W).
            input_ids, attention_mask: (B, L) of the questions, 1 = real.
            decoding: beam search or nucleus sampling, and how long.

        Returns:
            (B, L) int64: [DEC], the answer and its end, then padding.
        """
        with eval_mode(self):
            states = self.read_question(images, input_ids, attention_mask)
        return self.generate_from_tokens(states, attention_mask, decoding=decoding)
