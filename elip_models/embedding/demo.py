"""What the page of `elip demo` shows of an image: its merged tokens, and dense and reduced figures.

    demo = DemoModel(open_encoder("timm:vit_small_patch16_224"))
    pixels = demo.read("photo.jpg")
    comparison = demo.compare(pixels, demo.strategy("tome", keep=0.5), block=6)
    comparison.merged.save("merged.png")

A caption never guides the reduction of an image here: its own text would decide what the image
shows, and the ranking of captions would be circular.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from elip_models.analysis.calibrate import STRATEGIES
from elip_models.analysis.feature_measures import cosine
from elip_models.analysis.merging import merged_image, tokens_of_patches
from elip_models.analysis.visualize import grid_shape
from elip_models.embedding.encoder import Encoder, dense_of
from elip_models.images import decode_image
from elip_models.profiling.measure import milliseconds, ratios_to, time_side_by_side
from elip_models.reduction.encode import encode_image
from elip_models.reduction.flops import DEFAULT_KEEP, at_keep, kept_share
from elip_models.reduction.strategies import DEFAULT
from elip_models.reduction.strategy import StageInfo, Strategy
from elip_models.reduction.strategy_spec import get_strategy
from elip_models.reduction.user_warnings import UnguidedWarning, ignore_slow_scorers
from elip_models.towers import as_reducible, as_tower
from elip_models.validation import as_config_error, check_text

SAVED = "as saved"
"""The choice of the strategy that a model was saved or trained with."""
MERGING = tuple(
    text.removesuffix(":without_text=vision") for text in STRATEGIES if text != "resize"
)
"""Strategies whose tokens can be drawn: those of `calibrate` without `resize`."""
DEFAULT_STRATEGY = DEFAULT.name
MAX_CAPTIONS = 100
ROUNDS = 3  # of the timing


@dataclass(frozen=True)
class Comparison:
    """An image with and without reduction.

    Attributes:
        strategy: the strategy with its settings.
        image: the image as the model reads it, cropped and resized.
        merged: the same with the patches of each token after a block in one colour, as `elip
            visualize` draws it.
        tokens: after each block, how many tokens of patches are left.
        patches: how many patches the image has.
        cosine: of the reduced and the dense feature.
        ranking: each caption with the cosines of its feature and the dense and the reduced feature
            of the image, the most similar to the dense one first.
    """

    strategy: Strategy
    image: Image.Image
    merged: Image.Image
    tokens: list[int]
    patches: int
    cosine: float
    ranking: list[tuple[str, float, float]]


class Times(NamedTuple):
    """The measured time of a dense batch in milliseconds, and the reduced one relative to it.

    The ratio is the median over rounds, in which both are measured one behind the other.
    """

    dense: float
    ratio: float
    batch_size: int


class DemoModel:
    """An encoder without reduction, which is compared to reduced copies with the same weights.

    Raises:
        ConfigError: the model cannot be reduced, or its images are not of its tower's size.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.dense = dense_of(encoder)
        with as_config_error("MODEL"):
            self.image_model = as_reducible(self.dense.model).image_model
            self.tower = as_tower(self.image_model)
            pixels = self._normalised(Image.new("RGB", (64, 64)))
        with torch.no_grad():
            patches = self.tower.embed(pixels).shape[1] - self.tower.num_prefix_tokens
        self.size = self.tower.size._replace(image=tuple(pixels.shape[2:]), num_patches=patches)
        self.saved = encoder.strategy
        self.mean, self.std = _statistics(self.dense)

    @property
    def choices(self) -> list[str]:
        """The strategies to choose from; the model's own is the first, if it has one."""
        return [*([] if self.saved is None else [SAVED]), *MERGING]

    @property
    def default_choice(self) -> str:
        """The strategy that the page begins with."""
        return DEFAULT_STRATEGY if self.saved is None else SAVED

    @property
    def default_keep(self) -> float:
        """The mean share of tokens that the model's own strategy keeps, or the default one."""
        if self.saved is None:
            return DEFAULT_KEEP
        return round(kept_share(self.saved, self.size), 2)

    def strategy(self, choice: str, keep: float) -> Strategy:
        """Return one of `choices` at a mean share of tokens over the blocks.

        Raises:
            TypeError, ValueError: it cannot reduce the model, or keep so few tokens.
        """
        own = choice == SAVED and self.saved is not None
        chosen = (self.saved if own else get_strategy(choice)).fitted(self.tower)
        if chosen.is_guided:
            chosen = replace(chosen, without_text="vision").fitted(self.tower)
        return at_keep(chosen, self.size, keep)

    def read(self, path: Path) -> Tensor:
        """Read an image file as the model expects it, (1, 3, H, W).

        Raises:
            SampleError: it is no raster image, damaged, or larger than the limits of `data.sample`.
            ValueError: the model's preprocessing gives it another size than a square image.
        """
        pixels = self._normalised(decode_image(path, path.name))
        if tuple(pixels.shape[2:]) != self.size.image:
            raise ValueError(
                f"image: expected {self.size.image} pixels after the model's preprocessing, got "
                f"{tuple(pixels.shape[2:])}; crop the image to a square"
            )
        return pixels

    def _normalised(self, image: Image.Image) -> Tensor:
        pixels = self.dense.preprocessing.transform(image)[None]
        fits = tuple(pixels.shape[2:]) == self.tower.image_size
        if not (fits or self.tower.has_dynamic_size):
            raise ValueError(
                "expected a model whose images have its tower's size, "
                f"{self.tower.image_size}, got {tuple(pixels.shape[2:])} from its preprocessing"
            )
        weight = next(self.image_model.parameters())
        return pixels.to(weight.device, weight.dtype)

    @torch.no_grad()
    def compare(
        self, pixels: Tensor, strategy: Strategy, block: int, captions: Sequence[str] = ()
    ) -> Comparison:
        """Compare the features of one image, (1, 3, H, W), and rank captions by them.

        Args:
            pixels: the image, as `read` returns it.
            strategy: as `strategy` returns it.
            block: draw the tokens after this block, counted from 1.
            captions: texts to rank, for an image-text model.

        Raises:
            TypeError, ValueError: a strategy or captions that the model cannot read.
        """
        with warnings.catch_warnings(), ignore_slow_scorers():
            warnings.simplefilter("ignore", UnguidedWarning)
            dense, reduced = self.dense(pixels), self.dense.reduced(strategy)(pixels)
            _, infos = encode_image(self.image_model, pixels, strategy=strategy, return_info=True)
        image = (pixels[0].float().cpu() * self.std + self.mean).clamp(0, 1)
        rows, columns = grid_shape(self.size.num_patches, self.size.image)
        found = self._tokens_by_block(infos, rows * columns)
        shown = found[block - 1]
        merged = image if shown is None else merged_image(image, shown.view(rows, columns))
        return Comparison(
            strategy,
            _as_picture(image).resize(tuple(merged.shape[:0:-1]), Image.Resampling.NEAREST),
            _as_picture(merged),
            [rows * columns if each is None else _count(each) for each in found],
            rows * columns,
            cosine(dense, reduced).item(),
            self._rank(captions, dense, reduced),
        )

    def _tokens_by_block(self, infos: Sequence[StageInfo], num_patches: int) -> list[Tensor | None]:
        """Return the token of each patch (P,) after each block, None before the first step."""
        after = tokens_of_patches(infos, num_patches)
        steps = {info.stage.first: each[0].cpu() for info, each in zip(infos, after, strict=True)}
        found: list[Tensor | None] = []
        for i in range(self.tower.depth):
            found.append(steps.get(i, found[-1] if found else None))
        return found

    def _rank(
        self, captions: Sequence[str], dense: Tensor, reduced: Tensor
    ) -> list[tuple[str, float, float]]:
        """Return captions with the cosines to both features (1, D) of an image."""
        if not captions:
            return []
        if len(captions) > MAX_CAPTIONS:
            raise ValueError(f"captions: expected at most {MAX_CAPTIONS}, got {len(captions)}")
        check_text("captions", *captions)
        texts = F.normalize(self.dense.encode_texts(captions), dim=-1)
        both = [(F.normalize(each, dim=-1) @ texts.T)[0].tolist() for each in (dense, reduced)]
        return sorted(zip(captions, *both, strict=True), key=lambda each: -each[1])

    def time(self, pixels: Tensor, strategy: Strategy, batch_size: int) -> Times:
        """Measure a batch of copies of one image, (1, 3, H, W), dense and reduced side by side."""
        batch = pixels.expand(batch_size, -1, -1, -1).contiguous()
        encoders = {"dense": self.dense, "reduced": self.dense.reduced(strategy)}
        steps = {name: partial(encoder, batch) for name, encoder in encoders.items()}
        with warnings.catch_warnings(), ignore_slow_scorers():
            warnings.simplefilter("ignore", UnguidedWarning)
            times = time_side_by_side(steps, device=batch.device, rounds=ROUNDS)
        ratio = ratios_to("dense", times)["reduced"]
        return Times(milliseconds(times)["dense"], ratio, batch_size)


def _statistics(encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, (3, 1, 1), that images are normalised by."""
    settings = encoder.preprocessing.described
    if settings.get("do_normalize") is False:  # of transformers
        return torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    prefix = "image_" if settings["kind"] == "transformers" else ""
    mean, std = (torch.tensor(settings[f"{prefix}{name}"]) for name in ("mean", "std"))
    return mean[:, None, None], std[:, None, None]


def _as_picture(pixels: Tensor) -> Image.Image:
    """Return pixels (3, H, W) in [0, 1] as a picture."""
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def _count(tokens: Tensor) -> int:
    """Return how many tokens the patches have, from the token of each patch; -1 is none."""
    return int((tokens.unique() >= 0).sum())
