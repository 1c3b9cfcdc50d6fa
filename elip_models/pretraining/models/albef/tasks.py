"""ALBEF fine-tuned for retrieval, VQA, visual entailment (SNLI-VE) and NLVR2.

    retrieval   rank by features, re-rank the best by ITM
    VQA         a decoder generates the answer: p(a_t | a_<t, h), causal BERT with cross attention
                to h, the question fused with its image, in every layer
    entailment  logits W_2 relu(W_1 h_cls), where h is the text fused with its image
    NLVR2       the same for a statement about two images

The text guides the image tower. The momentum copies of the encoders and of the head give soft
targets (momentum distillation).

The decoder of VQA has as many layers as the fusion layers and starts from their weights. Its
embeddings are tied to its language head. Training cuts a question after 30 words and
`context_length` tokens, evaluation after 50 words. In NLVR2, the image tower encodes both images.
Each fusion layer becomes two layers, one for each image, which share the keys and values of their
cross attention. The official code duplicates the layers in Pretrain_nlvr.py, which continues
pre-training on pairs of images before fine-tuning.

Source: model_retrieval.py, model_vqa.py, model_ve.py, model_nlvr.py and the configs of ALBEF.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from transformers import BertConfig

from elip_models.pretraining.models.albef.model import (
    ALBEF,
    ALBEFConfig,
    ALBEFMatcher,
    ALBEFTowers,
)
from elip_models.pretraining.models.downstream import (
    AnsweringModel,
    MomentumRetrieval,
    TaskOutput,
    Weights,
    encoder_weights,
)
from elip_models.pretraining.models.layers.bert import BertTower, masked_language_head
from elip_models.pretraining.models.layers.losses import at_least_fp32, distilled_cross_entropy
from elip_models.pretraining.models.momentum_model import DistilledModel
from elip_models.validation import NonNegative, Size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION_WORDS = 50
"""Words of a question that evaluation reads, as in the original."""


@dataclass(frozen=True, kw_only=True)
class ALBEFFinetuningConfig(ALBEFConfig):
    """Hyper-parameters of a fine-tuned ALBEF; the defaults are the official code's.

    Fields of parts that a task lacks, such as masked tokens, have no effect.

    Attributes:
        distill: train on the predictions of the momentum encoders too, with the weight alpha.
    """

    image_size: Size = 384
    distill: bool = True

    @property
    def full_alpha(self) -> float:
        """Weight of the momentum targets after its warm-up; 0 without distillation."""
        return self.alpha if self.distill else 0.0


class ALBEFRetrieval(MomentumRetrieval, ALBEFMatcher):
    """ALBEF without a language head, with image ids in its queue."""

    family = "albef_retrieval"
    config_class = ALBEFFinetuningConfig
    pretraining = ALBEF


class ALBEFTask(DistilledModel):
    """ALBEF without contrastive features, with a head over the fused text.

    Without `distill`, `momentum_reduction` of its config has no effect.
    """

    task: ClassVar[str]
    pretraining = ALBEF
    encoders_class: ClassVar[type[ALBEFTowers]]
    ranks = False

    def __init__(self, config: ALBEFFinetuningConfig) -> None:
        super().__init__(config, self.encoders_class(config), distill=config.distill)

    @classmethod
    def from_pretraining(cls, weights: Weights, config: ALBEFFinetuningConfig) -> Weights:
        """Map weights of a pre-trained `ALBEF`, and of its momentum encoders, to this model."""
        return encoder_weights(weights, cls.encoder_rules(config), distill=config.distill)

    @classmethod
    def encoder_rules(cls, config: ALBEFFinetuningConfig) -> list[tuple[str, ...]]:
        """Return the rules for weights inside the encoders, see `renamed`."""
        return [("visual.",), ("text.",)]

    def encode_pair(self, images: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Fuse texts (B, L) with their images -> (B, L, D), without distillation."""
        text = self.encode_text(input_ids, mask)
        image, _ = self.encode_image(*self._tower_inputs(images, text[:, 0]))
        return self.encoders.fuse(text, mask, image)

    def encode_pair_with_momentum(
        self, images: Tensor, input_ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Fuse texts with their images, for a loss, by the online and the momentum encoders.

        In training, this updates the momentum encoders first. Without them, the second result is
        None.
        """
        momentum = self.encoders_m
        if momentum is None:
            return self.encode_pair(images, input_ids, mask), None
        text = self.encode_text(input_ids, mask)
        if self.training:
            self._update_momentum()
        image, image_m = self._encode_images(*self._tower_inputs(images, text[:, 0]))
        with torch.no_grad():
            text_m = momentum.encode_text(input_ids, mask)
            fused_m = momentum.fuse(text_m, mask, image_m)
        return self.encoders.fuse(text, mask, image), fused_m

    def _tower_inputs(self, images: Tensor, text_cls: Tensor) -> tuple[Tensor, Tensor]:
        """Return one image (N, 3, H, W) and its guidance (N, D) after the other; B or 2B images."""
        if self.images_per_text == 1:
            return images, text_cls
        return images.flatten(0, 1), text_cls.repeat_interleave(self.images_per_text, 0)


@dataclass(frozen=True, kw_only=True)
class ALBEFVQAConfig(ALBEFFinetuningConfig):
    """Hyper-parameters of an ALBEF for VQA; the defaults are the official code's."""

    context_length: Size = 25


class VQAEncoders(ALBEFTowers):
    """Parts that have a momentum copy: both towers, the decoder and the language head."""

    def __init__(self, config: ALBEFVQAConfig) -> None:
        super().__init__(config, projects=False)
        bert = config.bert
        bert.num_hidden_layers = len(self.fusion_layers)
        self.decoder = BertTower(bert, cross_attention=range(bert.num_hidden_layers))
        self.language_head = masked_language_head(self.decoder)

    def decode(
        self, input_ids: Tensor, mask: Tensor, states: Tensor, states_mask: Tensor
    ) -> Tensor:
        """Return logits (B, La, V) of the next tokens, see `AnsweringModel.decode_answers`."""
        image = {"image_tokens": states, "image_mask": states_mask}
        hidden = self.decoder.run(self.decoder.embed(input_ids), mask, **image, causal=True)
        return self.language_head(hidden)


class ALBEFVQA(AnsweringModel, ALBEFTask):
    """ALBEF that generates answers, or ranks a list of candidate answers."""

    family = "albef_vqa"
    counts_first_token_twice = True
    config_class = ALBEFVQAConfig
    encoders_class = VQAEncoders
    fuse_question = ALBEFTask.encode_pair
    fuse_for_loss = ALBEFTask.encode_pair_with_momentum

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
    def encoder_rules(cls, config: ALBEFVQAConfig) -> list[tuple[str, ...]]:
        """Fusion layers, embeddings and language head also go to the decoder."""
        layers = enumerate(config.fusion_layers)
        return [
            *super().encoder_rules(config),
            *((f"text.layers.{theirs}.", f"decoder.layers.{ours}.") for ours, theirs in layers),
            ("text.embeddings.", "decoder.embeddings."),
            ("language_head.",),
        ]

    def decode_answers(
        self, ids: Tensor, mask: Tensor, states: Tensor, states_mask: Tensor, *, teacher: bool
    ) -> Tensor:
        encoders = self.encoders_m if teacher else self.encoders
        return encoders.decode(ids, mask, states, states_mask)


@dataclass(frozen=True, kw_only=True)
class ALBEFClassifierConfig(ALBEFFinetuningConfig):
    """Hyper-parameters of an ALBEF classifier; other fields: see `ALBEFFinetuningConfig`."""

    num_classes: Size


class ClassifierEncoders(ALBEFTowers):
    """Parts that have a momentum copy: both towers and the classifier."""

    def __init__(self, config: ALBEFClassifierConfig) -> None:
        super().__init__(config, projects=False)
        width = config.text_width
        self.classifier = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.num_classes)
        )

    def classify(self, fused: Tensor) -> Tensor:
        """Return logits (B, num_classes) of fused texts (B, L, D), in fp32 or in fp64."""
        return at_least_fp32(self.classifier(fused[:, 0]))


