"""What BLIP and the models fine-tuned from it share: encoders, and writing by a decoder."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from transformers.models.bert.modeling_bert import BertOnlyMLMHead

from elip_models.models.base import eval_mode
from elip_models.models.config import TextReductionConfig, TokenId
from elip_models.models.cross_modal import CrossModalModel
from elip_models.models.distilled_model import Encoders, MomentumConfig
from elip_models.models.layers.bert import BertTower, UntypedEmbeddings
from elip_models.models.layers.generation import CAPTIONS, Decoding, write
from elip_models.models.layers.text_reduction import ReducedText, TextReduction
from elip_models.reduction.strategy import mask_after
from elip_models.validation import NonNegative, Share, Size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class BLIPConfig(MomentumConfig, TextReductionConfig):
    """Hyper-parameters of a BLIP model; the defaults are the paper's.

    decoder_token_id, encoder_token_id: [DEC] and [ENC], instead of a text's first token.
    The other fields: see `MomentumConfig`; alpha weighs the momentum targets of ITC; and
    `TextReductionConfig`, by which the texts of `BLIP.forward` lose tokens in all three of its
    passes, those of the momentum encoder none.
    tie_decoder: the decoder shares all but self-attention with the encoder, as in pre-training;
        False gives it weights of its own, as in models fine-tuned for captions or answers.
    """

    captions: Literal["plain", "albef", "blip"] = "blip"
    vocab_size: Size = 30524
    decoder_token_id: TokenId = 30522
    encoder_token_id: TokenId = 30523
    queue_size: Size = 57600
    alpha_warmup_epochs: NonNegative = 2.0
    label_smoothing: Share = 0.1
    negative_epsilon: Share = 1e-4
    tie_decoder: bool = True


class BLIPEncoders(Encoders):
    """The parts that have a momentum copy."""

    def __init__(self, config: BLIPConfig, *, projects: bool = True) -> None:
        super().__init__(config, projects=projects)
        self.layers = range(config.text_depth)
        self.text = BertTower(config.bert, self.layers, embeddings=UntypedEmbeddings)

    def read(
        self,
        input_ids: Tensor,
        mask: Tensor,
        image_tokens: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """input_ids, mask (B, L), with image_tokens (B, N, D), all or as image_mask (B, N) says, or
        alone -> (B, L, D).
        """
        hidden = self.text.embed(input_ids)
        return self.text.run(hidden, mask, self.layers, image_tokens, image_mask)


class BLIPBase(CrossModalModel):
    """The tokens of BLIP, and what its text towers have in common.

    adds_similarity: re-ranking adds the similarity of features to ITM's score.
    """

    adds_similarity: ClassVar[bool] = True
    config: BLIPConfig
    encoders: Encoders
    masks_text = False

    @classmethod
    def fit_tokenizer(
        cls, tokenizer: "PreTrainedTokenizerBase", context_length: int
    ) -> dict[str, int]:
        """Adds [DEC] and [ENC] to the tokenizer; otherwise as the other cross-modal models."""
        tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
        decoder, encoder = tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"])
        sizes = super().fit_tokenizer(tokenizer, context_length)
        return sizes | {"decoder_token_id": decoder, "encoder_token_id": encoder}

    @property
    def text_towers(self) -> tuple[BertTower, ...]:
        """All that read or write."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in backward instead of saving their activations."""
        for tower in (self.encoders.visual, *self.text_towers):
            tower.set_grad_checkpointing(enable)


class Reader(BLIPBase):
    """Reads a text that sees the image, from [ENC] on."""

    encoders: BLIPEncoders
    fuses_ids = True

    @property
    def text_towers(self) -> tuple[BertTower, ...]:
        return (self.encoders.text,)

    def fuse(
        self, text: Tensor, mask: Tensor, image: Tensor, image_mask: Tensor | None = None
    ) -> Tensor:
        """text, mask (B, L), image (B, N, D) and image_mask (B, N), None where all are real ->
        (B, L, D) of [ENC] and the ids behind it.
        """
        ids = begin_with(text, self.config.encoder_token_id)
        return self.encoders.read(ids, mask, image, image_mask)


