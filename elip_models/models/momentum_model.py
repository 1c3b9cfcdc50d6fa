"""What ALBEF and BLIP share: a queue of momentum features, the ITC and ITM losses.

    ITC     features f = normalise(W x_cls) of both towers; soft targets of the momentum towers,
            over the batch and the queue
    ITM     hard negatives by the similarities of ITC

In training all ranks enqueue all features, so that the queue is the same everywhere.
Source: ALBEF (Li et al., 2021), section 3.2; BLIP (Li et al., 2022).
"""

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.models.distilled_model import DistilledModel, Encoders, MomentumConfig
from elip_models.models.layers.distributed import all_gather, rank_of
from elip_models.models.layers.losses import hard_negatives, soft_contrastive_loss
from elip_models.models.layers.momentum import FeatureQueue, similarities
from elip_models.reduction.encode import run_tower
from elip_models.reduction.strategy import mask_after


class Contrast(NamedTuple):
    """What ITC computes that the other objectives use.

    loss: scalar. text: (B, L, D). image, image_m: (B, K+2, D), (B, N, D) of the momentum tower;
    image_mask, image_mask_m: which of them are real, None where all are. features: (B, E) of image
    and text. similar: image-to-text and text-to-image (B, C) of the C pairs that negatives come
    from, without gradient.
    """

    loss: Tensor
    text: Tensor
    image: Tensor
    image_mask: Tensor | None
    image_m: Tensor
    image_mask_m: Tensor | None
    features: tuple[Tensor, Tensor]
    similar: tuple[Tensor, Tensor]


class Negatives(NamedTuple):
    """The hard negatives of a step; both number the pairs of all ranks where gather='global'.

    images: (B,) int64, for each text. texts: (B,), for each image.
    """

    images: Tensor
    texts: Tensor


