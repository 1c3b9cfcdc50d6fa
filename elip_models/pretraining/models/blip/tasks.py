"""BLIP fine-tuned for retrieval, VQA, NLVR2 and captioning.

    retrieval   rank by features, re-rank the best by ITM, whose negatives are drawn by similarities
                between online features, not to momentum features
    VQA         h = encoder([ENC] q_1 .. q_n), with cross attention to the image tokens;
                decoder([DEC] a_1 .. a_m [SEP]), with cross attention to h
    NLVR2       h = [ENC] t_1 .. t_n; every layer has two cross attentions, c_0 and c_1, one per
                image: h + mean(W_0 c_0, W_1 c_1); from layer `merge_from` on,
                h + W [W_0 c_0, W_1 c_1]. Two linear layers over [ENC]: 0 = false, 1 = true
    captioning  [DEC] "a picture of" c_1 .. c_n [SEP], with cross attention to the image tokens;
                the prompt's tokens have no loss

The image tower keeps all patches unless the config reduces it. If text guides the reduction, the
text tower encodes the question or statement alone first. No text guides the image tower of a
captioner, since the kept tokens would reveal the caption to the decoder. Generation of answers in
the original also attends to the padding of the questions; this one does not.

Source: models/blip_{retrieval,vqa,nlvr}.py, models/nlvr_encoder.py, BLIP_Decoder in models/blip.py
and configs/ of BLIP.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BertConfig, GenerationConfig
from transformers.models.bert.modeling_bert import BertAttention

from elip_models.pretraining.models.base import eval_mode
from elip_models.pretraining.models.blip.model import (
    BLIP,
    BLIPBase,
    BLIPCaptioner,
    BLIPConfig,
    BLIPDecoder,
    BLIPEncoders,
)
from elip_models.pretraining.models.downstream import (
    AnsweringModel,
    Classifier,
    MomentumRetrieval,
    TaskOutput,
    Weights,
    renamed,
)
from elip_models.pretraining.models.layers.bert import masked_language_head
from elip_models.pretraining.models.layers.distributed import all_gather
from elip_models.pretraining.models.layers.losses import IGNORED, language_loss, next_tokens
from elip_models.pretraining.models.layers.momentum import similarities
from elip_models.pretraining.models.momentum_model import (
    ContrastiveOutput,
    DistilledModel,
    Encoders,
)
from elip_models.towers.base import scoring_context
from elip_models.validation import Count, NonNegative, Rate, Share, Size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWERS = GenerationConfig(num_beams=3, max_length=10, min_length=1)
"""Parameters of the original for answers."""
TOWERS = ("encoders.visual.",), ("encoders.text.",)
DECODER = ("encoders.text.", "decoder."), ("decoder.",), ("language_head.",)
"""Rules of `renamed`: weights that decoder and encoder shared have the encoder's name."""


@dataclass(frozen=True, kw_only=True)
class BLIPFinetuningConfig(BLIPConfig):
    """Hyper-parameters of a fine-tuned BLIP; the defaults are the original's.

    For the other fields, see `BLIPConfig`. Text reduction is not available. `tie_decoder` has no
    effect, since a decoder has its own weights.

    Attributes:
        drop_path: stochastic depth rate of the last block of the image tower; linear from 0.
    """

    image_size: Size = 384
    text_reduction: None = None
    drop_path: Rate = 0.0

    def vit(self, **options: Any) -> VisionTransformer:
        """Create the image tower with stochastic depth."""
        return super().vit(drop_path_rate=self.drop_path, **options)


@dataclass(frozen=True, kw_only=True)
class BLIPRetrievalConfig(BLIPFinetuningConfig):
    """Hyper-parameters of BLIP for retrieval: see `BLIPFinetuningConfig`."""

    context_length: Size = 35
    alpha_warmup_epochs: NonNegative = 1.0
    negative_epsilon: Share = 0.0


class BLIPRetrieval(BLIPBase, MomentumRetrieval):
    """BLIP without a decoder, with image ids in its queue."""

    family = "blip_retrieval"
    config_class = BLIPRetrievalConfig
    pretraining = BLIP

    def __init__(self, config: BLIPRetrievalConfig) -> None:
        super().__init__(config, BLIPEncoders(config))

    def contrast(self, *pairs: Tensor | None) -> ContrastiveOutput:
        """Return the output of the base class, with similarities of the online features."""
        output = super().contrast(*pairs)
        with torch.no_grad():
            keys = (all_gather(features, self.config.gather).T for features in output.features)
            similar = similarities(output.features, tuple(keys), self.temperature)
        return output._replace(similar=similar)


@dataclass(frozen=True, kw_only=True)
class BLIPTaskConfig(BLIPFinetuningConfig):
    """Hyper-parameters of a BLIP without momentum encoders: see `BLIPFinetuningConfig`.

    The fields of momentum encoders, features and their queue have no effect.
    """

    momentum_reduction: Literal["none"] = "none"


