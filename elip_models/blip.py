"""BLIP with a text-guided, token-reduced image tower.

    text     BERT on the text alone; its CLS output guides the image tower
    image    ViT reduced by ELIP; features f = normalise(W x_cls) of both towers
    encoder  the same BERT from [ENC] on, each layer attending to the image tokens too
    decoder  causal self-attention of its own, all else the encoder's, from [DEC] on
    loss     ITC (soft targets, queue) + ITM (hard negatives) + LM (label smoothing)

The momentum towers follow before each step's momentum features, and see all patches.
Source: BLIP (Li et al., 2022); ELIP, section 3 and its official BLIP code.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.cross_modal import DistilledConfig
from elip_models.modules.bert import (
    BertTower,
    UntypedEmbeddings,
    masked_language_head,
    tied_decoder,
)
from elip_models.modules.momentum import FeatureQueue, momentum_copy, update_momentum_
from elip_models.modules.objectives import hard_negatives, language_loss, soft_contrastive_loss
from elip_models.reduction.encode import run_tower
from elip_models.reduction.stage import Elip
from elip_models.reduction.strategy import StageInfo
from elip_models.towers import as_tower


@dataclass(frozen=True)
class BLIPConfig(DistilledConfig):
    """Hyper-parameters of a BLIP model; the defaults are the paper's.

    decoder_token_id, encoder_token_id: [DEC] and [ENC], instead of a text's first token.
    The other fields: see `DistilledConfig`; alpha weighs the momentum targets of ITC.
    negative_epsilon: added to each weight that hard negatives are drawn by.
    """

    vocab_size: int = 30524
    decoder_token_id: int = 30522
    encoder_token_id: int = 30523
    queue_size: int = 57600
    label_smoothing: float = 0.1
    negative_epsilon: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pad_token_id", "decoder_token_id", "encoder_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name}: expected an id below vocab_size = {self.vocab_size}, "
                    f"got {getattr(self, name)}"
                )
        self.check_shares("label_smoothing", "negative_epsilon")


@dataclass
class BLIPOutput:
    """loss: the sum of the three others, scalars. image_features, text_features: (B, E)."""

    loss: Tensor
    loss_itc: Tensor
    loss_itm: Tensor
    loss_lm: Tensor
    image_features: Tensor
    text_features: Tensor


class Drawn(NamedTuple):
    """What `forward` draws at random, for a caller that has drawn it.

    negative_images: (B,) for each text. negative_texts: (B,) for each image.
    """

    negative_images: Tensor
    negative_texts: Tensor


class Encoders(nn.Module):
    """The parts that have a momentum copy: both towers and a projection each."""

    def __init__(self, config: BLIPConfig) -> None:
        super().__init__()
        self.visual = config.vit()
        self.layers = range(config.text_depth)
        self.text = BertTower(config.bert, self.layers, embeddings=UntypedEmbeddings)
        self.image_projection = nn.Linear(config.vision_width, config.embed_dim)
        self.text_projection = nn.Linear(config.text_width, config.embed_dim)

    def image_features(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, D) -> (B, E), normalised."""
        return F.normalize(self.image_projection(tokens[:, 0]), dim=-1)

    def text_features(self, hidden: Tensor) -> Tensor:
        """hidden (B, L, D) -> (B, E), normalised."""
        return F.normalize(self.text_projection(hidden[:, 0]), dim=-1)

    def read(self, input_ids: Tensor, mask: Tensor, image_tokens: Tensor | None = None) -> Tensor:
        """input_ids, mask (B, L), with image_tokens (B, N, D) or alone -> (B, L, D)."""
        return self.text.run(self.text.embed(input_ids), mask, self.layers, image_tokens)


