"""Towers of vision transformers of Hugging Face transformers.

Models: CLIP, ViT, DeiT (a distillation token beside CLS), BLIP, SigLIP (no CLS) and DINOv2 (also
with registers). Each has embeddings, a list of layers of two halves, and a final norm. BLIP's own
forward attends eagerly; `attend` uses scaled_dot_product_attention. If patches are averaged, or
SigLIP's probe attends to them, all tokens return to their patches after the last layer, so that
each counts by its size. They also return if the model needs a token for each patch: a pixel
decoder, a language model, or a backbone, whose feature maps are hidden states.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from einops import rearrange
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers import (
    CLIPForImageClassification,
    DeiTForMaskedImageModeling,
    DepthProPreTrainedModel,
    Dinov2ForImageClassification,
    Dinov2WithRegistersForImageClassification,
    SiglipForImageClassification,
    ViTForMaskedImageModeling,
)
from transformers.backbone_utils import BackboneMixin

from elip_models.towers.base import Tower
from elip_models.towers.reducible_model import Stats
from elip_models.towers.tower_parts import Block, Projections, optional, plain_mlp_ratio
from elip_models.towers.unsupported import transformers_reason
from elip_models.towers.wrapped_modules import Affine, is_plain, library_class, qkv_of, unwrapped
from elip_models.validation import check, mismatch_error


class Names(NamedTuple):
    """The names of a layer's parts, and of the model's final norm."""

    attn: str
    out: str
    norm1: str
    norm2: str
    norm: str


CLIP_NORMS = ("layer_norm1", "layer_norm2", "post_layernorm")
VIT_NAMES = Names("attention", "o_proj", "layernorm_before", "layernorm_after", "layernorm")
DINO_NAMES = Names("attention", "o_proj", "norm1", "norm2", "layernorm")
LAYERS = {
    "CLIPEncoderLayer": Names("self_attn", "out_proj", *CLIP_NORMS),
    "BlipEncoderLayer": Names("self_attn", "projection", *CLIP_NORMS),
    "SiglipEncoderLayer": Names("self_attn", "out_proj", *CLIP_NORMS),
    "ViTLayer": VIT_NAMES,
    "DeiTLayer": VIT_NAMES,
    "Dinov2Layer": DINO_NAMES,
    "Dinov2WithRegistersLayer": DINO_NAMES,
}
AVERAGED = (
    CLIPForImageClassification,
    SiglipForImageClassification,
    Dinov2ForImageClassification,
    Dinov2WithRegistersForImageClassification,
)
PIXEL_DECODERS = (ViTForMaskedImageModeling, DeiTForMaskedImageModeling)
NUMBERS = tuple[float, ...]
RETURNS_TOKENS = re.compile(r"\w+Model(WithProjection)?")
WHOLE_OUTPUT = "output_hidden_states=True, in the call or the config, returns all"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class HFTower(Tower):
    """A vision transformer inside a transformers model."""

    has_dynamic_size = True  # DINOv2 in any call, others with interpolate_pos_encoding=True

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
        self.num_prefix_tokens = 1 + getattr(config, "num_register_tokens", 0)
        self.num_prefix_tokens += hasattr(self.trunk.embeddings, "distillation_token")
        if layer == "SiglipEncoderLayer":
            self.num_prefix_tokens, self.has_cls, self.absorbs_keys = 0, False, False
        self.needs_grid = _needs_grid(model)
        has_probe = not self.num_prefix_tokens and self.trunk.use_head
        pools = has_probe or isinstance(model, AVERAGED) or self.needs_grid is not None
        self.pools = pools and not _reads_layers(model)
        self.mlp_ratio = plain_mlp_ratio(self.blocks[0].mlp, self.width)
        self.is_part = config is not model.config
        if RETURNS_TOKENS.fullmatch(type(model).__name__):
            self.whole_output = WHOLE_OUTPUT

    @staticmethod
    def refuses(model: nn.Module) -> str | None:
        """Return why the model cannot be a tower, in one sentence, or None if it can."""
        found = _trunk(model)
        if found is None or isinstance(model, DepthProPreTrainedModel):  # which has three towers
            return transformers_reason(model)
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
        """Return the config that transformers saves with the model."""
        return self.model.config

    def image_stats(self) -> Stats | None:
        """Return the mean and standard deviation that normalise images, or None if unknown."""
        return image_stats_of(self.model)

    def refuses_dropping(self) -> str | None:
        """Return why no patch may be dropped; a model that reads single layers has zeros there."""
        return None if _reads_layers(self.model) else self.needs_grid

    def refuses_resizing(self) -> str | None:
        """Return why the image size cannot change, in one sentence, or None if it can."""
        return self.needs_grid

    def collects(self, what: str, kwargs: dict[str, Any]) -> bool:
        """Return whether this call of `collector` returns all "hidden_states" or "attentions"."""
        if what == "hidden_states" and isinstance(self.trunk, BackboneMixin):
            return True
        name = f"output_{what}"
        return bool(kwargs.get(name, getattr(self.trunk.config, name)))

    @property
    def entrance(self) -> list[tuple[nn.Module, str]]:
        """Return the owners and names of the methods that embed images, in call order."""
        return [(self.trunk.embeddings, "forward")]

    def patchify(self, images: Tensor) -> Tensor:
        """Return what `entrance` makes of images (B, 3, h, w), with interpolated positions."""
        embeddings = self.trunk.embeddings
        return type(embeddings).forward(embeddings, images, **self._interpolation())

    def enter(self, tokens: Tensor) -> Tensor:
        """Run the modules between `entrance` and block 0."""
        return optional(self.trunk, "pre_layrnorm")(tokens)

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens before block 0 of images (B, 3, H, W)."""
        is_other = tuple(images.shape[2:]) != self.image_size
        options = self._interpolation() if is_other else {}
        return self.enter(self.trunk.embeddings(images, **options))

    def call(self, i: int, block: Block, tokens: Tensor) -> Tensor:
        """Call block i, or its forward alone, with the arguments that its model passes."""
        return block(tokens, attention_mask=None)

    def qkv(self, i: int, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return block i's queries, keys and values (B, H, N, d) of tokens before its norm."""
        x, layers = getattr(self.blocks[i], self.names.norm1)(tokens), self._layers(i)
        each = layers[0](x).chunk(3, -1) if len(layers) == 1 else [layer(x) for layer in layers]
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.num_heads) for y in each)
        return q, k, v

    def projections(self, i: int) -> Projections:
        """Return the modules around block i's projections."""
        norm = unwrapped(getattr(self.blocks[i], self.names.norm1))
        return Projections(norm, self.num_heads, self._attention(0).head_dim ** -0.5)

    def weights(self, i: int) -> list[Affine] | None:
        """Return block i's query, key and value projections, each (D, D) as in nn.Linear."""
        return qkv_of(*self._layers(i))

    def attention_dropout(self, i: int) -> float:
        """Return the current dropout rate of block i's attention weights."""
        attn = self._attention(i)
        if not attn.training:
            return 0.0
        rate = getattr(attn, "attention_dropout", None) or getattr(attn, "dropout", 0.0)
        return rate.p if isinstance(rate, nn.Dropout) else rate

    def project(self, i: int, attended: Tensor) -> Tensor:
        """Return what block i adds to the tokens, from its attention's output (B, N, D)."""
        return self._residual(i, 1, getattr(self._attention(i), self.names.out)(attended))

    def mlp(self, i: int, tokens: Tensor) -> Tensor:
        """Run block i's MLP half, residual included."""
        block = self.blocks[i]
        return tokens + self._residual(i, 2, block.mlp(getattr(block, self.names.norm2)(tokens)))

    def is_plain(self, i: int) -> bool:
        """Return whether block i runs only its own parts, in eval mode, so `cls_block` is exact."""
        return is_plain(self.blocks[i])

    def finish(self, tokens: Tensor) -> Tensor:
        """Run the final norm, before pooling."""
        return getattr(self.trunk, self.names.norm)(tokens)

    def _interpolation(self) -> dict[str, bool]:
        """Return the arguments of the embeddings for images of another size."""
        return {} if self.names == DINO_NAMES else {"interpolate_pos_encoding": True}

    def _residual(self, i: int, half: int, out: Tensor) -> Tensor:
        """Run the modules between the output of block i's half 1 or 2 and its residual."""
        for name in ("dropout", f"layer_scale{half}", "drop_path"):
            out = optional(self.blocks[i], name)(out)
        return out

    def _attention(self, i: int) -> nn.Module:
        """Return block i's attention, which may have been wrapped since the tower was made."""
        attn = unwrapped(getattr(self.blocks[i], self.names.attn))
        if not _is_own(attn):
            raise TypeError(
                f"model: expected transformers' attention in layer {i}, got a "
                f"{type(attn).__name__}; wrap its projections, or unreduce_ the model first"
            )
        return attn

    def _layers(self, i: int) -> tuple[nn.Module, ...]:
        """Return block i's projections: one joint layer, or those of queries, keys and values."""
        attn = self._attention(i)
        return (attn.qkv,) if hasattr(attn, "qkv") else (attn.q_proj, attn.k_proj, attn.v_proj)