class Writer(BLIPBase):
    """Writes by a causal tower, `decoder`, and a head over it, from [DEC] on."""

    decoder: BertTower
    language_head: BertOnlyMLMHead

    @property
    def text_towers(self) -> tuple[BertTower, ...]:
        return (self.decoder,)

    def predict(
        self,
        input_ids: Tensor,
        mask: Tensor,
        image_tokens: Tensor,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """Predict each next token after [DEC] and the text up to it.

        Args:
            input_ids, mask: (B, L), 1 = real.
            image_tokens: (B, N, D) to attend to; of an image, or of a question fused with it.
            image_mask: (B, N), 1 = real; None where all of them are.

        Returns:
            (B, L, V).
        """
        image = image_tokens, image_mask
        return self.language_head(self.decode(input_ids, mask, image, None).tokens)

    def decode(
        self,
        input_ids: Tensor,
        mask: Tensor,
        image: tuple[Tensor, Tensor | None],
        reduction: TextReduction | None,
    ) -> ReducedText:
        """Run the decoder on [DEC] and the ids behind it; `image` is tokens and mask."""
        hidden = self.decoder.embed(begin_with(input_ids, self.config.decoder_token_id))
        layers = range(len(self.decoder.layers))
        return self.decoder.run_reduced(hidden, mask, layers, reduction, *image, causal=True)

    def generate_from_tokens(
        self,
        image_tokens: Tensor,
        image_mask: Tensor | None = None,
        *,
        prompt: Tensor | None = None,
        decoding: Decoding = CAPTIONS,
    ) -> Tensor:
        """Write, without dropout, from image_tokens (B, N, D) and image_mask (B, N), see `predict`;
        otherwise as `Captioner.generate`.
        """
        config, B = self.config, len(image_tokens)
        ids = torch.full((B, 1), config.decoder_token_id, device=image_tokens.device)
        if prompt is not None:
            fits = prompt.dim() == 2 and len(prompt) == B and prompt.dtype == ids.dtype
            if not fits or (prompt == config.pad_token_id).any():
                raise ValueError(
                    f"prompt: expected int64 ids of the shape ({B}, P), none of them padding, got "
                    f"{prompt.dtype} of {tuple(prompt.shape)} with "
                    f"{int((prompt == config.pad_token_id).sum())} of padding; write prompts of "
                    "different lengths in batches of their own"
                )
            ids = torch.cat([ids, prompt], dim=1)
        with eval_mode(self):
            return write(
                self.decoder,
                self.language_head,
                ids,
                (image_tokens, image_mask),
                end_token_id=config.sep_token_id,
                decoding=decoding,
            )


class Captioner(Writer):
    """Writes of an image alone."""

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        *,
        prompt: Tensor | None = None,
        text_cls: Tensor | None = None,
        decoding: Decoding = CAPTIONS,
    ) -> Tensor:
        """Write captions, without dropout, whatever the mode of the model.

        Args:
            images: (B, 3, H, W), each encoded once.
            prompt: (B, P) ids that the captions begin with, all of them real, without the first
                and the last special token; None where there is none.
            text_cls: (B, D) that guides the image tower, see `encode_image`; a captioner has none,
                so that all patches are kept, or as many as `without_text` says.
            decoding: beam search or nucleus sampling, and how long.

        Returns:
            (B, L) int64: [DEC], the prompt, the caption and its end, then padding.

        Raises:
            ValueError: another shape or dtype of prompt, or one with padding; a length for which
                the text tower has no positions.
        """
        with eval_mode(self):
            tokens, infos = self.encode_image(images, text_cls)
        return self.generate_from_tokens(
            tokens, mask_after(infos), prompt=prompt, decoding=decoding
        )


def begin_with(input_ids: Tensor, token: int) -> Tensor:
    """Replace the first token of the ids (B, L)."""
    ids = input_ids.clone()
    ids[:, 0] = token
    return ids
