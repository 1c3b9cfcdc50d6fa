"""BLIP fine-tuned for VQA: an encoder fuses question and image, a decoder generates the answer.

    question   h = encoder([ENC] q_1 .. q_n), with cross attention to the image tokens
    answer     decoder([DEC] a_1 .. a_m [SEP]), with cross attention to h
    loss       mean over images of sum_a w_a CE(a | h), with label smoothing
    ranking    choose k candidates by their first token, return the one with the least loss

Source: models/blip_vqa.py and configs/vqa.yaml of BLIP. Generation in the original also attends to
the padding of the questions; this one does not.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elip_models.models.base import eval_mode
from elip_models.models.blip.base import BLIPEncoders, BLIPWithDecoder
from elip_models.models.blip.downstream import BLIPEncoderTask, BLIPTaskConfig, decoder_weights
from elip_models.models.blip.model import BLIP
from elip_models.models.downstream import TaskOutput, Weights, select_parts
from elip_models.models.layers.bert import masked_language_head, untied_decoder
from elip_models.models.layers.generated_answers import Answers, QuestionStates, score_candidates
from elip_models.models.layers.generation import Decoding
from elip_models.validation import Rate, Size

ANSWERS = Decoding(max_length=10, min_length=1)
"""Parameters of the original for answers."""


@dataclass(frozen=True, kw_only=True)
class BLIPVQAConfig(BLIPTaskConfig):
    """Hyper-parameters of BLIP for VQA: see `BLIPTaskConfig`."""

    image_size: Size = 480
    context_length: Size = 35
    drop_path: Rate = 0.1


class BLIPVQA(BLIPWithDecoder, BLIPEncoderTask):
    """BLIP with a question encoder and an answer decoder."""

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
    def from_pretraining(cls, weights: Weights, config: BLIPVQAConfig) -> Weights:
        """Map towers, decoder and language head of a pre-trained BLIP to this model."""
        towers = select_parts(weights, "encoders.visual.", "encoders.text.")
        return towers | decoder_weights(weights)

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Return the inputs of the base class and an answer of two tokens behind the first."""
        inputs = super().random_inputs(images)
        ids = inputs["input_ids"][:, None, -3:]
        weights = torch.ones(ids.shape[:2], device=ids.device)
        answers = {"answer_ids": ids, "answer_mask": torch.ones_like(ids)}
        return inputs | answers | {"answer_weights": weights}

    def fuse_question(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the states (B, L, D) of questions (B, L), fused with images (B, 3, H, W)."""
        image = self.encode_task_images(images, self.text_guidance(input_ids, attention_mask))
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
        """Return the loss of the answers to a batch of questions.

        Args:
            images: (B, 3, H, W).
            input_ids: (B, L), the questions.
            attention_mask: (B, L), 1 = real token.
            answer_ids: (B, A, La), up to A answers of each question.
            answer_mask: (B, A, La), 1 = real token.
            answer_weights: (B, A) fp32, 0 for a missing answer.
        """
        fused = self.fuse_question(images, input_ids, attention_mask)
        states = QuestionStates(fused, attention_mask)
        answers = Answers(answer_ids, answer_mask, answer_weights)
        logits = answers.logits(self.predict_answer, states)
        loss = answers.loss(logits, smoothing=self.config.label_smoothing)
        return TaskOutput(loss, logits)

    def predict_answer(self, input_ids: Tensor, mask: Tensor, states: QuestionStates) -> Tensor:
        """Return logits (B, La, V) of the next tokens of answers (B, La), see `Decoder`."""
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
        """Return the index (B,) of the best candidate of each question, always without dropout.

        Args:
            images: (B, 3, H, W).
            input_ids: (B, L), the questions.
            attention_mask: (B, L), 1 = real token.
            answer_ids: (C, La), the candidates, La at least 2.
            answer_mask: (C, La), 1 = real token.
            k: number of candidates to score completely, those with the most probable first tokens;
                B * k answers are decoded at once.
        """
        with eval_mode(self):
            fused = self.fuse_question(images, input_ids, attention_mask)
            states, answers = QuestionStates(fused, attention_mask), (answer_ids, answer_mask)
            smoothing = self.config.label_smoothing
            candidates = score_candidates(self.predict_answer, states, *answers, k, smoothing)
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
        """Generate an answer to each question, always without dropout.

        For the output and `decoding`, see `BLIPCaptioner.generate`.
        """
        with eval_mode(self):
            states = self.fuse_question(images, input_ids, attention_mask)
        return self.generate_from_tokens(states, attention_mask, decoding=decoding)