def image_stats_of(model: nn.Module) -> Stats | None:
    """Return the statistics in the model's config or in a local file of its processor, or None.

    A model from the hub has its files in the local cache; the network is not used.
    """
    config = model.config
    settings = [vars(config)]
    for file in filter(None, (_local_file(config, name) for name in PROCESSOR_FILES)):
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            check("content", saved, dict)
            check("image_processor", saved.setdefault("image_processor", {}), dict)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{file}: expected settings of a processor: {error}") from error
        settings += [saved, saved["image_processor"]]
    found = (each for each in settings if each.get("image_mean") and each.get("image_std"))
    stats = next(found, None)
    if stats is None:
        return None
    for name in ("image_mean", "image_std"):
        if not isinstance(stats[name], list | tuple) or mismatch_error(tuple(stats[name]), NUMBERS):
            raise ValueError(f"{name}: expected numbers beside the model, got {stats[name]!r:.100}")
    return tuple(stats["image_mean"]), tuple(stats["image_std"])


def _local_file(config: Any, name: str) -> Path | None:
    """Return a file beside the model, in its folder or in the local cache of the hub, or None."""
    if not config.name_or_path:
        return None
    folder, revision = Path(config.name_or_path), getattr(config, "_commit_hash", None)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        path = try_to_load_from_cache(config.name_or_path, name, revision=revision)
    except HFValidationError:  # a folder that is gone
        return None
    return Path(path) if isinstance(path, str) else None


