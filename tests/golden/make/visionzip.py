"""Make the case `visionzip`: the tokens of VisionZip's image tower for LLaVA, 20 inputs.

Run: python -m tests.golden.make.visionzip CHECKOUT_OF_VISIONZIP
"""

import importlib
import sys
from types import SimpleNamespace

import torch

from tests.golden.make.common import package, randn, save, stub

FILE = "visionzip/clip_encoder.py"
SHAPES = ((36, 24, 9, 3), (64, 32, 14, 2), (49, 32, 11, 4), (100, 48, 16, 4))
INPUTS, BATCH, HEADS, KEY = 20, 2, 3, 8


def official(root):
    """Return the forward method of the official tower."""
    package("visionzip", f"{root}/visionzip")
    stub("visionzip.utils", CLIPAttention_forward=None, CLIP_EncoderLayer_forward=None)
    sys.path.insert(0, str(root))
    return importlib.import_module("visionzip.clip_encoder").CLIPVisionTower_VisionZip.forward


def tower(attention, hidden, keys, dominant, contextual):
    """Return what the official forward method reads of its tower: given values."""
    outputs = SimpleNamespace(attentions=[attention, None], hidden_states=[hidden, None])
    layers = [SimpleNamespace(metric=keys), None]

    class Tower:
        def __init__(self):
            self.vision_model = SimpleNamespace(encoder=SimpleNamespace(layers=layers))
            self._info = {"dominant": dominant, "contextual": contextual}

        def __call__(self, *_, **__):
            return outputs

    return SimpleNamespace(vision_tower=Tower(), device="cpu", dtype=torch.float32)


def main(root):
    forward, tensors = official(root), {}
    for i in range(INPUTS):
        n, width, dominant, contextual = SHAPES[i % len(SHAPES)]
        scores = randn(BATCH, HEADS, 1, n + 1, seed=10 * i)
        hidden = randn(BATCH, n + 1, width, seed=10 * i + 1)
        keys = randn(BATCH, n + 1, KEY, seed=10 * i + 2)
        attention = scores.softmax(-1)
        model = tower(attention, hidden, keys, dominant, contextual)
        tokens, kept = forward.__wrapped__(model, torch.zeros(1))
        tensors |= {
            f"{i}/attention": attention.mean(1)[:, 0, 1:],
            f"{i}/hidden": hidden[:, 1:],
            f"{i}/keys": keys[:, 1:],
            f"{i}/dominant": kept[:, 1:] - 1,
            f"{i}/contextual": tokens[:, dominant + 1 :],
        }
    save("visionzip", tensors, source="VisionZip", root=root, files=[FILE])


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1])
