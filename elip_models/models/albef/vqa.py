"""ALBEF fine-tuned for visual question answering: a decoder writes the answer.

    encoder  BERT, the question, whose last layers see the image
    decoder  BERT of as many layers, which begins as those: causal, each layer attending to the
             encoder's states; embeddings of its own, tied to its language head

Source: ALBEF's models/model_vqa.py, VQA.py and configs/VQA.yaml.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elip_models.models.albef.downstream import ALBEFTask, ALBEFTaskConfig
from elip_models.models.albef.model import ALBEFTowers
from elip_models.models.base import eval_mode
from elip_models.models.layers.bert import BertTower, masked_language_head
from elip_models.models.layers.distillation import Weights
from elip_models.models.layers.generated_answers import Answers, States, score_candidates
from elip_models.models.task_output import TaskOutput
from elip_models.validation import Size


@dataclass(frozen=True, kw_only=True)
class ALBEFVQAConfig(ALBEFTaskConfig):
    """Hyper-parameters of an ALBEF for VQA; the defaults are the official code's.

    The fields: see `ALBEFTaskConfig`; the decoder has as many layers as fuse in pre-training.
    """

    context_length: Size = 25


class AnswerEncoders(ALBEFTowers):
    """The parts that have a momentum copy; decoder and language head are among them."""

    def __init__(self, config: ALBEFVQAConfig) -> None:
        super().__init__(config, projects=False)
        bert = config.bert
        bert.num_hidden_layers = len(self.fuses)
        self.writes = range(len(self.fuses))
        self.decoder = BertTower(bert, cross_attention=self.writes)
        self.language_head = masked_language_head(self.decoder)

    def decode(self, input_ids: Tensor, mask: Tensor, states: States) -> Tensor:
        """Predict the token behind each of an answer, input_ids, mask (B, La), from the states of
        its question -> (B, La, V).
        """
        hidden = self.decoder.embed(input_ids)
        written = self.decoder.run(hidden, mask, self.writes, *states, causal=True)
        return self.language_head(written)


class ALBEFVQA(ALBEFTask):
    """ALBEF that writes answers, or ranks those of a list."""

    family = "albef_vqa"
    task = "vqa"
    config_class = ALBEFVQAConfig
    config: ALBEFVQAConfig
    encoders_class = AnswerEncoders
    encoders: AnswerEncoders
    encoders_m: AnswerEncoders | None

    @classmethod
    def encoders_from_pretraining(cls, weights: Weights, config: ALBEFVQAConfig) -> Weights:
        """The decoder begins as pre-training's fusion layers, embeddings and language head."""
        begun = super().encoders_from_pretraining(weights, config)
        fuses = {f"text.layers.{i}.": i - config.text_layers for i in config.fusion_layers}
        for name, weight in weights.items():
            layer = next((part for part in fuses if name.startswith(part)), None)
            if layer is not None:
                rest = name.removeprefix(layer)
                begun[f"decoder.layers.{fuses[layer]}.{rest}"] = weight
            elif name.startswith("text.embeddings."):
                begun[name.replace("text.", "decoder.", 1)] = weight
            elif name.startswith("language_head."):
                begun[name] = weight
        return begun

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        answer_weights: Tensor,
    ) -> TaskOutput:
        """Compute the loss of a batch; in training the momentum encoders move on.

        Args:
            images: (B, 3, H, W).
            input_ids, attention_mask: (B, L), 1 = real, of the questions.
            answer_ids, answer_mask: (B, A, La), 1 = real, of up to A answers of each.
            answer_weights: (B, A) fp32, 0 where there is no answer.
        """
        answers = Answers(answer_ids, answer_mask, answer_weights)
        fused, fused_m = self.read_twice(images, input_ids, attention_mask)
        logits = answers.logits(self.encoders.decode, States(fused, attention_mask))
        teacher = None
        if fused_m is not None:
            with torch.no_grad():
                states = States(fused_m, attention_mask)
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
        """Choose an answer for each question, without dropout, whatever the mode of the model.

        Args:
            images, input_ids, attention_mask: as of `forward`.
            answer_ids, answer_mask: (C, La), 1 = real, of the candidates, La at least 2.
            k: candidates that are written whole, those of the likeliest first token.

        Returns:
            (B,) int64, numbers of candidates.
        """
        with eval_mode(self):
            states = States(self.read(images, input_ids, attention_mask), attention_mask)
            answers = answer_ids, answer_mask
            candidates = score_candidates(self.encoders.decode, states, *answers, k)
        return candidates.best(candidates.first + candidates.whole)

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Also two answers, of two tokens behind the first."""
        inputs = super().random_inputs(images)
        ids = inputs["input_ids"][:, -3:].unsqueeze(1).repeat(1, 2, 1)
        weights = torch.full(ids.shape[:2], 0.5, device=ids.device)
        answers = {"answer_ids": ids, "answer_mask": torch.ones_like(ids)}
        return inputs | answers | {"answer_weights": weights}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        self.encoders.decoder.set_grad_checkpointing(enable)
