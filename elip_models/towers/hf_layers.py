"""The layers of transformers' vision models, one row of names for each class.

    x = x + residual1(out(attention(norm1(x))));  x = x + residual2(mlp(norm2(x)))

All these classes compute this function; the names of its parts differ. A row names the parts of a
layer; a part is a module, or a parameter that scales each channel. `run` calls parts in order.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn


class Layer(NamedTuple):
    """The names of a layer's parts. Those with dots are of inner modules.

    attn: the module that has the projections. norm1, norm2: the norms before attention and MLP.
    out: in `attn`, from its attended values to its output. mlp: in the layer, of its second half.
    after: in the layer, between the output of either half and its residual; {} is the half, 1 or 2.
    qkv: in `attn`, the projections, one joint or three.
    bias: in the layer, the module that computes the bias of its attention from the grid of patches.
    returns_tuple: the layer returns a tuple, whose first item is the tokens.
    norm: in the model, the norm after the last layer.
    """

    attn: str
    norm1: str
    norm2: str
    norm: str
    out: tuple[str, ...]
    mlp: tuple[str, ...] = ("mlp",)
    after: tuple[str, ...] = ()
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    bias: str = "relative_position_bias"
    returns_tuple: bool = False


CLIP = Layer("self_attn", "layer_norm1", "layer_norm2", "post_layernorm", ("out_proj",))
BLIP = CLIP._replace(out=("projection",), qkv=("qkv",))
VIT = Layer(
    *("attention", "layernorm_before", "layernorm_after", "layernorm", ("o_proj",)),
    after=("dropout",),
)
DINO = Layer(
    *("attention", "norm1", "norm2", "layernorm", ("o_proj",)),
    after=("layer_scale{}", "drop_path"),
)
VIDEO_MAE = VIT._replace(
    qkv=("attention.query", "attention.key", "attention.value"),
    out=("output.dense", "output.dropout"),
    mlp=("intermediate", "output.dense", "output.dropout"),
    after=(),
)
LAYERS = {
    "CLIPEncoderLayer": CLIP,
    "CLIPSegEncoderLayer": CLIP,
    "MetaClip2EncoderLayer": CLIP,
    "AltCLIPEncoderLayer": CLIP,
    "MLCDEncoderLayer": CLIP,
    "ChineseCLIPVisionLayer": CLIP,
    "GitVisionEncoderLayer": CLIP,
    "Kosmos2VisionEncoderLayer": CLIP,
    "OwlViTEncoderLayer": CLIP,
    "Owlv2EncoderLayer": CLIP,
    "SiglipEncoderLayer": CLIP,
    "Siglip2EncoderLayer": CLIP,
    "JanusVisionEncoderLayer": CLIP._replace(out=("projection_layer", "projection_dropout")),
    "Idefics2EncoderLayer": CLIP,
    "Idefics3EncoderLayer": CLIP,
    "SmolVLMEncoderLayer": CLIP,
    "BlipEncoderLayer": BLIP,
    "Blip2EncoderLayer": BLIP,
    "InstructBlipEncoderLayer": BLIP,
    "ViTLayer": VIT,
    "DeiTLayer": VIT,
    "IJepaLayer": VIT,
    "ViTMSNLayer": VIT,
    "BeitLayer": VIT._replace(after=("dropout", "lambda_{}", "drop_path")),
    "PixioLayer": VIT._replace(after=("dropout", "drop_path")),
    "ASTLayer": VIT,
    "VivitLayer": VIT,
    "VideoMAELayer": VIDEO_MAE,
    "DPTViTLayer": VIDEO_MAE,
    "Data2VecVisionLayer": VIDEO_MAE._replace(
        after=("lambda_{}", "drop_path"),
        bias="attention.attention.relative_position_bias",
        returns_tuple=True,
    ),
    "VJEPA2Layer": DINO._replace(
        qkv=("query", "key", "value"), out=("proj",), after=("drop_path",), returns_tuple=True
    ),
    "Dinov2Layer": DINO,
    "Dinov2WithRegistersLayer": DINO,
    "Tipsv2VisionLayer": DINO,
    "DINOv3ViTLayer": DINO._replace(norm="norm"),
    "InternVLVisionLayer": VIT._replace(
        out=("projection_layer", "projection_dropout"), mlp=("mlp", "dropout"), after=("lambda_{}",)
    ),
    "Aimv2EncoderLayer": Layer(
        *("attention", "rms_norm1", "rms_norm2", "rms_norm", ("out_proj",)), mlp=("ffn",)
    ),
}
"""By the name of the class."""


def part(module: nn.Module, name: str) -> nn.Module | Tensor | float | None:
    """Return the inner module, parameter or number `name`, with dots; None if there is none."""
    found = module
    for each in name.split("."):
        found = getattr(found, each, None)
    return found


def run(module: nn.Module, names: Iterable[str], x: Tensor) -> Tensor:
    """Run parts of a module in order: call modules, multiply by the others, skip what is absent."""
    for name in names:
        each = part(module, name)
        if isinstance(each, nn.Module):
            x = each(x)
        elif each is not None:
            x = each * x
    return x