class ALBEFClassifier(ALBEFTask):
    """ALBEF with a classifier over the fused text."""

    encoders_class = ClassifierEncoders

    def logits(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (B, num_classes) in fp32; the arguments are those of `forward`."""
        return self.encoders.classify(self.encode_pair(images, input_ids, attention_mask))

    def forward(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> TaskOutput:
        """Return the loss of a batch; in training, update the momentum encoders.

        NLVR2 has images (B, 2, 3, H, W). labels (B,) int64 are the correct classes.
        """
        fused, fused_m = self.encode_pair_with_momentum(images, input_ids, attention_mask)
        logits, teacher = self.encoders.classify(fused), None
        if fused_m is not None:
            with torch.no_grad():
                teacher = self.encoders_m.classify(fused_m)
        loss = distilled_cross_entropy(logits, labels, teacher, self.alpha).mean()
        return TaskOutput(loss, logits)


@dataclass(frozen=True, kw_only=True)
class ALBEFEntailmentConfig(ALBEFClassifierConfig):
    """Hyper-parameters of an ALBEF for entailment; the defaults are the official code's."""

    num_classes: Size = 3
    alpha_warmup_epochs: NonNegative = 0.0


class ALBEFEntailment(ALBEFClassifier):
    """ALBEF that classifies whether an image entails a hypothesis.

    The classes are entailment, neutral and contradiction, in reverse order of the official weights.
    """

    family, task = "albef_entailment", "entailment"
    config_class = ALBEFEntailmentConfig


@dataclass(frozen=True, kw_only=True)
class ALBEFNLVR2Config(ALBEFClassifierConfig):
    """Hyper-parameters of an ALBEF for NLVR2; the defaults are the official code's.

    `text_depth` is the depth of the pre-trained model, whose fusion layers are duplicated here.
    """

    num_classes: Size = 2

    @property
    def fusion_layers(self) -> range:
        """Layers that attend to an image: twice those of the pre-trained model."""
        return range(self.text_layers, 2 * self.text_depth - self.text_layers)

    @property
    def bert(self) -> BertConfig:
        """Config of the text encoder with duplicated fusion layers."""
        bert = super().bert
        bert.num_hidden_layers = self.fusion_layers.stop
        return bert


class NLVR2Encoders(ClassifierEncoders):
    """Encoders whose fusion layers attend to the first and the second image in turn."""

    def __init__(self, config: ALBEFNLVR2Config) -> None:
        super().__init__(config)
        for i in self.fusion_layers[::2]:
            first, second = (self.text.layers[j].crossattention.self for j in (i, i + 1))
            first.key, first.value = second.key, second.value

    def fuse(self, hidden: Tensor, mask: Tensor, image_tokens: Tensor) -> Tensor:
        """Return texts (B, L, D) fused with image_tokens (2B, N, D), two images in a row each."""
        images = image_tokens[0::2], image_tokens[1::2]
        for i in self.fusion_layers:
            turn = (i - self.fusion_layers.start) % 2
            hidden = self.text.run(hidden, mask, range(i, i + 1), images[turn])
        return hidden


class ALBEFNLVR2(ALBEFClassifier):
    """ALBEF that classifies a statement about two images as false (0) or true (1)."""

    family, task = "albef_nlvr2", "nlvr2"
    config_class = ALBEFNLVR2Config
    encoders_class = NLVR2Encoders
    images_per_text = 2

    @classmethod
    def encoder_rules(cls, config: ALBEFNLVR2Config) -> list[tuple[str, ...]]:
        """Each pre-trained fusion layer goes to the two layers that replace it."""
        n = config.text_layers
        alone = [(f"text.layers.{i}.",) for i in range(n)]
        pairs = [
            (f"text.layers.{i}.", f"text.layers.{2 * i - n}.", f"text.layers.{2 * i - n + 1}.")
            for i in range(n, config.text_depth)
        ]
        return [("visual.",), ("text.embeddings.",), *alone, *pairs]
