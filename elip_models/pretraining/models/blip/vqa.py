"""BLIP fine-tuned for VQA: an encoder fuses question and image, a decoder generates the answer.

    question   h = encoder([ENC] q_1 .. q_n), with cross attention to the image tokens
    answer     decoder([DEC] a_1 .. a_m [SEP]), with cross attention to h
    loss       mean over images of sum_a w_a CE(a | h), with label smoothing
    ranking    choose k candidates by their first token, return the one with the least loss

Source: models/blip_vqa.py and configs/vqa.yaml of BLIP. Generation in the original also attends to
the padding of the questions; this one does not.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from elip_models.pretraining.models.base import eval_mode
from elip_models.pretraining.models.blip.base import BLIPEncoders, BLIPWithDecoder
from elip_models.pretraining.models.blip.downstream import (
    BLIPEncoderTask,
    BLIPTaskConfig,
    decoder_weights,
)
from elip_models.pretraining.models.blip.model import BLIP
from elip_models.pretraining.models.downstream import (
    AnsweringModel,
    TaskOutput,
    Weights,
    select_parts,
)
from elip_models.pretraining.models.layers.bert import masked_language_head
from elip_models.pretraining.models.layers.generated_answers import Answers, QuestionStates
from elip_models.pretraining.models.layers.generation import Decoding
from elip_models.validation import Rate, Size

ANSWERS = Decoding(max_length=10, min_length=1)
"""Parameters of the original for answers."""


@dataclass(frozen=True, kw_only=True)
class BLIPVQAConfig(BLIPTaskConfig):
    """Hyper-parameters of BLIP for VQA: see `BLIPTaskConfig`."""

    image_size: Size = 480
    context_length: Size = 35
    drop_path: Rate = 0.1


class BLIPVQA(AnsweringModel, BLIPWithDecoder, BLIPEncoderTask):
    """BLIP with a question encoder and an answer decoder."""

    family = "blip_vqa"
    config_class = BLIPVQAConfig
    config: BLIPVQAConfig
    pretraining = BLIP

    def __init__(self, config: BLIPVQAConfig) -> None:
        super().__init__(config, BLIPEncoders(config, projects=False))
        self.decoder = copy.deepcopy(self.encoders.text)
        self.language_head = masked_language_head(self.decoder)
        self.answer_smoothing = config.label_smoothing

    @classmethod
    def from_pretraining(cls, weights: Weights, config: BLIPVQAConfig) -> Weights:
        """Map towers, decoder and language head of a pre-trained BLIP to this model."""
        towers = select_parts(weights, "encoders.visual.", "encoders.text.")
        return towers | decoder_weights(weights)

    def fuse_question(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the states (B, L, D) of questions (B, L), fused with images (B, 3, H, W)."""
        image = self.encode_masked(images, self.text_guidance(input_ids, attention_mask))
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
        """Return the loss of the answers to questions; for the answers, see `Answers`."""
        fused = self.fuse_question(images, input_ids, attention_mask)
        answers = Answers(answer_ids, answer_mask, answer_weights)
        logits = answers.logits(self.predict_answer, QuestionStates(fused, attention_mask))
        return TaskOutput(answers.loss(logits, smoothing=self.answer_smoothing), logits)

    def predict_answer(self, input_ids: Tensor, mask: Tensor, states: QuestionStates) -> Tensor:
        """Return logits (B, La, V) of the next tokens of answers (B, La), see `Decoder`."""
        return self.predict(input_ids, mask, *states)

    @torch.no_grad()
    def generate_answers(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        decoding: Decoding = ANSWERS,
    ) -> Tensor:
        """Generate answers (B, L), always without dropout; see `BLIPCaptioner.generate`."""
        with eval_mode(self):
            states = self.fuse_question(images, input_ids, attention_mask)
        return self.generate_from_tokens(states, attention_mask, decoding=decoding)