class BLIPTask(BLIPBase, DistilledModel):
    """BLIP without momentum encoders and without contrastive features."""

    pretraining = BLIP
    ranks = False

    def __init__(self, config: BLIPTaskConfig, encoders: Encoders) -> None:
        super().__init__(config, encoders, distill=False)

    def text_guidance(self, input_ids: Tensor, mask: Tensor) -> Tensor | None:
        """Return the guidance (B, D) of texts (B, L), without gradient; None if no text guides."""
        if not self.reduction.is_guided:
            return None
        with scoring_context(self, input_ids):
            return self.text_cls(input_ids, mask)


@dataclass(frozen=True, kw_only=True)
class BLIPVQAConfig(BLIPTaskConfig):
    """Hyper-parameters of BLIP for VQA: see `BLIPTaskConfig`."""

    image_size: Size = 480
    context_length: Size = 35
    drop_path: Rate = 0.1


class BLIPVQA(AnsweringModel, BLIPDecoder, BLIPTask):
    """BLIP with a question encoder and an answer decoder."""

    family = "blip_vqa"
    config_class = BLIPVQAConfig

    def __init__(self, config: BLIPVQAConfig) -> None:
        super().__init__(config, BLIPEncoders(config, projects=False))
        self.decoder = copy.deepcopy(self.encoders.text)
        self.language_head = masked_language_head(self.decoder)
        self.answer_smoothing = config.label_smoothing

    @classmethod
    def from_pretraining(cls, weights: Weights, config: BLIPVQAConfig) -> Weights:
        """Map towers, decoder and language head of a pre-trained BLIP to this model."""
        return renamed(weights, TOWERS + DECODER)

    def fuse_question(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        image, _ = self.encode_image(images, self.text_guidance(input_ids, attention_mask))
        return self.fuse(input_ids, attention_mask, image)

    def decode_answers(
        self, ids: Tensor, mask: Tensor, states: Tensor, states_mask: Tensor, *, teacher: bool
    ) -> Tensor:
        return self.predict(ids, mask, states, states_mask)

    @torch.no_grad()
    def generate_answers(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        decoding: GenerationConfig = ANSWERS,
    ) -> Tensor:
        """Generate answers (B, L), always without dropout; see `BLIPCaptioner.generate`."""
        with eval_mode(self):
            states = self.fuse_question(images, input_ids, attention_mask)
        return self.generate_from_tokens(states, attention_mask, decoding=decoding)


@dataclass(frozen=True, kw_only=True)
class BLIPNLVR2Config(BLIPTaskConfig):
    """Hyper-parameters of BLIP for NLVR2; for the other fields, see `BLIPTaskConfig`.

    Attributes:
        merge_from: first layer that merges both images by a linear layer, not by their mean.
        context_length: in tokens; the original cuts statements after 40 words.
    """

    context_length: Size = 64
    drop_path: Rate = 0.1
    merge_from: Count = 6


class TwoImageOutput(nn.Module):
    """Output projections of two cross attentions, their merging, and the residual connection."""

    def __init__(self, outputs: tuple[nn.Module, nn.Module], merges: bool) -> None:
        super().__init__()
        self.dense0, self.dense1 = (output.dense for output in outputs)
        self.dropout, self.LayerNorm = outputs[0].dropout, outputs[0].LayerNorm
        width = self.dense0.out_features
        self.merge_layer = nn.Linear(2 * width, width) if merges else None

    def forward(self, first: Tensor, second: Tensor, hidden: Tensor) -> Tensor:
        """Merge the outputs of two attentions, (B, L, D) each, and add hidden (B, L, D)."""
        projected = self.dense0(first), self.dense1(second)
        if self.merge_layer is None:
            merged = sum(projected) / 2
        else:
            merged = self.merge_layer(torch.cat(projected, 2))
        return self.LayerNorm(self.dropout(merged) + hidden)


class TwoImageAttention(nn.Module):
    """Cross attention to two images in a BERT layer; its parts have the original's names."""

    def __init__(self, config: BertConfig, layer: int, merges: bool) -> None:
        super().__init__()
        both = [BertAttention(config, layer_idx=layer, is_cross_attention=True) for _ in range(2)]
        self.self0, self.self1 = (attention.self for attention in both)
        self.output = TwoImageOutput((both[0].output, both[1].output), merges)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        image_tokens: Tensor,
        *_: Any,
        **named: Any,
    ) -> tuple[Tensor, None]:
        """Attend to image_tokens (B, 2N, D) of two images -> (B, L, D), and None for the weights.

        As in transformers, other arguments are unused.
        """
        images = image_tokens.chunk(2, dim=1)
        first, _ = self.self0(hidden, images[0])
        second, _ = self.self1(hidden, images[1])
        return self.output(first, second, hidden), None