class MomentumModel(DistilledModel):
    """Towers with momentum copies, the queue of their features, contrastive and matching losses.

    fuses_ids: `fuse` takes the ids of a text, not its hidden states. knows_images: the queue holds
    which image each pair shows.
    """

    fuses_ids: ClassVar[bool] = False
    knows_images: ClassVar[bool] = False

    def __init__(self, config: MomentumConfig, encoders: Encoders) -> None:
        super().__init__(config, encoders)
        self.itm_head = nn.Linear(config.text_width, 2)
        self.queue = FeatureQueue(config.embed_dim, config.queue_size, with_ids=self.knows_images)
        self.temperature = nn.Parameter(torch.tensor(float(config.temperature)))

    def moved_in_training(self) -> tuple[Tensor, ...]:
        """The momentum encoders and the queue."""
        return *super().moved_in_training(), *self.queue.buffers()

    def fuse(
        self, text: Tensor, mask: Tensor, image: Tensor, image_mask: Tensor | None = None
    ) -> Tensor:
        """Text (B, ..), mask (B, L), image (B, N, D) and image_mask (B, N), None where all are real
        -> (B, L, D): the text that saw the image.
        """
        raise NotImplementedError

    def read_pairs(self, images: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """The texts of a step, as `encode_text` reads them, unless they lose tokens in it."""
        return self.encode_text(input_ids, mask)

    def fuse_pairs(
        self, text: Tensor, mask: Tensor, image: Tensor, image_mask: Tensor | None
    ) -> Tensor:
        """The pairs of a step, as `fuse` does, unless their texts lose tokens in it."""
        return self.fuse(text, mask, image, image_mask)

    def image_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), without text -> (B, E), normalised."""
        tokens, _ = run_tower(self.tower, images, None, self.reduction, cls_only=True)
        return self.project_image(tokens)

    def project_image(self, tokens: Tensor) -> Tensor:
        return self.encoders.image_features(tokens)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (B, L) -> (B, E), normalised."""
        return self.encoders.text_features(self.encode_text(input_ids, attention_mask))

    def matching_tokens(
        self, images: Tensor, text_cls: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W), guided by text_cls (B, D) or by no text -> tokens (B, N, D) for
        `matching_logits`, and which of them are real (B, N), None where all are.
        """
        tokens, infos = self.encode_image(images, text_cls)
        return tokens, mask_after(infos)

    def matching_logits(
        self,
        tokens: Tensor,
        image_mask: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor,
    ) -> Tensor:
        """Score how well each text fits the image of its row, by the ITM logit of a pair.

        Args:
            tokens, image_mask: (B, N, D) and (B, N) or None, see `matching_tokens`.
            input_ids, attention_mask: (B, L), 1 = real.

        Returns:
            (B,) fp32.
        """
        text = input_ids if self.fuses_ids else self.encode_text(input_ids, attention_mask)
        fused = self.fuse(text, attention_mask, tokens, image_mask)
        return self.itm_head(fused[:, 0]).float()[:, 1]

    @torch.no_grad()
    def clamp_temperature_(self) -> None:
        """Keep the temperature in [0.001, 0.5]."""
        self.temperature.clamp_(0.001, 0.5)

    def check_batch_size(self, batch_size: int) -> None:
        """Raises ValueError where the queue holds less than the batch of all ranks."""
        self.queue.check(batch_size)

    def monitored(self) -> dict[str, Tensor]:
        """The temperature, and alpha."""
        return {"temperature": self.temperature} | super().monitored()

    def contrast(
        self,
        images: Tensor,
        input_ids: Tensor,
        mask: Tensor,
        guide_ids: Tensor | None = None,
        guide_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
    ) -> Contrast:
        """Contrast images (B, 3, H, W) and texts (B, L), ITC; in training, momentum and queue move
        on. guide_ids and guide_mask as of `guides`.

        With gradient accumulation they move at each forward pass. image_ids (B,) int64 say which
        image each pair shows, where the model `knows_images`: all texts of an image are right.

        Raises:
            TypeError: in training, a model that FSDP has sharded.
        """
        online, gather = self.encoders, self.config.gather
        text = self.read_pairs(images, input_ids, mask)
        if self.training:
            self._follow()
        texts, scale = online.text_features(text), 1 / self.temperature
        guides = self.select_guidance(text[:, 0], texts, scale, guide_ids, guide_mask)
        (image, image_mask), (image_m, image_mask_m) = self._images(images, guides)
        seen = image
        if self.config.guide == "after_itc" and self.reduction.is_guided:
            seen, _ = self.encode_image(images, torch.zeros_like(guides))
        features = online.image_features(seen), texts
        features_m = self._momentum_features(image_m, input_ids, mask)
        reach = "global" if self.training else gather
        with torch.no_grad():
            everywhere = all_gather(features_m[0], reach), all_gather(features_m[1], reach)
            contrasted = everywhere if gather == "global" else features_m
            keys = self.queue.behind(*contrasted)
            similar_m = similarities(features_m, keys, self.temperature)
        similar = similarities(features, keys, self.temperature)
        first, positives = rank_of(gather) * len(images), None
        if image_ids is not None:
            positives = self.queue.positives(image_ids, all_gather(image_ids, gather))
        loss = soft_contrastive_loss(similar, similar_m, self.alpha, first, positives)
        if self.training:
            ids = None if image_ids is None else all_gather(image_ids, reach)
            self.queue.enqueue_(*everywhere, ids)
        pairs = len(contrasted[0])
        of_pairs = similar[0][:, :pairs].detach(), similar[1][:, :pairs].detach()
        return Contrast(loss, text, image, image_mask, image_m, image_mask_m, features, of_pairs)

    def draw_negatives(
        self, similar: tuple[Tensor, Tensor], image_ids: Tensor | None = None
    ) -> Negatives:
        """Draw hard negatives by the similarities (B, C): an image for each text, a text for each
        image; no other pair of the same image, where image_ids (B,) say which it is.
        """
        image_to_text, text_to_image = similar
        gather, positives = self.config.gather, None
        if image_ids is not None:
            positives = image_ids[:, None] == all_gather(image_ids, gather)
        how = self.config.negative_epsilon, rank_of(gather) * len(image_to_text), positives
        negative_images = hard_negatives(text_to_image, *how)
        return Negatives(negative_images, hard_negatives(image_to_text, *how))

    def matching_loss(
        self,
        text: Tensor,
        mask: Tensor,
        image: Tensor,
        negatives: tuple[Tensor, Tensor],
        *,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute ITM of the pairs and both kinds of negatives, in one pass of `fuse`.

        Args:
            text, mask, image, image_mask: (B, ..) as `fuse` takes them.
            negatives: see `draw_negatives`.
        """

        def with_negatives(images: Tensor) -> Tensor:
            others = all_gather(images, self.config.gather)[negatives[0]]
            return torch.cat([images, others, images])

        texts, masks = (all_gather(t, self.config.gather) for t in (text, mask))
        fused = self.fuse_pairs(
            torch.cat([text, text, texts[negatives[1]]]),
            torch.cat([mask, mask, masks[negatives[1]]]),
            with_negatives(image),
            None if image_mask is None else with_negatives(image_mask),
        )
        labels = torch.zeros(len(fused), dtype=torch.long, device=mask.device)
        labels[: len(mask)] = 1
        return F.cross_entropy(self.itm_head(fused[:, 0]).float(), labels)

    @torch.no_grad()
    def _momentum_features(
        self, image: Tensor, input_ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Features of image and text by the momentum encoders, from their tokens of the image."""
        momentum = self.encoders_m
        text = momentum.read(input_ids, mask)
        return momentum.image_features(image), momentum.text_features(text)
