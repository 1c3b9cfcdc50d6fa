"""METER with a text-guided, token-reduced image tower, for pre-training.

    text    BERT or RoBERTa on the text alone; its CLS output guides the image tower
    image   CLIP's ViT without its last block, reduced by ELIP
    fusion  linear transforms plus type embeddings, then co-attention layers on both sides:
            x' = text_layer(x, y), y' = image_layer(y, x), from the previous x and y
    loss    MLM (masked text, its image) + ITM (text; half of the texts get another image)

Each loss has its own pass through all parts, because the text before the image tower differs.
Source: METER (Dou et al., 2022); ELIP, section 3, and its official METER code.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertEmbeddings, BertPooler
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

from elip_models.pretraining.models.cross_modal import CrossModalModel
from elip_models.pretraining.models.layers.bert import BertTower, masked_language_head
from elip_models.pretraining.models.layers.losses import language_loss, mask_tokens
from elip_models.pretraining.models.layers.text_reduction import ReducedText
from elip_models.pretraining.models.meter.config import METERConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDINGS = {"bert": BertEmbeddings, "roberta": RobertaEmbeddings}
TEXT, IMAGE = 0, 1  # rows of the token type embeddings; rows of further images follow


@dataclass
class METEROutput:
    """Output of a step: the scalar losses, and the logits of both heads.

    Attributes:
        mlm_logits: (B, L, V), or (B, K, V) of the remaining text tokens.
        itm_logits: (B, 2), no pair or a pair.
    """

    loss: Tensor
    loss_mlm: Tensor
    loss_itm: Tensor
    mlm_logits: Tensor
    itm_logits: Tensor


class METERDraw(NamedTuple):
    """Random choices of a step: the results of `mask_tokens`, and the images of ITM.

    Attributes:
        itm_labels: (B,) int64, 1 where a text keeps its image in ITM.
        false_images: (B, 3, H, W), another image for each text, used where its label is 0.
    """

    masked_ids: Tensor
    labels: Tensor
    itm_labels: Tensor
    false_images: Tensor


class METERBackbone(CrossModalModel):
    """Image and text towers, co-attention layers and poolers, without heads.

    Each of the `images_per_text` images has its own token type.
    """

    ranks = False

    def __init__(self, config: METERConfig) -> None:
        super().__init__(config)
        self.visual = config.vit(pre_norm=True, act_layer="quick_gelu")
        self.read_tower()
        self.text = BertTower(config.bert("text"), embeddings=EMBEDDINGS[config.text_encoder])
        self.text_reduction = config.text_token_reduction
        width, bert = config.cross_width, config.bert("cross")
        self.text_transform = nn.Linear(config.text_width, width)
        self.image_transform = nn.Linear(config.vision_width, width)
        self.token_types = nn.Embedding(IMAGE + self.images_per_text, width)
        layers = range(config.cross_depth)
        self.text_layers = BertTower(bert, cross_attention=layers, embeddings=None)
        self.image_layers = BertTower(bert, cross_attention=layers, embeddings=None)
        self.text_pooler, self.image_pooler = BertPooler(bert), BertPooler(bert)
        parts = self.text_transform, self.image_transform, self.token_types
        nn.ModuleList([*parts, self.text_pooler, self.image_pooler]).apply(self.text_layers.init)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.text.run(self.text.embed(input_ids), attention_mask)

    def fuse(
        self,
        text: Tensor,
        mask: Tensor,
        image: Tensor,
        image_types: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the co-attention layers -> fused text (B, L, C) and image (B, N, C).

        image_types (B,) are rows of the token type embeddings, `IMAGE` by default.
        """
        types = self.token_types.weight
        image_type = types[IMAGE] if image_types is None else types[image_types][:, None]
        text = self.text_transform(text) + types[TEXT]
        image = self.image_transform(image) + image_type
        image_mask = mask.new_ones(image.shape[:2])
        for i in range(self.config.cross_depth):
            layer = range(i, i + 1)
            text, image = (
                self.text_layers.run(text, mask, layer, image),
                self.image_layers.run(image, image_mask, layer, text, mask),
            )
        return text, image

    def pool(self, text: Tensor, image: Tensor) -> Tensor:
        """Return the input (B, 2C) of the heads from fused text (B, L, C) and image (B, N, C)."""
        return torch.cat([self.text_pooler(text), self.image_pooler(image)], dim=-1)

    def encode_text_reduced(self, images: Tensor, input_ids: Tensor, mask: Tensor) -> ReducedText:
        """Encode texts alone, without the tokens that `text_reduction` drops half way."""
        image_cls = self.dense_cls(images) if self.config.image_guides_text else None
        hidden = self.text.embed(input_ids)
        return self.text.run_reduced(hidden, mask, self.text_reduction, image_cls=image_cls)

    def encode_and_fuse(
        self,
        images: Tensor,
        input_ids: Tensor,
        mask: Tensor,
        image_types: Tensor | None = None,
    ) -> tuple[ReducedText, Tensor]:
        """Encode and fuse a batch -> text (B, K, C) with its mask, image (B, N, C); see `fuse`."""
        text = self.encode_text_reduced(images, input_ids, mask)
        image, _ = self.encode_image(images, text.tokens[:, 0])
        tokens, image = self.fuse(text.tokens, text.mask, image, image_types)
        return text._replace(tokens=tokens), image


