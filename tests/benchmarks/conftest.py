"""Photographs and a small model for the tests of `benchmarks.real`."""

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

TILE, N = 210, 12


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder of tiles of the two photographs that scikit-learn ships."""
    folder = tmp_path_factory.mktemp("photographs")
    for name, image in zip("ab", load_sample_images().images, strict=True):
        for i in range(N // 2):
            top, left = TILE * (i // 3), TILE * (i % 3)
            tile = image[top : top + TILE, left : left + TILE]
            Image.fromarray(tile).save(folder / f"{name}{i}.png")
    return folder


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"depth": 4, "embed_dim": 24, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()
