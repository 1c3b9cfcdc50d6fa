"""Train a small text tower against the frozen CLS features of DINOv2 (locked-image tuning).

    python -m benchmarks.real.text_tower FOLDER --captions Flickr8k.token.txt \
        --train Flickr_8k.trainImages.txt --dev Flickr_8k.devImages.txt \
        --output text_tower.safetensors

    z = (x - mean) W                                   of the dense CLS feature x of an image
    t = linear(mean over tokens of a transformer)      of a caption, in the space of z
    score = cosine(z, t)

`mean` and `W` are the mean and the whitening (ZCA) of the training features. Only the text tower is
trained, by the symmetric contrastive loss: Zhai et al., LiT: Zero-Shot Transfer with Locked-image
Text Tuning, CVPR 2022. The tokenizer is trained on the training captions.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

import elip_models
from benchmarks.real.dinov2 import MODELS
from benchmarks.real.evaluation import Setting, dense_setting
from benchmarks.real.measures import retrieved
from benchmarks.real.photographs import batches, photograph_paths
from elip_models.pretraining.data.tokenizer import train_tokenizer
from elip_models.pretraining.models.layers.losses import contrastive_loss

WIDTH, LAYERS, HEADS, VOCABULARY, MAX_TOKENS = 256, 2, 4, 4000, 32
DROPOUT, BATCH, RATE, WEIGHT_DECAY, WARM_UP = 0.1, 500, 1e-3, 0.1, 0.1
AT_ONCE = 5
"""Images of a forward pass; more of them take longer on one CPU core."""
PADDED = 125
"""Texts of similar length that are padded together."""
SHRINKAGE = 0.1
"""Share of the mean variance that is added to every variance before whitening."""
TOKENIZER = "tokenizer"


class TextTower(nn.Module):
    """A transformer of captions whose output is compared with whitened CLS features.

    Args:
        tokenizer: of the library tokenizers; its padding id is 0.
        features: the width D of the image features.
    """

    def __init__(self, tokenizer: Tokenizer, features: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        tokenizer.enable_truncation(MAX_TOKENS)
        self.tokens = nn.Embedding(tokenizer.get_vocab_size(), WIDTH)
        self.positions = nn.Embedding(MAX_TOKENS, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, DROPOUT, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(WIDTH)
        self.layers = nn.TransformerEncoder(layer, LAYERS, norm, enable_nested_tensor=False)
        self.projection = nn.Linear(WIDTH, features, bias=False)
        self.scale = nn.Parameter(torch.tensor(3.0))  # log of the inverse temperature
        self.register_buffer("length", torch.ones(()))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("whitening", torch.eye(features))
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def fit_features(self, features: Tensor) -> None:
        """Set mean, whitening and mean whitened norm to those of training features (n, D)."""
        self.mean.copy_(features.mean(0))
        variance, axes = torch.linalg.eigh(torch.cov(features.T))
        variance = variance + SHRINKAGE * variance.mean()
        self.whitening.copy_(axes / variance.sqrt() @ axes.T)
        self.length.copy_(((features - self.mean) @ self.whitening).norm(dim=1).mean())

    def image_features(self, cls: Tensor) -> Tensor:
        """Return z (n, D) of CLS features, whitened and normalised."""
        return F.normalize((cls - self.mean) @ self.whitening, dim=-1)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Return t (n, D) of texts, normalised."""
        ids = [torch.tensor(each.ids) for each in self.tokenizer.encode_batch(list(texts))]
        order = torch.tensor([len(each) for each in ids]).argsort()
        pooled = [self._pooled([ids[i] for i in some]) for some in order.split(PADDED)]
        return F.normalize(self.projection(torch.cat(pooled)[order.argsort()]), dim=-1)

    def _pooled(self, ids: list[Tensor]) -> Tensor:
        """Return the mean output over the tokens of each text, (n, WIDTH)."""
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        real = padded != 0
        tokens = self.tokens(padded) + self.positions.weight[: padded.shape[1]]
        tokens = self.layers(tokens, src_key_padding_mask=~real)
        return (tokens * real[..., None]).sum(1) / real.sum(1, keepdim=True)

    def as_cls(self, texts: Tensor) -> Tensor:
        """Return the CLS features (n, D) that have t (n, D) as z, with z's mean norm."""
        return self.mean + self.length * texts @ torch.linalg.inv(self.whitening)

    def save(self, path: Path) -> None:
        """Write weights and tokenizer to a safetensors file."""
        state = {name: each.contiguous() for name, each in self.state_dict().items()}
        save_file(state, path, {TOKENIZER: self.tokenizer.to_str()})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the tower that `save` wrote, in eval mode."""
        with safe_open(path, "pt") as file:
            tokenizer = Tokenizer.from_str(file.metadata()[TOKENIZER])
            width = file.get_slice("mean").get_shape()[0]
        tower = cls(tokenizer, width)
        tower.load_state_dict(load_file(path))
        return tower.eval()


def read_captions(file: Path, paths: Sequence[Path]) -> list[list[str]]:
    """Return the captions of each photograph, from lines 'NAME#NUMBER<tab>caption'."""
    found: dict[str, list[str]] = {path.name: [] for path in paths}
    for line in file.read_text(encoding="utf-8").splitlines():
        name, _, caption = line.partition("\t")
        name = name.rpartition("#")[0]
        if name in found and caption:
            found[name].append(caption)
    missing = [name for name, captions in found.items() if not captions]
    if missing:
        raise ValueError(f"captions: expected some of every photograph, got none of {missing[0]}")
    return [found[path.name] for path in paths]


@torch.no_grad()
def cls_features(
    model: nn.Module,
    setting: Setting,
    paths: Sequence[Path],
    stored: Path | None,
    advance: Callable[[int], object],
) -> Tensor:
    """Return the CLS features (n, D) of photographs under a setting.

    Args:
        model: the dense model.
        setting: the reduction.
        paths: the photographs.
        stored: a safetensors file with features by setting. Features that it lacks are added.
        advance: called with the size of each batch.

    Raises:
        ValueError: the features in `stored` are those of other photographs.
    """
    names = hashlib.sha256("\n".join(path.name for path in paths).encode()).hexdigest()
    found: dict[str, Tensor] = {}
    if stored is not None and stored.is_file():
        with safe_open(stored, "pt") as file:
            if file.metadata().get("names") != names:
                raise ValueError(f"features: expected those of these photographs in {stored}")
        found = load_file(stored)
    if setting.text not in found:
        torch.manual_seed(0)  # of strategies that draw
        strategy, encoded = setting.summary.strategy, []
        for images in batches(paths):
            for some in images.split(AT_ONCE):
                tokens = elip_models.encode_image(model, some, strategy=strategy)
                encoded.append(tokens[:, 0].clone())
            advance(len(images))
        found[setting.text] = torch.cat(encoded)
        if stored is not None:
            save_file(found, stored, {"names": names})
    return found[setting.text]


def stored_in(folder: Path | None, names: Path | None) -> Path | None:
    """Return the file in a folder for the features of a list of photographs."""
    return folder and folder / f"{names.stem if names else 'all'}.safetensors"


@torch.no_grad()
def encode_captions(tower: TextTower, captions: Sequence[Sequence[str]]) -> list[Tensor]:
    """Return the text features (captions, D) of each image."""
    texts = [text for each in captions for text in each]
    found = [tower(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
    return list(torch.cat(found).split([len(each) for each in captions]))


def train(
    tower: TextTower,
    cls: Tensor,
    captions: Sequence[Sequence[str]],
    *,
    epochs: int,
    seed: int,
    advance: Callable[[int], object],
) -> None:
    """Train on CLS features (n, D), each with one of its captions, drawn anew every epoch."""
    tower.fit_features(cls)
    images = tower.image_features(cls)
    draw = random.Random(seed)
    steps = epochs * -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(tower.parameters(), RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=WARM_UP
    )
    tower.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH):
            texts = tower([draw.choice(captions[i]) for i in chosen])
            loss = contrastive_loss(images[chosen], texts, tower.scale.exp())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        advance(len(images))
    tower.eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console()
    try:
        found = _run(options, console)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    console.print(f"dev split: {json.dumps(found)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real.text_tower",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="a folder of JPEG or PNG files")
    add("--captions", type=Path, required=True, help="lines 'NAME#NUMBER<tab>caption'")
    add("--train", type=Path, required=True, help="names of photographs to train on, one a line")
    add("--dev", type=Path, required=True, help="names of photographs to evaluate on")
    add("--output", type=Path, required=True, metavar="X.safetensors", help="the trained tower")
    add("--features", type=Path, metavar="FOLDER", help="read and write CLS features here")
    add("--epochs", type=int, default=16, help="one caption an image each (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and order (default: %(default)s)")
    return parser


def _run(options: argparse.Namespace, console: Console) -> dict[str, float]:
    """Train and save the tower; return the mean of each measure on the dev split."""
    splits = {
        name: photograph_paths(options.folder, getattr(options, name)) for name in ("train", "dev")
    }
    captions = {name: read_captions(options.captions, paths) for name, paths in splits.items()}
    with Progress(console=console, disable=not console.is_terminal) as bar:
        advance = partial(bar.advance, bar.add_task("images", total=sum(map(len, splits.values()))))
        dense = dense_setting(MODELS["timm"]())
        cls = {
            name: cls_features(
                dense.model,
                dense,
                paths,
                stored_in(options.features, getattr(options, name)),
                advance,
            )
            for name, paths in splits.items()
        }
        torch.manual_seed(options.seed)
        texts = (text for each in captions["train"] for text in each)
        tokenizer = train_tokenizer(texts, VOCABULARY).backend_tokenizer
        tower = TextTower(tokenizer, cls["train"].shape[1])
        total = options.epochs * len(splits["train"])
        advance = partial(bar.advance, bar.add_task("training", total=total))
        training: dict[str, Any] = {"epochs": options.epochs, "seed": options.seed}
        train(tower, cls["train"], captions["train"], **training, advance=advance)
    tower.save(options.output)
    measured = retrieved(tower.image_features(cls["dev"]), encode_captions(tower, captions["dev"]))
    return {name: round(each.mean().item(), 4) for name, each in measured.items()}


if __name__ == "__main__":
    sys.exit(main())
