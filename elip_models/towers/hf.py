"""Towers of vision transformers of Hugging Face transformers.

Each model has embeddings, a list of layers (`hf_layers.py` names the parts of a layer), and a final
norm. Its patches may be of images, videos (ViViT, VideoMAE, V-JEPA 2) or spectrograms (AST).
`hf_positions.py` has rotations and biases. If patches are averaged, or a probe attends to them, all
tokens return to their patches after the last layer, so that each counts by its size. They also
return if the model needs a token for each patch: a detector, a pixel decoder, a language model, or
a backbone, whose feature maps are hidden states.
"""

import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import DepthProPreTrainedModel
from transformers.backbone_utils import BackboneMixin

from elip_models.images import Stats
from elip_models.towers.hf_heads import averages, needs_grid, reads_layers
from elip_models.towers.hf_layers import LAYERS
from elip_models.towers.hf_positions import HFPositions, pair
from elip_models.towers.hf_processor import image_stats_of
from elip_models.towers.nested_modules import modules_around, modules_outside
from elip_models.towers.tower_data import plain_mlp_ratio
from elip_models.towers.tower_parts import Block, ModuleReference, part, run, unwrapped
from elip_models.towers.unsupported import transformers_reason
from elip_models.towers.wrapped_modules import library_class

RETURNS_TOKENS = re.compile(r"\w+Model(WithProjection)?")
WHOLE_OUTPUT = "output_hidden_states=True, in the call or the config, returns all"
CLASS_TOKENS = ("cls_token", "class_embedding")
PADDING_MASKS = ("pixel_attention_mask", "patch_attention_mask")  # of a model
PRE_NORMS = ("pre_layrnorm", "pre_layernorm")  # before block 0, both spellings