class BLIP(nn.Module):
    """Image and text towers, decoder, their momentum copies and the feature queue."""

    def __init__(self, config: BLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.reduction = config.reduction
        self.dense = Elip(f"{config.vision_depth}(100%)", without_text="vision")
        self.encoders = Encoders(config)
        self.encoders_m = momentum_copy(self.encoders)
        self.tower = as_tower(self.encoders.visual)
        self.tower_m = as_tower(self.encoders_m.visual)
        self.decoder = tied_decoder(self.encoders.text)
        self.language_head = masked_language_head(self.decoder)
        self.itm_head = nn.Linear(config.text_width, 2)
        self.queue = FeatureQueue(config.embed_dim, config.queue_size)
        self.temperature = nn.Parameter(torch.tensor(float(config.temperature)))
        self.alpha = config.alpha

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (B, L) -> hidden states (B, L, D) of the text alone."""
        return self.encoders.read(input_ids, attention_mask)

    def encode_image(
        self, images: Tensor, text_cls: Tensor | None = None
    ) -> tuple[Tensor, list[StageInfo]]:
        """images (B, 3, H, W), guided by text_cls (B, D) -> tokens (B, K+2, D), infos of stages."""
        return run_tower(self.tower, images, text_cls, self.reduction)

    def fuse(self, input_ids: Tensor, mask: Tensor, image_tokens: Tensor) -> Tensor:
        """Hidden states (B, L, D) of [ENC] and the text, with the image before their eyes."""
        ids = _begin(input_ids, self.config.encoder_token_id)
        return self.encoders.read(ids, mask, image_tokens)

    def predict(self, input_ids: Tensor, mask: Tensor, image_tokens: Tensor) -> Tensor:
        """Logits (B, L, V) of each next token after [DEC] and the text up to it."""
        ids = _begin(input_ids, self.config.decoder_token_id)
        decoder, layers = self.decoder, self.encoders.layers
        hidden = decoder.run(decoder.embed(ids), mask, layers, image_tokens, causal=True)
        return self.language_head(hidden)

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        drawn: Drawn | None = None,
    ) -> BLIPOutput:
        """The pre-training losses of a batch of pairs; in training momentum and queue move on.

        Args:
            images: (B, 3, H, W).
            input_ids, attention_mask: (B, L), 1 = real.
            drawn: negatives instead of drawing them, so that a run can be repeated by another
                implementation.
        """
        online, mask, config = self.encoders, attention_mask, self.config
        if self.training:
            self._clamp_temperature()
        text = online.read(input_ids, mask)
        image, infos = self.encode_image(images, text[:, 0])
        shared = infos if self.config.momentum_reduction == "shared" else None
        features = online.image_features(image), online.text_features(text)
        if self.training:
            update_momentum_(self.encoders_m, online, config.momentum)
        features_m = self._momentum_features(images, input_ids, mask, shared)
        similar, similar_m = self.queue.similarities(features, features_m, self.temperature)
        loss_itc = soft_contrastive_loss(similar, similar_m, self.alpha)
        if self.training:
            self.queue.enqueue_(*features_m)
        if drawn is None:
            drawn = self._draw(similar)
        loss_itm = self._matching_loss(image, input_ids, mask, drawn)
        logits = self.predict(input_ids, mask, image)
        loss_lm = language_loss(logits, input_ids, mask, config.label_smoothing)
        return BLIPOutput(loss_itc + loss_itm + loss_lm, loss_itc, loss_itm, loss_lm, *features)

    @torch.no_grad()
    def _clamp_temperature(self) -> None:
        self.temperature.clamp_(0.001, 0.5)

    @torch.no_grad()
    def _momentum_features(
        self, images: Tensor, input_ids: Tensor, mask: Tensor, infos: list[StageInfo] | None
    ) -> tuple[Tensor, Tensor]:
        """Features (B, E) of all patches of the image and of the text."""
        momentum = self.encoders_m
        settings = self.dense if infos is None else self.reduction
        image, _ = run_tower(self.tower_m, images, None, settings, replays=infos)
        text = momentum.read(input_ids, mask)
        return momentum.image_features(image), momentum.text_features(text)

    def _draw(self, similar: tuple[Tensor, Tensor]) -> Drawn:
        """Hard negatives by the similarities."""
        epsilon = self.config.negative_epsilon
        image_to_text, text_to_image = (s[:, : len(s)].detach() for s in similar)
        return Drawn(hard_negatives(text_to_image, epsilon), hard_negatives(image_to_text, epsilon))

    def _matching_loss(self, image: Tensor, ids: Tensor, mask: Tensor, drawn: Drawn) -> Tensor:
        """ITM of the pairs and both kinds of negatives, in one pass of the encoder."""
        B = len(ids)
        texts = torch.cat([ids, ids, ids[drawn.negative_texts]])
        masks = torch.cat([mask, mask, mask[drawn.negative_texts]])
        images = torch.cat([image, image[drawn.negative_images], image])
        fused = self.fuse(texts, masks, images)
        labels = torch.zeros(3 * B, dtype=torch.long, device=ids.device)
        labels[:B] = 1
        return F.cross_entropy(self.itm_head(fused[:, 0]).float(), labels)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in backward instead of saving their activations."""
        for tower in (self.encoders.visual, self.encoders.text, self.decoder):
            tower.set_grad_checkpointing(enable)


def _begin(input_ids: Tensor, token: int) -> Tensor:
    """The ids (B, L) with another first token."""
    ids = input_ids.clone()
    ids[:, 0] = token
    return ids