class NLVR2Encoders(BLIPEncoders):
    """Towers of BLIP, with two cross attentions in each layer of the text tower."""

    def __init__(self, config: BLIPNLVR2Config) -> None:
        super().__init__(config, projects=False)
        for i, layer in enumerate(self.text.layers):
            bert = layer.crossattention.self.config
            layer.crossattention = TwoImageAttention(bert, i, i >= config.merge_from)
            layer.crossattention.apply(self.text.init)


class BLIPNLVR2(Classifier, BLIPTask):
    """BLIP with an encoder of two images and a classifier."""

    family, task = "blip_nlvr2", "nlvr2"
    config_class = BLIPNLVR2Config
    images_per_text = 2

    def __init__(self, config: BLIPNLVR2Config) -> None:
        super().__init__(config, NLVR2Encoders(config))
        width = config.text_width
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    @classmethod
    def from_pretraining(cls, weights: Weights, config: BLIPNLVR2Config) -> Weights:
        """Map weights of a pre-trained BLIP to this model; each cross attention is copied twice.

        The merging layers and the classifier keep their initial weights.
        """
        result = {}
        for name, weight in renamed(weights, TOWERS).items():
            for i in (0, 1):
                copied = name.replace("crossattention.self.", f"crossattention.self{i}.")
                copied = copied.replace("attention.output.dense.", f"attention.output.dense{i}.")
                result[copied if "crossattention." in name else name] = weight
        return result

    def logits(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        guides = self.text_guidance(input_ids, attention_mask)
        guides = None if guides is None else guides.repeat_interleave(2, 0)
        tokens, _ = self.encode_image(images.flatten(0, 1), guides)
        pairs = tokens.unflatten(0, (-1, 2)).flatten(1, 2)
        return self.classifier(self.fuse(input_ids, attention_mask, pairs)[:, 0])


@dataclass(frozen=True, kw_only=True)
class BLIPCaptioningConfig(BLIPTaskConfig):
    """Hyper-parameters of BLIP for captioning; for the other fields, see `BLIPTaskConfig`.

    Attributes:
        prompt: start of every caption, in training and in generation.
        prompt_tokens: number of its tokens, see `BLIPCaptioning.fit_tokenizer`.
        without_text: 'vision' lets a schedule reduce by the image alone.
    """

    context_length: Size = 40
    without_text: Literal["dense", "vision"] = "vision"
    prompt: str = "a picture of "
    prompt_tokens: Count = 3


class BLIPCaptioning(BLIPCaptioner, BLIPTask):
    """BLIP with an image tower and a decoder."""

    family, task = "blip_captioning", "captioning"
    config_class = BLIPCaptioningConfig

    def __init__(self, config: BLIPCaptioningConfig) -> None:
        super().__init__(config, Encoders(config, projects=False))
        self.decoder = config.text_tower()
        self.language_head = masked_language_head(self.decoder)

    @classmethod
    def from_pretraining(cls, weights: Weights, config: BLIPCaptioningConfig) -> Weights:
        """Map image tower, decoder and language head of a pre-trained BLIP to this model."""
        return renamed(weights, (("encoders.visual.",), *DECODER))

    @classmethod
    def fit_tokenizer(
        cls, tokenizer: "PreTrainedTokenizerBase", context_length: int
    ) -> dict[str, int]:
        """Return the config fields; set `prompt_tokens` as well for a prompt of your own."""
        sizes = super().fit_tokenizer(tokenizer, context_length)
        return sizes | {"prompt_tokens": len(_tokens(tokenizer, cls.config_class.prompt))}

    def prompt_ids(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Return the ids of the prompt alone; ValueError if their number is not `prompt_tokens`."""
        config = self.config
        ids = _tokens(tokenizer, config.prompt)
        if len(ids) != config.prompt_tokens:
            raise ValueError(
                f"prompt_tokens: expected {len(ids)}, the tokens of prompt = {config.prompt!r}, "
                f"got {config.prompt_tokens}"
            )
        return ids

    def read_vocabulary_(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Check that the prompt has `prompt_tokens` tokens, see `prompt_ids`."""
        self.prompt_ids(tokenizer)

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> TaskOutput:
        """Return the loss of captions (B, L), with the prompt after the first token."""
        logits = self.predict(input_ids, attention_mask, self.encode_image(images)[0])
        labels = next_tokens(input_ids, attention_mask)
        labels[:, : self.config.prompt_tokens] = IGNORED
        loss = language_loss(
            logits, labels, smoothing=self.config.label_smoothing, gather=self.config.gather
        )
        return TaskOutput(loss, logits)


def _tokens(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    return tokenizer(prompt.rstrip()).input_ids[1:-1]
