"""Materials and a small model for the tests of `benchmarks.real`."""

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import BertConfig, BertModel, BertTokenizer

TILE = 105
SPLITS = {"train": 5, "validation": 2, "test": 2}
"""Photographs of each class."""
CAPTIONED = {"train": 12, "dev": 11, "test": 11}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder of materials: tiles of two photographs of scikit-learn, a tiny text encoder."""
    folder = tmp_path_factory.mktemp("materials")
    photographs = load_sample_images().images
    count = 0

    def write(path, photograph):
        nonlocal count
        top, left = TILE * (count // 6 % 4), TILE * (count % 6)
        tile = photographs[photograph][top : top + TILE, left : left + TILE]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tile).save(path)
        count += 1

    for split, photos in SPLITS.items():
        for i in range(photos):
            write(folder / "clothes" / split / "temple" / f"{i}.png", 0)
            write(folder / "clothes" / split / "flower" / f"{i}.png", 1)
    captions = []
    for split, photos in CAPTIONED.items():
        names = [f"{split}{i}.png" for i in range(photos)]
        for i, name in enumerate(names):
            write(folder / "flickr8k" / "images" / name, i % 2)
            captions += [f"{name}#{k}\ta {'flower' if i % 2 else 'temple'} {k}" for k in range(5)]
        file = folder / "flickr8k" / f"Flickr_8k.{split}Images.txt"
        file.write_text("\n".join([*names, "without_a_caption.png", "without_a_file.png"]))
        captions += [f"without_a_file.png#{k}\ta temple {k}" for k in range(5)]
    (folder / "flickr8k" / "Flickr8k.token.txt").write_text("\n".join(captions))
    write_text_encoder(folder / "all-MiniLM-L6-v2")
    return folder


def write_text_encoder(folder):
    """Save a tiny text encoder with random weights."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "flower", "temple", *"01234"]
    BertTokenizer({word: i for i, word in enumerate(words)}).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(words), "intermediate_size": 48}
    BertModel(BertConfig(**sizes)).save_pretrained(folder)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"depth": 4, "embed_dim": 24, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()
