"""BLIP with a text-guided, token-reduced image tower, for pre-training.

    text     BERT on the text alone; t_cls, its CLS output, guides the image tower
    image    ViT(image), reduced by ELIP under t_cls
    encoder  the same BERT on [ENC] and the text, with cross attention to the image tokens
    decoder  causal BERT on [DEC] and the text; only its self-attention has its own weights
    loss     ITC (soft targets, queue) + ITM (hard negatives) + LM (label smoothing)

Every layer of the text tower has cross attention. `models/momentum_model.py` defines ITC and ITM,
`layers/losses.py` defines LM.
Source: BLIP (Li et al., 2022), models/blip.py and models/med.py of the official code; ELIP, section
3, and its official BLIP code.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.models.bert.modeling_bert import BertOnlyMLMHead
from transformers.models.blip.modeling_blip_text import BlipTextEmbeddings

from elip_models.pretraining.models.base import eval_mode
from elip_models.pretraining.models.config import TextReductionConfig, TokenId
from elip_models.pretraining.models.cross_modal import CrossModalModel
from elip_models.pretraining.models.layers.bert import (
    BertTower,
    masked_language_head,
    tied_decoder,
)
from elip_models.pretraining.models.layers.generation import generate
from elip_models.pretraining.models.layers.losses import language_loss, next_tokens
from elip_models.pretraining.models.momentum_model import (
    ContrastiveOutput,
    Encoders,
    MomentumConfig,
    MomentumModel,
    MomentumOutput,
)
from elip_models.validation import NonNegative, Share, Size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CAPTIONS = GenerationConfig(num_beams=3, max_length=30, min_length=10)
"""Parameters of the original for captions; lengths include [DEC], the prompt and the end token."""


@dataclass(frozen=True, kw_only=True)
class BLIPConfig(MomentumConfig, TextReductionConfig):
    """Hyper-parameters of a BLIP model; the defaults are the paper's.

    For the other fields, see `MomentumConfig`, whose alpha weights the momentum targets of ITC, and
    `TextReductionConfig`. Text reduction applies to all three passes of `BLIP.forward`, not to the
    momentum encoder.

    Attributes:
        decoder_token_id: id of [DEC], which replaces the first token of a generated text.
        encoder_token_id: id of [ENC], which replaces the first token of a fused text.
        tie_decoder: share all weights but self-attention between decoder and encoder, as in
            pre-training. False gives the decoder its own weights, as fine-tuned models have.
    """

    captions: Literal["plain", "albef", "blip", "blip_question"] = "blip"
    vocab_size: Size = 30524
    decoder_token_id: TokenId = 30522
    encoder_token_id: TokenId = 30523
    queue_size: Size = 57600
    alpha_warmup_epochs: NonNegative = 2.0
    label_smoothing: Share = 0.1
    negative_epsilon: Share = 1e-4
    tie_decoder: bool = True

    def text_tower(self) -> BertTower:
        """Create a text tower with cross attention in every layer."""
        return BertTower(self.bert, range(self.text_depth), embeddings=BlipTextEmbeddings)


class BLIPEncoders(Encoders):
    """Parts that have a momentum copy: image tower and text tower."""

    def __init__(self, config: BLIPConfig, *, projects: bool = True) -> None:
        super().__init__(config, projects=projects)
        self.text = config.text_tower()

    def encode_text(
        self, input_ids: Tensor, mask: Tensor, image_tokens: Tensor | None = None
    ) -> Tensor:
        """Encode texts (B, L) -> (B, L, D), with cross attention to image_tokens, if not None."""
        return self.text.run(self.text.embed(input_ids), mask, image_tokens=image_tokens)


class BLIPBase(CrossModalModel):
    """BLIP that can fuse a text with an image, from [ENC] on.

    Attributes:
        adds_similarity: re-ranking adds the similarity of features to the score of ITM.
    """

    adds_similarity: ClassVar[bool] = True
    masks_text = False
    fuses_ids = True

    def fuse(self, text: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """Return the ids `text` (B, L), with [ENC] first, fused with the image -> (B, L, D)."""
        ids = replace_first_token(text, self.config.encoder_token_id)
        return self.encoders.encode_text(ids, mask, image)

    @classmethod
    def fit_tokenizer(
        cls, tokenizer: "PreTrainedTokenizerBase", context_length: int
    ) -> dict[str, int]:
        """Add [DEC] and [ENC] to the tokenizer, and return the config fields that follow."""
        tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
        decoder, encoder = tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"])
        sizes = super().fit_tokenizer(tokenizer, context_length)
        return sizes | {"decoder_token_id": decoder, "encoder_token_id": encoder}


class BLIPDecoder(BLIPBase):
    """BLIP with a causal text tower `decoder` and a language head, which generate from [DEC] on."""

    decoder: BertTower
    language_head: BertOnlyMLMHead

    def predict(
        self,
        input_ids: Tensor,
        mask: Tensor,
        states: Tensor,
        states_mask: Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, L, V) of the next token after [DEC] and each prefix of the text.

        Cross attention reads `states` (B, N, D), of an image or of a fused question with its mask.
        """
        hidden = self.embed_prefix(input_ids)
        return self.language_head(
            self.decoder.run(hidden, mask, None, states, states_mask, causal=True)
        )

    def embed_prefix(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings (B, L, D) of the decoder, of [DEC] and the following ids."""
        return self.decoder.embed(replace_first_token(input_ids, self.config.decoder_token_id))

    def generate_from_tokens(
        self,
        states: Tensor,
        states_mask: Tensor | None = None,
        *,
        prompt: Tensor | None = None,
        decoding: GenerationConfig = CAPTIONS,
    ) -> Tensor:
        """Generate text from `states`, see `predict` and `BLIPCaptioner.generate`."""
        config, B = self.config, len(states)
        ids = torch.full((B, 1), config.decoder_token_id, device=states.device)
        if prompt is not None:
            if (prompt == config.pad_token_id).any():
                raise ValueError(
                    f"prompt: expected ids without padding, got {prompt.tolist()}; pass prompts of "
                    "different lengths in separate batches"
                )
            ids = torch.cat([ids, prompt], dim=1)
        with eval_mode(self):
            return generate(
                self.decoder,
                self.language_head,
                ids,
                (states, states_mask),
                end_token_id=config.sep_token_id,
                decoding=decoding,
            )


class BLIPCaptioner(BLIPDecoder):
    """BLIP that generates text from an image."""

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        *,
        prompt: Tensor | None = None,
        text_cls: Tensor | None = None,
        decoding: GenerationConfig = CAPTIONS,
    ) -> Tensor:
        """Generate captions, always without dropout.

        Args:
            images: (B, 3, H, W), each encoded once.
            prompt: (B, P) ids that the captions start with, without padding, first or last special
                token; None for no prompt.
            text_cls: (B, D) that guides the image tower, see `encode_image`; None: the config's
                `without_text` determines the kept patches.
            decoding: beam search or sampling, and the lengths.

        Returns:
            (B, L) int64: [DEC], the prompt, the caption and its end token, then padding.

        Raises:
            ValueError: `prompt` contains padding, or the text is longer than the positions of the
                text tower.
        """
        with eval_mode(self):
            tokens, _ = self.encode_image(images, text_cls)
        return self.generate_from_tokens(tokens, prompt=prompt, decoding=decoding)


@dataclass
class BLIPOutput(MomentumOutput):
    """Output of a step, with the loss of LM."""

    loss_lm: Tensor


class BLIP(BLIPCaptioner, MomentumModel):
    """Image and text towers, decoder, momentum copies of the towers, and the feature queue.

    Only `forward` drops text tokens by `config.text_reduction`, in ITC, ITM and LM. 'learned' adds
    a dense forward of the image tower before the text, without gradient.
    """

    family = "blip"
    config_class = BLIPConfig
    output_class = BLIPOutput

    def __init__(self, config: BLIPConfig) -> None:
        super().__init__(config, BLIPEncoders(config))
        self.text_reduction = config.text_token_reduction
        text = self.encoders.text
        self.decoder = tied_decoder(text) if config.tie_decoder else copy.deepcopy(text)
        self.language_head = masked_language_head(self.decoder)

    def encode_text_reduced(self, images: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Encode texts alone -> (B, K, D), without the tokens that `text_reduction` drops."""
        image_cls = self.dense_cls(images) if self.config.image_guides_text else None
        return self._run_text(input_ids, mask, image_cls=image_cls)

    def fuse_reduced(self, text: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """Fuse texts with images -> (B, K, D), without the tokens that `text_reduction` drops."""
        ids = replace_first_token(text, self.config.encoder_token_id)
        return self._run_text(ids, mask, image)

    def _run_text(self, ids: Tensor, mask: Tensor, *image: Tensor, **options: Any) -> Tensor:
        tower, reduction = self.encoders.text, self.text_reduction
        return tower.run_reduced(tower.embed(ids), mask, reduction, *image, **options).tokens

    def language_losses(
        self, input_ids: Tensor, mask: Tensor, contrast: ContrastiveOutput, drawn: Any
    ) -> tuple[Tensor, ...]:
        """Return LM, whose decoder attends to the image tokens."""
        decoded = self.decoder.run_reduced(
            self.embed_prefix(input_ids), mask, self.text_reduction, contrast.image, causal=True
        )
        loss = language_loss(
            self.language_head(decoded.tokens),
            decoded.labels(next_tokens(input_ids, mask)),
            smoothing=self.config.label_smoothing,
            gather=self.config.gather,
        )
        return (loss,)


def replace_first_token(input_ids: Tensor, token: int) -> Tensor:
    """Return a copy of the ids (B, L) with another first token."""
    ids = input_ids.clone()
    ids[:, 0] = token
    return ids
