"""ALBEF fine-tuned for visual question answering: a decoder generates the answer.

    encoder  h = BERT on the question, fused with the image in its last layers
    decoder  p(a_t | a_<t, h): causal BERT with cross attention to h in every layer
    loss     mean over questions of sum_a w_a (-log p(a | h)), distilled from the momentum encoders

The decoder has as many layers as the fusion layers and starts from their weights. Its embeddings
are tied to its language head.

Source: models/model_vqa.py, VQA.py and configs/VQA.yaml of ALBEF.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elip_models.models.albef.downstream import ALBEFTask, ALBEFTaskConfig
from elip_models.models.albef.model import ALBEFTowers
from elip_models.models.base import eval_mode
from elip_models.models.downstream import TaskOutput, Weights
from elip_models.models.layers.bert import BertTower, masked_language_head
from elip_models.models.layers.generated_answers import Answers, QuestionStates, score_candidates
from elip_models.validation import Size


@dataclass(frozen=True, kw_only=True)
class ALBEFVQAConfig(ALBEFTaskConfig):
    """Hyper-parameters of an ALBEF for VQA; the defaults are the official code's."""

    context_length: Size = 25


class VQAEncoders(ALBEFTowers):
    """Parts that have a momentum copy: both towers, the decoder and the language head."""

    def __init__(self, config: ALBEFVQAConfig) -> None:
        super().__init__(config, projects=False)
        bert = config.bert
        bert.num_hidden_layers = len(self.fusion_layers)
        self.decoder_layers = range(len(self.fusion_layers))
        self.decoder = BertTower(bert, cross_attention=self.decoder_layers)
        self.language_head = masked_language_head(self.decoder)

    def decode(self, input_ids: Tensor, mask: Tensor, states: QuestionStates) -> Tensor:
        """Return logits (B, La, V) of the next tokens of answers (B, La), see `Decoder`."""
        hidden = self.decoder.embed(input_ids)
        answers = self.decoder.run(hidden, mask, self.decoder_layers, *states, causal=True)
        return self.language_head(answers)


class ALBEFVQA(ALBEFTask):
    """ALBEF that generates answers, or ranks a list of candidate answers."""

    family = "albef_vqa"
    task = "vqa"
    config_class = ALBEFVQAConfig
    config: ALBEFVQAConfig
    encoders_class = VQAEncoders
    encoders: VQAEncoders
    encoders_m: VQAEncoders | None

    @classmethod
    def convert_encoders(cls, weights: Weights, config: ALBEFVQAConfig) -> Weights:
        """Map pre-trained weights to the encoders and the decoder.

        The decoder gets the fusion layers, the embeddings and the language head of pre-training.
        """
        found = super().convert_encoders(weights, config)
        decoder_layers = {f"text.layers.{i}.": i - config.text_layers for i in config.fusion_layers}
        for name, weight in weights.items():
            layer = next((part for part in decoder_layers if name.startswith(part)), None)
            if layer is not None:
                rest = name.removeprefix(layer)
                found[f"decoder.layers.{decoder_layers[layer]}.{rest}"] = weight
            elif name.startswith("text.embeddings."):
                found[name.replace("text.", "decoder.", 1)] = weight
            elif name.startswith("language_head."):
                found[name] = weight
        return found

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        answer_weights: Tensor,
    ) -> TaskOutput:
        """Return the loss of a batch; in training, update the momentum encoders.

        Args:
            images: (B, 3, H, W).
            input_ids: (B, L), the questions.
            attention_mask: (B, L), 1 = real token.
            answer_ids: (B, A, La), up to A answers of each question.
            answer_mask: (B, A, La), 1 = real token.
            answer_weights: (B, A) fp32, 0 for a missing answer.
        """
        answers = Answers(answer_ids, answer_mask, answer_weights)
        fused, fused_m = self.encode_pair_with_momentum(images, input_ids, attention_mask)
        logits = answers.logits(self.encoders.decode, QuestionStates(fused, attention_mask))
        teacher = None
        if fused_m is not None:
            with torch.no_grad():
                states = QuestionStates(fused_m, attention_mask)
                teacher = answers.logits(self.encoders_m.decode, states)
        loss = answers.loss(logits, teacher, self.alpha)
        return TaskOutput(loss, logits)

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
            k: number of candidates to score completely, those with the most probable first tokens.
        """
        with eval_mode(self):
            fused = self.encode_pair(images, input_ids, attention_mask)
            states, answers = QuestionStates(fused, attention_mask), (answer_ids, answer_mask)
            candidates = score_candidates(self.encoders.decode, states, *answers, k)
        return candidates.best(candidates.first + candidates.whole)

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Return the inputs of the base class and two answers of two tokens behind the first."""
        inputs = super().random_inputs(images)
        ids = inputs["input_ids"][:, -3:].unsqueeze(1).repeat(1, 2, 1)
        weights = torch.full(ids.shape[:2], 0.5, device=ids.device)
        answers = {"answer_ids": ids, "answer_mask": torch.ones_like(ids)}
        return inputs | answers | {"answer_weights": weights}
