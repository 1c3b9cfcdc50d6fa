"""Vision transformers of Hugging Face transformers as towers, and three whole models.

CLIP's, ViT's, DeiT's (a distillation token beside CLS), BLIP's and SigLIP's (no CLS): embeddings, a
list of layers of two halves, a last norm. BLIP's own forward attends eagerly; `attend` here runs on
SDPA. Where patches are averaged, or SigLIP's probe attends to them, each token counts by how many
it holds. A model that knows its patches by their places (a decoder of pixels, a language model with
a token for each patch) has all of them back behind the last layer.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BlipForImageTextRetrieval,
    CLIPForImageClassification,
    CLIPModel,
    DeiTForMaskedImageModeling,
    SiglipForImageClassification,
    SiglipModel,
    ViTForMaskedImageModeling,
)

from elip_models.towers.base import Block, Projections, Tower, optional
from elip_models.towers.effective_weights import (
    Affine,
    is_plain,
    qkv_of,
    through_transpose,
    unwrapped,
)
from elip_models.towers.fsdp import library_class
from elip_models.towers.image_text import ImageTextModel
from elip_models.towers.reducible_model import Stats, check_tokenizer_in, clip_stats, random_ids


class Names(NamedTuple):
    """What a layer calls its parts, and its model the last norm."""

    attn: str
    out: str
    norm1: str
    norm2: str
    norm: str


LAYERS = {
    "CLIPEncoderLayer": Names(
        "self_attn", "out_proj", "layer_norm1", "layer_norm2", "post_layernorm"
    ),
    "BlipEncoderLayer": Names(
        "self_attn", "projection", "layer_norm1", "layer_norm2", "post_layernorm"
    ),
    "SiglipEncoderLayer": Names(
        "self_attn", "out_proj", "layer_norm1", "layer_norm2", "post_layernorm"
    ),
    "ViTLayer": Names("attention", "o_proj", "layernorm_before", "layernorm_after", "layernorm"),
    "DeiTLayer": Names("attention", "o_proj", "layernorm_before", "layernorm_after", "layernorm"),
}


AVERAGED = (CLIPForImageClassification, SiglipForImageClassification)
DRAWING = (ViTForMaskedImageModeling, DeiTForMaskedImageModeling)


class HFTower(Tower):
    """The vision transformer inside a transformers model."""

    has_dynamic_size = True  # by interpolate_pos_encoding=True in the call

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.trunk, self.blocks = _trunk(model)
        self.collector = self.trunk
        layer = library_class(self.blocks[0]).__name__
        self.names = LAYERS[layer]
        config = self.trunk.config
        self.width = config.hidden_size
        self.depth = len(self.blocks)
        self.num_heads = config.num_attention_heads
        self.image_size = _pair(config.image_size)
        (height, width), (rows, columns) = self.image_size, _pair(config.patch_size)
        self.num_patches = (height // rows) * (width // columns)
        self.num_prefix_tokens = 2 if hasattr(self.trunk.embeddings, "distillation_token") else 1
        if layer == "SiglipEncoderLayer":
            self.num_prefix_tokens, self.has_cls, self.absorbs_keys = 0, False, False
        self.needs_grid = _needs_grid(model)
        has_probe = not self.num_prefix_tokens and self.trunk.use_head
        pools = has_probe or isinstance(model, AVERAGED) or self.needs_grid is not None
        self.pools = pools and not _reads_layers(model)
        self.mlp_ratio = config.intermediate_size / self.width

    @staticmethod
    def refuses(model: nn.Module) -> str | None:
        found = _trunk(model)
        if found is None:
            if type(model).__name__.startswith("Siglip2"):
                return "it takes padded patches with a mask, which would not follow the tokens"
            return f"{type(model).__name__} has no layers of {', '.join(LAYERS)}"
        _, layers = found
        names = LAYERS[library_class(layers[0]).__name__]
        parts = ("q_proj", "k_proj", "v_proj")
        for attn in (unwrapped(getattr(layer, names.attn)) for layer in layers):
            if not _is_own(attn):
                return f"its attention is {type(attn).__name__}, a wrapper (wrap its projections)"
            if not hasattr(attn, "qkv") and not all(hasattr(attn, part) for part in parts):
                return f"a layer's attention has no {', '.join(parts)} (take a later transformers)"
        return None

    @property
    def saved_config(self) -> Any:
        return self.model.config

    def image_stats(self) -> Stats | None:
        return _stats_of(self.model)

    @property
    def checkpointing(self) -> bool:
        return False  # the layers do it themselves

    def refuses_dropping(self) -> str | None:
        """What reads the tokens of layers has zeros in the place of dropped patches."""
        return None if _reads_layers(self.model) else self.needs_grid

    def refuses_resizing(self) -> str | None:
        return self.needs_grid

    def collects(self, what: str, kwargs: dict[str, Any]) -> bool:
        name = f"output_{what}"
        return bool(kwargs.get(name, getattr(self.trunk.config, name)))

    @property
    def entrance(self) -> list[tuple[nn.Module, str]]:
        return [(self.trunk.embeddings, "forward")]

    def patchify(self, images: Tensor) -> Tensor:
        embeddings = self.trunk.embeddings
        return type(embeddings).forward(embeddings, images, interpolate_pos_encoding=True)

    def enter(self, tokens: Tensor) -> Tensor:
        return optional(self.trunk, "pre_layrnorm")(tokens)

    def embed(self, images: Tensor) -> Tensor:
        is_other = tuple(images.shape[2:]) != self.image_size
        return self.enter(self.trunk.embeddings(images, interpolate_pos_encoding=is_other))

    def call(self, i: int, block: Block, tokens: Tensor) -> Tensor:
        return block(tokens, attention_mask=None)

    def qkv(self, i: int, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, layers = getattr(self.blocks[i], self.names.norm1)(tokens), self._layers(i)
        each = layers[0](x).chunk(3, -1) if len(layers) == 1 else [layer(x) for layer in layers]
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.num_heads) for y in each)
        return q, k, v

    def projections(self, i: int) -> Projections:
        norm = unwrapped(getattr(self.blocks[i], self.names.norm1))
        return Projections(norm, self.num_heads, self._head_dim**-0.5)

    def weights(self, i: int) -> list[Affine] | None:
        return qkv_of(*self._layers(i))

    def attention_dropout(self, i: int) -> float:
        attn = self._attention(i)
        if not attn.training:
            return 0.0
        rate = getattr(attn, "attention_dropout", None) or getattr(attn, "dropout", 0.0)
        return rate.p if isinstance(rate, nn.Dropout) else rate

    def project(self, i: int, attended: Tensor) -> Tensor:
        out = getattr(self._attention(i), self.names.out)(attended)
        return optional(self.blocks[i], "dropout")(out)

    def mlp(self, i: int, tokens: Tensor) -> Tensor:
        block = self.blocks[i]
        out = block.mlp(getattr(block, self.names.norm2)(tokens))
        return tokens + optional(block, "dropout")(out)

    def is_plain(self, i: int) -> bool:
        return is_plain(self.blocks[i])

    def finish(self, tokens: Tensor) -> Tensor:
        return getattr(self.trunk, self.names.norm)(tokens)

    def _attention(self, i: int) -> nn.Module:
        """Block i's attention now: a wrapper may have come since the tower was made."""
        attn = unwrapped(getattr(self.blocks[i], self.names.attn))
        if not _is_own(attn):
            raise TypeError(
                f"model: expected transformers' attention in layer {i}, got a "
                f"{type(attn).__name__}; wrap its projections, or unreduce_ the model first"
            )
        return attn

    def _layers(self, i: int) -> tuple[nn.Module, ...]:
        """Block i's projections: one of queries, keys and values together, or three."""
        attn = self._attention(i)
        return (attn.qkv,) if hasattr(attn, "qkv") else (attn.q_proj, attn.k_proj, attn.v_proj)

    @property
    def _head_dim(self) -> int:
        return self._attention(0).head_dim


