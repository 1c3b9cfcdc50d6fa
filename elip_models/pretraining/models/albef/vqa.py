"""ALBEF fine-tuned for visual question answering: a decoder generates the answer.

    encoder  h = BERT on the question, fused with the image in its last layers
    decoder  p(a_t | a_<t, h): causal BERT with cross attention to h in every layer
    loss     mean over questions of sum_a w_a (-log p(a | h)), distilled from the momentum encoders

The decoder has as many layers as the fusion layers and starts from their weights. Its embeddings
are tied to its language head. Training cuts a question after 30 words and `context_length` tokens,
evaluation after 50 words.

Source: models/model_vqa.py, VQA.py, dataset/vqa_dataset.py and configs/VQA.yaml of ALBEF.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elip_models.pretraining.models.albef.downstream import ALBEFTask, ALBEFTaskConfig
from elip_models.pretraining.models.albef.model import ALBEFTowers
from elip_models.pretraining.models.downstream import AnsweringModel, TaskOutput, Weights
from elip_models.pretraining.models.layers.bert import BertTower, masked_language_head
from elip_models.pretraining.models.layers.generated_answers import Answers, QuestionStates
from elip_models.validation import Size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION_WORDS = 50
"""Words of a question that evaluation reads, as in the original."""


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


class ALBEFVQA(AnsweringModel, ALBEFTask):
    """ALBEF that generates answers, or ranks a list of candidate answers."""

    family = "albef_vqa"
    random_answers = 2
    counts_first_token_twice = True
    config_class = ALBEFVQAConfig
    config: ALBEFVQAConfig
    encoders_class = VQAEncoders
    encoders: VQAEncoders
    encoders_m: VQAEncoders | None
    fuse_question = ALBEFTask.encode_pair

    def tokenise(
        self, tokenizer: "PreTrainedTokenizerBase", captions: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return input_ids and attention_mask (B, L) of B questions to answer.

        L is the length of the longest one, at most `max_positions`: questions are not cut at
        `context_length`, only after 50 words.
        """
        from elip_models.pretraining.data import apply_caption_rule, tokenize

        rule = self.config.captions
        texts = [apply_caption_rule(text, rule, QUESTION_WORDS) for text in captions]
        tokens = tokenize(tokenizer, texts, self.config.max_tokens)
        longest = int(tokens["attention_mask"].sum(1).max())
        return {name: values[:, :longest] for name, values in tokens.items()}

    @classmethod
    def convert_encoders(cls, weights: Weights, config: ALBEFVQAConfig) -> Weights:
        """Map weights; fusion layers, embeddings and language head also go to the decoder."""
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

        For the answers, see `Answers`.
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

    def predict_answer(self, input_ids: Tensor, mask: Tensor, states: QuestionStates) -> Tensor:
        """Return logits (B, La, V) of the next tokens of answers (B, La), see `Decoder`."""
        return self.encoders.decode(input_ids, mask, states)
