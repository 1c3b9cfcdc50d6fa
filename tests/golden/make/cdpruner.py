"""Make the case `cdpruner`: image tokens that CDPruner's `encode_images` keeps, 20 inputs.

Run: python -m tests.golden.make.cdpruner CHECKOUT_OF_CDPRUNER
"""

import importlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from tests.golden.make.common import package, randn, save, stub

FILE = "llava/model/llava_arch.py"
SHAPES = ((36, 24, 9), (64, 48, 16), (49, 32, 12), (100, 64, 20))  # tokens, width, kept
INPUTS, EMBEDDING = 20, 16


def official(root):
    """Return the mixin of the official LLaVA, without the parts that it does not use here."""
    sys.path.insert(0, str(root))
    for name in ("llava", "llava.model"):
        package(name, Path(root, *name.split(".")))
    for name, attribute in (
        ("llava.model.multimodal_encoder", None),
        ("llava.model.multimodal_encoder.builder", "build_vision_tower"),
        ("llava.model.multimodal_projector", None),
        ("llava.model.multimodal_projector.builder", "build_vision_projector"),
        ("llava.mm_utils", "get_anyres_image_grid_shape"),
    ):
        stub(name, **({} if attribute is None else {attribute: None}))
    return importlib.import_module("llava.model.llava_arch").LlavaMetaForCausalLM


class Model:
    """A model whose tower returns given features, and whose projector is the identity."""

    def __init__(self, mixin, features, keep):
        self.encode_images = mixin.encode_images.__get__(self)
        self.features = features
        self.visual_token_num = keep

    def get_model(self):
        return self

    def get_vision_tower(self):
        return lambda images, texts=None: self.features

    def mm_projector(self, tokens):
        return tokens


def main(root):
    mixin, tensors = official(root), {}
    for i in range(INPUTS):
        n, width, keep = SHAPES[i % len(SHAPES)]
        tokens, images = (
            randn(1, n, size, seed=10 * i + j) for j, size in enumerate((width, EMBEDDING))
        )
        text = randn(1, EMBEDDING, seed=10 * i + 2)
        _, kept = Model(mixin, (tokens, images, text), keep).encode_images(None)
        relevance = -(F.normalize(images, dim=-1) @ F.normalize(text, dim=-1).mT).squeeze(-1)
        tensors |= {
            f"{i}/tokens": tokens,
            f"{i}/relevance": relevance,
            f"{i}/kept": kept[0].nonzero()[:, 0],
        }
    save("cdpruner", tensors, source="CDPruner", root=root, files=[FILE])


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1])