class HFTower(HFPositions):
    """A vision transformer inside a transformers model."""

    trunk = ModuleReference()
    has_dynamic_size = True  # DINOv2 in any call, others with interpolate_pos_encoding=True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.trunk, self.blocks = _trunk(model)
        self.names = LAYERS[library_class(self.blocks[0]).__name__]
        self.returns_tuple = self.names.returns_tuple
        attn = self._attention(0)
        self.rotates_itself = hasattr(attn, "apply_rotary_embeddings")
        config, embeddings = self.trunk.config, self.trunk.embeddings
        self.width = config.hidden_size
        self.depth = len(self.blocks)
        self.num_heads = config.num_attention_heads
        self.scale = getattr(attn, "head_dim", self.width // self.num_heads) ** -0.5
        self.num_frames, self.num_steps = _frames(config)
        self.image_size, patches = _sizes(config)
        self.num_patches = self.num_steps * patches
        self.has_cls = any(hasattr(embeddings, name) for name in CLASS_TOKENS)
        self.num_prefix_tokens = getattr(config, "n_cls_tokens", int(self.has_cls))
        self.num_prefix_tokens += getattr(config, "num_register_tokens", 0)
        self.num_prefix_tokens += hasattr(embeddings, "distillation_token")
        self.absorbs_keys = self.has_cls and not self.has_positions
        around = modules_around(model, self.trunk)
        self.needs_grid, self.reads_layers = needs_grid(model, around), reads_layers(around)
        has_probe = not self.has_cls and getattr(self.trunk, "use_head", False)
        pools = has_probe or averages(model, self.trunk) or self.needs_grid is not None
        self.pools = pools and not self.reads_layers
        mlp = (part(self.blocks[0], name) for name in self.names.mlp)
        self.mlp_ratio = plain_mlp_ratio(self.width, *(m for m in mlp if isinstance(m, nn.Module)))
        self.is_part = config is not model.config
        parameters = inspect.signature(type(self.blocks[0]).forward).parameters
        self.arguments = {"attention_mask": None} if "attention_mask" in parameters else {}
        self.takes_padding = any(
            name in inspect.signature(type(self.trunk).forward).parameters for name in PADDING_MASKS
        )
        if RETURNS_TOKENS.fullmatch(type(model).__name__):
            self.whole_output = WHOLE_OUTPUT

    @classmethod
    def refuses(cls, model: nn.Module) -> str | None:
        parts = _trunk(model)
        if parts is None or isinstance(model, DepthProPreTrainedModel):  # which has three towers
            return transformers_reason(model)
        trunk, layers = parts
        shared = ("shared_position_bias", "encoder.relative_position_bias")
        if any(part(trunk, name) is not None for name in shared):
            return "it passes the bias of its positions to its layers as a mask"
        if getattr(layers[0], "num_experts", 1) > 1:
            return "its layers choose an expert by the data set of an image; take num_experts=1"
        names = LAYERS[library_class(layers[0]).__name__]
        for attn in (unwrapped(getattr(layer, names.attn)) for layer in layers):
            if cls.refuses_attention(attn) is not None:
                return cls.refuses_attention(attn)
            if any(part(attn, name) is None for name in names.qkv):
                return (
                    f"a layer's attention has no {', '.join(names.qkv)} (take a later transformers)"
                )
            if not isinstance(getattr(attn, "q_norm", None), nn.Identity | None):
                return "it normalises queries over all heads together"
        return None

    @classmethod
    def refuses_attention(cls, attn: nn.Module) -> str | None:
        if any(base.__module__.startswith("transformers.") for base in type(attn).__mro__):
            return None
        return f"its attention is {type(attn).__name__}, a wrapper (wrap its projections)"

    def own_modules(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules of the model without those of models inside, such as a teacher."""
        around = set(modules_around(model, self.trunk))
        return modules_outside(model, lambda m: m not in around and _trunk(m) is not None)

    @property
    def saved_config(self) -> Any:
        """Return the config that transformers saves with the model."""
        return self.model.config

    def image_stats(self) -> Stats | None:
        return image_stats_of(self.model)

    def refuses_dropping(self) -> str | None:
        """Return why no patch may be dropped; a model that reads whole layers allows it."""
        return None if self.reads_layers else self.needs_grid

    def refuses_resizing(self) -> str | None:
        if any(hasattr(self.trunk.config, name) for name in ("num_mel_bins", "tubelet_size")):
            return "it reads no single images"
        if not hasattr(self.trunk.config, "image_size"):
            return "it takes patches of images of any size; give its processor fewer of them"
        if self.has_positions:
            return "its layers read positions of the images' own size"
        return self.needs_grid

    @property
    def collector(self) -> nn.Module:
        return self.trunk

    def collects(self, what: str, kwargs: dict[str, Any]) -> bool:
        if what == "hidden_states" and isinstance(self.trunk, BackboneMixin):
            return True
        name = f"output_{what}"
        return bool(kwargs.get(name, getattr(self.trunk.config, name)))

    @property
    def embed_methods(self) -> list[tuple[nn.Module, str]]:
        return [(self.trunk.embeddings, "forward")]

    def patchify(self, images: Tensor) -> Tensor:
        embeddings = self.trunk.embeddings
        pixels, options = self._inputs(images)
        return type(embeddings).forward(embeddings, pixels, **options)

    def enter(self, tokens: Tensor) -> Tensor:
        tokens = tokens if isinstance(tokens, Tensor) else tokens[0]  # some return more than tokens
        return run(self.trunk, PRE_NORMS, tokens)

    def embed(self, images: Tensor) -> Tensor:
        pixels, options = self._inputs(images)
        return self.enter(self.trunk.embeddings(pixels, **options))

    def call(self, i: int, block: Block, tokens: Tensor) -> Tensor:
        arguments = self.arguments
        if self.adds_bias:
            arguments = arguments | {"resolution": self.resolution or self.image_size}
        elif self.is_rotary and not self.rotates_itself:
            arguments = arguments | {"position_embeddings": self._rotations()}
        out = block(tokens, **arguments)
        return out[0] if self.returns_tuple else out

    def finish(self, tokens: Tensor) -> Tensor:
        return run(self.trunk, [self.names.norm], tokens)

    def _inputs(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return the arguments of the embeddings for images (B, 3, h, w), none of them padded."""
        embed, options = type(self.trunk.embeddings).forward, {}
        parameters = inspect.signature(embed).parameters
        if "interpolate_pos_encoding" in parameters and tuple(images.shape[-2:]) != self.image_size:
            options["interpolate_pos_encoding"] = True
        if "bool_masked_pos" in parameters:  # VideoMAE has no default
            options["bool_masked_pos"] = None
        rows, columns = pair(getattr(self.trunk.config, "patch_size", 1))
        grid = (images.shape[-2] // rows, images.shape[-1] // columns)
        if "patch_attention_mask" in parameters:
            shape = (images.shape[0], *grid)
            mask = torch.ones(shape, dtype=torch.bool, device=images.device)
            options["patch_attention_mask"] = mask
        if "spatial_shapes" in parameters:  # the model takes patches
            options["spatial_shapes"] = torch.tensor([grid], device=images.device).expand(
                images.shape[0], -1
            )
            pattern = "b c (h p) (w q) -> b (h w) (p q c)"
            images = rearrange(images, pattern, p=rows, q=columns)
        return images, options


def _trunk(model: nn.Module) -> tuple[nn.Module, nn.ModuleList] | None:
    """Return the module with the embeddings and layers of the image tower, and its layers.

    Its config is a part of the model's, unlike that of another model inside, such as a teacher.
    """
    kinds = set(map(type, _configs_in(getattr(model, "config", None))))
    for module in model.modules():
        if not hasattr(module, "embeddings") or type(getattr(module, "config", None)) not in kinds:
            continue
        parents = [getattr(module, name, None) for name in ("encoder", "model")]
        for parent in (*parents, module):
            layers = getattr(parent, "layers", getattr(parent, "layer", None))
            is_image = any(hasattr(module.config, name) for name in ("patch_size", "tubelet_size"))
            if is_image and _is_known(layers):
                return module, layers
    return None


def _configs_in(config: Any) -> Iterator[Any]:
    """Yield a config of transformers, and those of the model's parts inside it."""
    if hasattr(config, "model_type"):
        yield config
        for value in vars(config).values():
            yield from _configs_in(value)


def _is_known(layers: nn.Module | None) -> bool:
    return isinstance(layers, nn.ModuleList) and library_class(layers[0]).__name__ in LAYERS


def _frames(config: Any) -> tuple[int, int]:
    """Return the number of frames of a clip, and that of its tubelets over time."""
    frames = getattr(config, "num_frames", getattr(config, "frames_per_clip", 1))
    tubelet = getattr(config, "tubelet_size", 1)  # its frames, or its frames, rows and columns
    return frames, frames // (tubelet if isinstance(tubelet, int) else tubelet[0])


def _sizes(config: Any) -> tuple[tuple[int, int], int]:
    """Return the size of an image, frame or spectrogram, and the number of its patches."""
    tubelet = getattr(config, "tubelet_size", 1)
    rows, columns = pair(config.patch_size) if isinstance(tubelet, int) else tubelet[1:]
    if hasattr(config, "num_mel_bins"):  # patches of a spectrogram overlap
        bins, length = config.num_mel_bins, config.max_length
        across = (bins - rows) // config.frequency_stride + 1
        return (bins, length), across * ((length - columns) // config.time_stride + 1)
    size = getattr(config, "image_size", getattr(config, "crop_size", None))
    if size is None:  # of SigLIP 2, whose positions have a square grid
        side = math.isqrt(config.num_patches)
        return (side * rows, side * columns), side * side
    height, width = pair(size)
    return (height, width), (height // rows) * (width // columns)