class HFImageText(ImageTextModel):
    """A whole model of transformers.

    kind: its class. mask_position: of attention_mask in the call, behind ids and pixels.
    """

    kind: ClassVar[type[nn.Module]]
    mask_position: ClassVar[int] = 0

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.image_model = model.vision_model

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        return isinstance(model, cls.kind)

    @property
    def saved_config(self) -> Any:
        return self.model.config

    def _refuses_width(self, text: int) -> str | None:
        vision = self.model.config.vision_config.hidden_size
        return None if text == vision else f"its text is {text} wide, its image tower {vision}"

    def text_cls(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | None:
        if not self.pair(pixel_values, input_ids):
            return None
        at = self.mask_position
        mask = args[at] if len(args) > at else kwargs.get("attention_mask")
        return self.encode_guidance(input_ids, mask)

    def encode_guidance(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        features = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return features.pooler_output

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        text = self.model.config.text_config
        sizes = text.max_position_embeddings, text.vocab_size, text.eos_token_id
        return {"pixel_values": images, "input_ids": random_ids(images, *sizes)}

    def image_stats(self) -> Stats:
        return _stats_of(self.model) or clip_stats()

    def load_tokenizer(self, name: str) -> Any:
        if Path(name).is_dir():
            check_tokenizer_in(Path(name))
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)

    def tokenise(self, tokenizer: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        longest = self.model.config.text_config.max_position_embeddings
        text = tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=min(longest, tokenizer.model_max_length),
            return_tensors="pt",
        )
        return {"input_ids": text.input_ids, "attention_mask": text.attention_mask}

    def tracing(self) -> AbstractContextManager:
        """Models of transformers read the values of their masks, which only fake tensors allow;
        they are slower.
        """
        return FakeTensorMode(allow_non_fake_inputs=True)


class HFClip(HFImageText):
    """CLIPModel: its text features, mapped back to the vision width, guide its image tower."""

    kind = CLIPModel

    def refuses(self) -> str | None:
        return None

    def encode_guidance(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        features = super().encode_guidance(input_ids, attention_mask)
        return through_transpose(F.normalize(features, dim=-1), self.model.visual_projection)


class HFSiglip(HFImageText):
    """SiglipModel, whose text features are as wide as its image tower.

    They are those of the last token, which may be padding: its processor pads to the full length,
    as in training.
    """

    kind = SiglipModel

    def tokenise(self, tokenizer: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        length = self.model.config.text_config.max_position_embeddings
        text = tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        return {"input_ids": text.input_ids}

    def refuses(self) -> str | None:
        return self._refuses_width(self.model.config.text_config.projection_size)


class HFBlip(HFImageText):
    """BlipForImageTextRetrieval, guided by BERT's CLS output; in its call use_itm_head comes before
    attention_mask.
    """

    kind = BlipForImageTextRetrieval
    mask_position = 1

    def refuses(self) -> str | None:
        return self._refuses_width(self.model.config.text_config.hidden_size)

    def encode_guidance(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        text = self.model.text_encoder(input_ids=input_ids, attention_mask=attention_mask)
        return text.last_hidden_state[:, 0]


def _stats_of(model: nn.Module) -> Stats | None:
    """What the image processor saved beside a model says, or None where there is none."""
    if not model.config.name_or_path:
        return None
    try:
        processor = AutoImageProcessor.from_pretrained(
            model.config.name_or_path, trust_remote_code=False
        )
    except (OSError, ValueError):
        return None
    return tuple(processor.image_mean), tuple(processor.image_std)


def _trunk(model: nn.Module) -> tuple[nn.Module, nn.ModuleList] | None:
    """The module that holds embeddings and layers of an image tower, and the layers."""
    for module in model.modules():
        if not hasattr(module, "embeddings") or not hasattr(module, "config"):
            continue
        layers = getattr(getattr(module, "encoder", module), "layers", None)
        is_image = hasattr(module.config, "patch_size")
        if is_image and _is_known(layers):
            return module, layers
    return None


def _needs_grid(model: nn.Module) -> str | None:
    """Why as many patches must leave the model's image tower as enter it, or None."""
    if isinstance(model, DRAWING):
        return "it draws an image from its patches, each at its place"
    if _language_config(model) is not None:
        return "its language model has a token for each patch of the image"
    return None


def _reads_layers(model: nn.Module) -> bool:
    """A language model reads the tokens of some layers, and nothing that the image tower pools."""
    return hasattr(_language_config(model), "vision_feature_layer")


def _language_config(model: nn.Module) -> Any:
    """That of a model that puts an image's tokens in place of those of a text, or None."""
    configs = (getattr(module, "config", None) for module in model.modules())
    names = ("image_token_id", "image_token_index")
    return next((c for c in configs if any(hasattr(c, name) for name in names)), None)


def _is_own(attn: nn.Module) -> bool:
    """Of transformers, or of a class that derives from one of theirs."""
    return any(cls.__module__.startswith("transformers.") for cls in type(attn).__mro__)


def _is_known(layers: nn.Module | None) -> bool:
    return isinstance(layers, nn.ModuleList) and library_class(layers[0]).__name__ in LAYERS


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
