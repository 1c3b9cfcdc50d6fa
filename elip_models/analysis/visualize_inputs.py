"""Inputs of `elip visualize`: a supported model, its strategy and guidance, images and captions.

A whole language-image model is guided by its own text tower and needs its tokenizer. An image model
is reduced by the image alone.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from elip_models.engine.encode import encode_image
from elip_models.engine.install import strategy_by_default
from elip_models.images import SampleError, decode_clip, decode_image, pixels_of
from elip_models.saving.open_model import open_model, size_options, split_spec
from elip_models.strategies.elip import ELIP
from elip_models.strategies.spec import resolve_strategy
from elip_models.strategies.strategy import StageInfo, Strategy
from elip_models.towers import (
    ReducibleModel,
    SelfReducingModel,
    Tower,
    as_image_text,
    as_reducible,
    as_tower,
)
from elip_models.validation import ConfigError, as_config_error, shortened

CaptionEncoder = Callable[[Sequence[str]], Tensor]
"""Function of B captions, one for each image, that returns text_cls (B, D)."""
Shown = Image.Image | list[Image.Image]
"""An image, or the frames of a clip."""
CaptionedImages = list[tuple[Shown, str]]
"""Images or clips with a caption each."""


@dataclass
class VisualizedModel:
    """A model in eval mode with a reduction."""

    name: str  # for titles
    image_model: nn.Module
    tower: Tower
    strategy: Strategy
    guide: CaptionEncoder | None  # None: vision only
    mean: Tensor  # (3, 1, 1)
    std: Tensor  # (3, 1, 1)

    def pixels(self, images: Sequence[Shown]) -> Tensor:
        """Crop RGB images at the centre to the tower's shape, resized: (B, 3, H, W) in [0, 1].

        Clips give (B, T, 3, H, W).
        """
        return torch.stack(
            [
                self.pixels(image)
                if isinstance(image, list)
                else pixels_of(image, self.tower.image_size)
                for image in images
            ]
        )

    def normalised(self, pixels: Tensor) -> Tensor:
        """Normalise pixels (.., 3, H, W) in [0, 1] for the model, on its device."""
        weight = next(self.image_model.parameters())
        return ((pixels - self.mean) / self.std).to(weight.device)

    @torch.no_grad()
    def stage_infos(self, images: Tensor, captions: Sequence[str]) -> list[StageInfo]:
        """Reduce normalised images or clips, guided by captions; return one info a stage."""
        text_cls, strategy = None, self.strategy
        if self.guide is not None:
            text_cls = self.guide(captions)
        elif self.tower.has_cls and strategy.is_guided:
            strategy = replace(strategy, without_text="vision")
        _, infos = encode_image(
            self.image_model, images, text_cls, strategy=strategy, return_info=True
        )
        return infos

    def __str__(self) -> str:
        s = self.strategy
        if not isinstance(s, ELIP):
            return f"{self.name}\n{s}"
        how = "vision only" if self.guide is None else f"text-guided, fusion {s.fusion:g}"
        return f"{self.name}\n{s.schedule}, scorer {s.scorer}, {how}"


def open_visualized_model(
    spec: str,
    *,
    pretrained: bool = True,
    strategy: str | None = None,
    keep: float | None = None,
    schedule: str | None = None,
    image_size: int | None = None,
) -> VisualizedModel:
    """Open a model, as `open_model` does, with a reduction, by the arguments of `reduce_`.

    A `strategy` of None is the model's own, if it has one, or the default of `reduce_`. An
    `image_size` of None, in pixels, is the model's own. An invalid option raises ConfigError.
    """
    with as_config_error("--model", inner="spec"):
        model = open_model(spec, pretrained=pretrained, **size_options(spec, image_size))
        reducible = as_reducible(model)
        tower = as_tower(reducible.image_model)
        mean, std = (torch.tensor(stat)[:, None, None] for stat in reducible.image_stats())
    with reduction_option_errors():
        if isinstance(reducible, SelfReducingModel):
            default = (lambda: model.reduction) if model.is_reduced else model.elip_strategy
            if strategy is None and schedule is not None:
                strategy, schedule = replace(model.elip_strategy(), schedule=schedule), None
        else:
            default = partial(
                strategy_by_default,
                tower,
                as_image_text(model),
                has_text=reducible.has_text,
                use_config=keep is None,
            )
        options = {"schedule": schedule}
        chosen = resolve_strategy(tower, strategy, options, keep=keep, default=default)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    guide = _guide_of(reducible, spec) if reducible.has_text and chosen.is_guided else None
    name = spec if pretrained else f"{spec} (random weights)"
    return VisualizedModel(name, reducible.image_model, tower, chosen, guide, mean, std)


@contextmanager
def reduction_option_errors() -> Iterator[None]:
    """Turn an error of an argument of `reduce_` into a ConfigError of its option."""
    try:
        yield
    except (TypeError, ValueError) as error:  # the message begins with the argument's name
        is_option = str(error).partition(":")[0] in ("strategy", "keep", "schedule")
        raise ConfigError(f"--{error}" if is_option else f"--strategy: {error}") from error


def _guide_of(model: ReducibleModel, spec: str) -> CaptionEncoder:
    _, name = split_spec(spec)
    try:
        tokenizer = model.load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model: expected a tokenizer beside the model, got none with {spec!r}; "
            f"--strategy elip:fusion=1 reduces without text ({error})"
        ) from error
    return partial(model.encode_captions, tokenizer)


def check_pairs(images: Sequence[Path], captions: Sequence[str]) -> Sequence[str]:
    """Return a caption for each image, "" for all without any; ConfigError if one is missing."""
    captions = captions or [""] * len(images)
    if len(captions) != len(images):
        raise ConfigError(
            f"--caption: expected one for each --image, {len(images)}, got {len(captions)}"
        )
    for caption in captions:
        if not caption.isascii() and caption != caption.encode(errors="ignore").decode():
            raise ConfigError(f"--caption: expected valid text, got {shortened(caption)}")
    for path in images:
        if not os.path.exists(path):  # also false if the path is too long or has a null character
            raise ConfigError(f"--image: {SampleError(str(path), 'no such file')}")
    return captions


def read_pairs(
    images: Sequence[Path], captions: Sequence[str], num_frames: int = 1
) -> CaptionedImages:
    """Read image files, each with a caption or none; ConfigError if one cannot be read.

    With several frames, a file is a clip: a folder of images, or a GIF.
    """
    captions = check_pairs(images, captions)
    try:
        if num_frames == 1:
            files = [decode_image(path, str(path)) for path in images]
        else:
            files = [decode_clip(path, num_frames) for path in images]
    except SampleError as error:
        if num_frames == 1:
            raise ConfigError(f"--image: {error}") from error
        raise ConfigError(
            f"--image: expected a folder of {num_frames} frames or more, or a GIF of as many, got "
            f"{error}; ffmpeg -i clip.mp4 frames/%05d.png writes the frames of a video"
        ) from error
    return list(zip(files, captions, strict=True))