def _trunk(model: nn.Module) -> tuple[nn.Module, nn.ModuleList] | None:
    """Return the module with the embeddings and layers of an image tower, and its layers."""
    for module in model.modules():
        if not hasattr(module, "embeddings") or not hasattr(module, "config"):
            continue
        parent = getattr(module, "encoder", module)
        layers = getattr(parent, "layers", getattr(parent, "layer", None))
        is_image = hasattr(module.config, "patch_size")
        if is_image and _is_known(layers):
            return module, layers
    return None


def _needs_grid(model: nn.Module) -> str | None:
    """Return why the image tower must return a token for each patch, or None if it need not."""
    if isinstance(model, PIXEL_DECODERS):
        return "it decodes pixels from its patches, each at its position"
    if _language_config(model) is not None:
        return "its language model has a token for each patch of the image"
    if any(isinstance(module, BackboneMixin) for module in model.modules()):
        return "its feature maps have a position for each patch"
    return None


def _reads_layers(model: nn.Module) -> bool:
    """Return whether a language model reads the tokens of single layers, and no pooled output."""
    return hasattr(_language_config(model), "vision_feature_layer")


def _language_config(model: nn.Module) -> Any:
    """Return the config of a model that inserts image tokens into a text, or None."""
    configs = (getattr(module, "config", None) for module in model.modules())
    names = ("image_token_id", "image_token_index")
    return next((c for c in configs if any(hasattr(c, name) for name in names)), None)


def _is_own(attn: nn.Module) -> bool:
    """Return whether transformers defines the class, or a base class of it."""
    return any(cls.__module__.startswith("transformers.") for cls in type(attn).__mro__)


def _is_known(layers: nn.Module | None) -> bool:
    return isinstance(layers, nn.ModuleList) and library_class(layers[0]).__name__ in LAYERS


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