class METERMatcher(METERBackbone):
    """Backbone with the head of ITM."""

    def __init__(self, config: METERConfig) -> None:
        super().__init__(config)
        self.itm_head = nn.Linear(2 * config.cross_width, 2)
        self.itm_head.apply(self.text_layers.init)

    def match(
        self, images: Tensor, input_ids: Tensor, mask: Tensor, drawn: METERDraw
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of ITM and its logits (B, 2), no pair or a pair."""
        is_pair = (drawn.itm_labels == 1)[:, None, None, None]
        shown = torch.where(is_pair, images, drawn.false_images)
        text, image = self.encode_and_fuse(shown, input_ids, mask)
        logits = self.itm_head(self.pool(text.tokens, image))
        return F.cross_entropy(logits.float(), drawn.itm_labels), logits

    def rank(self, pooled: Tensor) -> Tensor:
        """Return the logit (B,) of a pair, from pooled text and image (B, 2C)."""
        return self.itm_head(pooled)[:, 1]

    def matching_logits(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return a score (B,) of each text with the image tokens of its row; larger is better."""
        text = self.encode_text(input_ids, attention_mask)
        return self.rank(self.pool(*self.fuse(text, attention_mask, tokens)))


class METER(METERMatcher):
    """Matcher with the head of MLM."""

    family = "meter"
    config_class = METERConfig
    continues: Tensor | None

    def __init__(self, config: METERConfig) -> None:
        super().__init__(config)
        self.language_head = masked_language_head(self.text_layers)
        self.language_head.apply(self.text_layers.init)
        self.register_buffer("continues", None, persistent=False)

    def read_vocabulary_(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Store which tokens continue a word ('##..' in BERT), for masking whole words.

        ValueError is raised if the tokenizer does not mark them.
        """
        if not self.config.mask_whole_words:
            return
        pieces, size = tokenizer.backend_tokenizer.model, self.config.vocab_size
        mark = getattr(pieces, "continuing_subword_prefix", None)
        if not mark:
            raise ValueError(
                "mask_whole_words: expected False, or a tokenizer that marks tokens inside a word, "
                f"as BERT's with '##', got {type(tokenizer).__name__} of {pieces!r:.40}"
            )
        inside = [token for name, token in tokenizer.get_vocab().items() if name.startswith(mark)]
        self.continues = torch.zeros(size, dtype=torch.bool, device=self.token_types.weight.device)
        self.continues[inside] = True

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        drawn: METERDraw | None = None,
    ) -> METEROutput:
        """Return the pre-training losses of a batch of pairs.

        `config.text_reduction` drops text tokens here, but not in `encode_text`. 'learned' adds a
        dense forward of the image tower to each pass, without gradient, before the text. `drawn`
        replaces random masks and images, to repeat the step of another implementation.
        """
        if drawn is None:
            if self._lacks_vocabulary():
                raise ValueError(
                    "mask_whole_words: expected the word boundaries of the tokenizer, got none; "
                    "call model.read_vocabulary_(tokenizer) before training"
                )
            drawn = self.draw(images, input_ids)
        text, _ = self.encode_and_fuse(images, drawn.masked_ids, attention_mask)
        mlm_logits, labels = self.language_head(text.tokens), text.labels(drawn.labels)
        loss_mlm = language_loss(mlm_logits, labels, gather=self.config.gather)
        loss_itm, itm_logits = self.match(images, input_ids, attention_mask, drawn)
        return METEROutput(loss_mlm + loss_itm, loss_mlm, loss_itm, mlm_logits, itm_logits)

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Return inputs for measuring; without a tokenizer, each token is a word to mask."""
        inputs = super().random_inputs(images)
        if self._lacks_vocabulary():
            inputs["drawn"] = self.draw(images, inputs["input_ids"])
        return inputs

    def _lacks_vocabulary(self) -> bool:
        return self.config.mask_whole_words and self.continues is None

    def draw(self, images: Tensor, input_ids: Tensor) -> METERDraw:
        """Draw the masked tokens of MLM, and for ITM which half of the images is replaced."""
        config, B = self.config, len(images)
        masked = mask_tokens(
            input_ids,
            mask_token_id=config.mask_token_id,
            special_token_ids=(config.pad_token_id, config.cls_token_id, config.sep_token_id),
            vocab_size=config.vocab_size,
            probability=config.mask_probability,
            continues=self.continues,
        )
        pairs = max(1, B // 2)  # a batch of one image has no other image
        itm_labels = (torch.randperm(B, device=images.device) < pairs).long()
        shift = torch.randint(1, max(2, B), (B,), device=images.device)
        others = (torch.arange(B, device=images.device) + shift) % B
        return METERDraw(*masked, itm_labels, images[others])
