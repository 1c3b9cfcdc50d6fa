"""METER with a text-guided, token-reduced image tower.

    text    BERT or RoBERTa on the text alone; its last hidden CLS guides the image tower
    image   CLIP's ViT without its last block, reduced by ELIP
    fusion  both through a linear transform, plus an embedding of their type, then co-attention:
            x' = text_layer(x, y), y' = image_layer(y, x), both of the previous x and y
    loss    MLM (masked text, its image) + ITM (text, for half of the batch another image)

The two losses are two passes, towers included, since the text before the tower differs.
Source: METER (Dou et al., 2022); ELIP, section 3 and its official METER code.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertEmbeddings, BertPooler
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

from elip_models.models.cross_modal import CrossModalModel
from elip_models.models.layers.bert import BertTower, masked_language_head
from elip_models.models.layers.losses import (
    distilled_language_loss,
    mask_every_seventh,
    mask_tokens,
)
from elip_models.models.layers.pumer import Fused
from elip_models.models.layers.text_reduction import ReducedText
from elip_models.models.meter.config import METERConfig
from elip_models.reduction.strategy import mask_after

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDINGS = {"bert": BertEmbeddings, "roberta": RobertaEmbeddings}
DRAWN = (  # parts of BERT's initialisation, in the order in which a seed draws them
    *("text_transform", "image_transform", "token_types", "itm_head"),
    *("text_pooler", "image_pooler", "language_head"),
)
TEXT, IMAGE = 0, 1  # rows of the token type embeddings; of further images behind them


@dataclass
class METEROutput:
    """loss: the sum of the two others, scalars. mlm_logits: (B, L, V), or (B, K, V) of the K text
    tokens that are left. itm_logits: (B, 2).
    """

    loss: Tensor
    loss_mlm: Tensor
    loss_itm: Tensor
    mlm_logits: Tensor
    itm_logits: Tensor


class METERDraw(NamedTuple):
    """What `forward` draws at random, for a caller that has drawn it.

    masked_ids, labels: (B, L), see `mask_tokens`.
    itm_labels: (B,) int64, 1 where a text keeps its image in ITM.
    false_images: (B, 3, H, W), for each text another image, read where its label is 0.
    """

    masked_ids: Tensor
    labels: Tensor
    itm_labels: Tensor
    false_images: Tensor


def draw_others(images: Tensor) -> tuple[Tensor, Tensor]:
    """Draw for ITM, of a batch (B, 3, H, W) -> labels (B,) int64, 1 for the half that stays as it
    is, and for every image the number of another.
    """
    B, device = len(images), images.device
    pairs = max(1, B // 2)  # a single image has no other
    labels = (torch.randperm(B, device=device) < pairs).long()
    shift = torch.randint(1, max(2, B), (B,), device=device)
    return labels, (torch.arange(B, device=device) + shift) % B


class METERBackbone(CrossModalModel):
    """Image and text towers, co-attention layers and poolers: what METER is below its heads.

    images_each: how many images a text is about, each of a token type of its own.
    """

    config: METERConfig
    images_each: ClassVar[int] = 1
    ranks = False

    def __init__(self, config: METERConfig) -> None:
        super().__init__(config)
        self.visual = config.vit(pre_norm=True, act_layer="quick_gelu")
        self.read_tower()
        self.text = BertTower(config.bert("text"), embeddings=EMBEDDINGS[config.text_encoder])
        self.text_reduction, self.pumer = config.text_token_reduction, config.pumer
        self._add_fusion(config)

    def _add_fusion(self, config: METERConfig) -> None:
        width, bert = config.cross_width, config.bert("cross")
        self.text_transform = nn.Linear(config.text_width, width)
        self.image_transform = nn.Linear(config.vision_width, width)
        self.token_types = nn.Embedding(IMAGE + self.images_each, width)
        every = range(config.cross_depth)
        self.text_layers = BertTower(bert, cross_attention=every, embeddings=None)
        self.image_layers = BertTower(bert, cross_attention=every, embeddings=None)
        self.text_pooler, self.image_pooler = BertPooler(bert), BertPooler(bert)
        self._add_heads(config)
        parts = dict(self.named_children())
        for name in DRAWN:
            if name in parts:
                parts[name].apply(self.text_layers.init)

    def _add_heads(self, config: METERConfig) -> None:
        """Add what stands on the backbone and is among `DRAWN`."""

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (B, L) -> hidden states (B, L, D) of the text alone."""
        every = range(self.config.text_depth)
        return self.text.run(self.text.embed(input_ids), attention_mask, every)

    def fuse(
        self,
        text: Tensor,
        mask: Tensor,
        image: Tensor,
        image_mask: Tensor | None = None,
        image_types: Tensor | None = None,
        *,
        keeps_text: bool = False,
    ) -> Fused:
        """Text (B, L, D), mask (B, L), image (B, N, D) and image_mask (B, N), None where all are
        real; image_types (B,), rows of the token type embeddings, `IMAGE` by default -> both sides
        of co-attention, with fewer tokens where `config.cross_reduction` says so; `keeps_text`: all
        of the text.
        """
        types = self.token_types.weight
        image_type = types[IMAGE] if image_types is None else types[image_types][:, None]
        text = self.text_transform(text) + types[TEXT]
        image = self.image_transform(image) + image_type
        entered = Fused(text, mask, image, image_mask)
        for i in range(self.config.cross_depth):
            left = self._text_layer(i, entered, keeps_text)
            tokens, own_mask = left.image, left.image_mask
            if own_mask is None:
                own_mask = mask.new_ones(tokens.shape[:2])
            read = entered.text, entered.text_mask
            image = self.image_layers.run(tokens, own_mask, range(i, i + 1), *read)
            entered = left._replace(image=image)
        return entered

    def _text_layer(self, i: int, entered: Fused, keeps_text: bool) -> Fused:
        """Co-attention layer i of the text, and what it leaves of the image."""
        if self.pumer is None or i not in self.pumer.layers:
            text, mask, image, image_mask = entered
            text = self.text_layers.run(text, mask, range(i, i + 1), image, image_mask)
            return entered._replace(text=text)

        def step(layer: nn.Module, text: Tensor) -> tuple[Tensor, Fused]:
            left = self.pumer.run(layer, entered._replace(text=text), keeps_text=keeps_text)
            return left.text, left

        text, left = self.text_layers.in_layer(i, step, entered.text)
        return left._replace(text=text)

    def pool(self, text: Tensor, image: Tensor) -> Tensor:
        """Fused text (B, L, C) and image (B, N, C) -> (B, 2C), what the heads read."""
        return torch.cat([self.text_pooler(text), self.image_pooler(image)], dim=-1)

    def read_pairs(self, images: Tensor, input_ids: Tensor, mask: Tensor) -> ReducedText:
        """images, input_ids, mask (B, L) -> the texts alone, half way without the tokens that
        `text_reduction` drops.
        """
        image_cls = self.dense_cls(images) if self.config.image_guides_text else None
        hidden, every = self.text.embed(input_ids), range(self.config.text_depth)
        return self.text.run_reduced(hidden, mask, every, self.text_reduction, image_cls=image_cls)

    def read_and_fuse(
        self,
        images: Tensor,
        input_ids: Tensor,
        mask: Tensor,
        image_types: Tensor | None = None,
        *,
        keeps_text: bool = False,
    ) -> tuple[ReducedText, Tensor]:
        """Pixels and ids of a batch, image_types (B,) and keeps_text as of `fuse` -> text, fused
        (B, K, C), and image (B, N, C).
        """
        text = self.read_pairs(images, input_ids, mask)
        image, infos = self.encode_image(images, self.select_guidance(text.tokens[:, 0]))
        given = (text.tokens, text.mask, image, mask_after(infos), image_types)
        left = self.fuse(*given, keeps_text=keeps_text)
        if left.text.shape[1] == text.mask.shape[1]:
            return text._replace(tokens=left.text), left.image
        return ReducedText(left.text, left.text_mask), left.image

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in backward instead of saving their activations."""
        for part in (self.visual, self.text, self.text_layers, self.image_layers):
            part.set_grad_checkpointing(enable)


class METERMatcher(METERBackbone):
    """The backbone, and the head that judges whether a text and an image are a pair."""

    def _add_heads(self, config: METERConfig) -> None:
        self.itm_head = nn.Linear(2 * config.cross_width, 2)

    def match(self, text: Tensor, image: Tensor) -> Tensor:
        """Judge fused text (B, L, C) and image (B, N, C) -> logits (B, 2): no pair, or a pair."""
        return self.itm_head(self.pool(text, image))

    def rank(self, pooled: Tensor) -> Tensor:
        """Pooled text and image (B, 2C) -> (B,), the logit of a pair."""
        return self.itm_head(pooled)[:, 1]

    def matching_tokens(
        self, images: Tensor, text_cls: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W), which no text guides unless text_cls (B, D) is given -> tokens
        (B, N, D) and their mask (B, N), True = real, or None where all are.
        """
        tokens, infos = self.encode_image(images, text_cls)
        return tokens, mask_after(infos)

    def matching_logits(
        self, tokens: Tensor, image_mask: Tensor | None, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Judge how well each text fits the image of its row.

        Args:
            tokens, image_mask: (B, N, D) and (B, N), of `matching_tokens`.
            input_ids, attention_mask: (B, L), 1 = real.

        Returns:
            (B,), the larger the better.
        """
        text = self.encode_text(input_ids, attention_mask)
        left = self.fuse(text, attention_mask, tokens, image_mask)
        return self.rank(self.pool(left.text, left.image))


class METER(METERMatcher):
    """The matcher, and the head of MLM."""

    family = "meter"
    config_class = METERConfig
    continues: Tensor | None

    def __init__(self, config: METERConfig) -> None:
        super().__init__(config)
        self.register_buffer("continues", None, persistent=False)

    def _add_heads(self, config: METERConfig) -> None:
        super()._add_heads(config)
        self.language_head = masked_language_head(self.text_layers)

    def read_vocabulary_(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Learn which tokens continue a word, '##..' as in BERT, where words are masked whole.

        Raises:
            ValueError: a tokenizer that does not mark them so, or with ids beyond the model's.
        """
        if not self.config.mask_whole_words:
            return
        pieces = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
        mark, size = getattr(pieces, "continuing_subword_prefix", None), self.config.vocab_size
        if not mark:
            raise ValueError(
                "mask_whole_words: expected False, or a tokenizer that marks what continues a word "
                f"as BERT's does by '##', got {type(tokenizer).__name__} of {pieces!r:.40}"
            )
        names = {token: name for name, token in tokenizer.get_vocab().items()}
        if max(names) >= size:
            raise ValueError(f"tokenizer: expected ids below {size}, got {max(names)}")
        marked = torch.tensor([names.get(token, "").startswith(mark) for token in range(size)])
        self.continues = marked.to(self.token_types.weight.device)

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        drawn: METERDraw | None = None,
    ) -> METEROutput:
        """Compute the pre-training losses of a batch of pairs.

        Here alone texts lose tokens, as `config.text_reduction` says. 'learned' adds a dense
        forward of the image tower to each pass, without gradient, for the text comes before the
        image that it guides.

        Args:
            images: (B, 3, H, W).
            input_ids, attention_mask: (B, L), 1 = real.
            drawn: masked tokens and false images instead of drawing them, so that a run can be
                repeated by another implementation.
        """
        if drawn is None:
            drawn = self._draw(images, input_ids)
        text, _ = self.read_and_fuse(images, drawn.masked_ids, attention_mask, keeps_text=True)
        mlm_logits, labels = self.language_head(text.tokens), text.labels(drawn.labels)
        loss_mlm = distilled_language_loss(mlm_logits, labels, gather=self.config.gather)
        is_pair = (drawn.itm_labels == 1)[:, None, None, None]
        itm_images = torch.where(is_pair, images, drawn.false_images)
        text, image = self.read_and_fuse(itm_images, input_ids, attention_mask)
        itm_logits = self.match(text.tokens, image)
        loss_itm = F.cross_entropy(itm_logits.float(), drawn.itm_labels)
        return METEROutput(loss_mlm + loss_itm, loss_mlm, loss_itm, mlm_logits, itm_logits)

    def fixed_draw(self, images: Tensor, input_ids: Tensor) -> METERDraw:
        masked = mask_every_seventh(input_ids, self.config.mask_token_id)
        keeps_image = 1 - torch.arange(len(images), device=images.device) % 2
        return METERDraw(*masked, keeps_image, images.roll(-1, 0))

    def _draw(self, images: Tensor, input_ids: Tensor) -> METERDraw:
        """Draw masked tokens; half of the batch stay pairs, the rest get the image of another."""
        config = self.config
        if config.mask_whole_words and self.continues is None:
            raise ValueError(
                "mask_whole_words: expected read_vocabulary_(tokenizer) before tokens are masked, "
                "for only the tokenizer knows where words begin"
            )
        masked = mask_tokens(
            input_ids,
            mask_token_id=config.mask_token_id,
            special_token_ids=(config.pad_token_id, config.cls_token_id, config.sep_token_id),
            vocab_size=config.vocab_size,
            probability=config.mask_probability,
            continues=self.continues,
        )
        itm_labels, others = draw_others(images)
        return METERDraw(*masked, itm_labels, images[others])
