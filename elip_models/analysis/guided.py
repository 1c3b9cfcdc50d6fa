"""Any supported model with what its reduction needs: image tower, settings, text guidance.

A whole language-image model guides by its own text and needs its tokenizer; an image model alone
is reduced by the image.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from elip_models.data import SampleError, Source, load_tokenizer, open_source, tokenize
from elip_models.data.sample import decode_image
from elip_models.models.base import PretrainedModel
from elip_models.models.open_model import image_stats, open_model
from elip_models.models.registry import elip_settings
from elip_models.reduction.encode import encode_image
from elip_models.reduction.schedule import PRESETS, Schedule
from elip_models.reduction.strategies.elip import Elip
from elip_models.reduction.strategy import StageInfo
from elip_models.towers import ImageTextModel, Tower, as_image_text, as_tower
from elip_models.validation import ConfigError, blame

Guide = Callable[[Tensor, list[str]], Tensor]
"""Normalised images (B, 3, H, W) and a caption each -> text_cls (B, D)."""
Shown = list[tuple[Image.Image, str]]
"""Images with a caption each."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")


@dataclass
class Guided:
    """A model that reduces its images, in eval mode.

    name: for titles.
    image_model, tower: of the images.
    settings: of the reduction.
    guide: the model's own text guidance, or None: vision only.
    mean, std: (3, 1, 1), what the model's images are normalised by.
    """

    name: str
    image_model: nn.Module
    tower: Tower
    settings: Elip
    guide: Guide | None
    mean: Tensor
    std: Tensor

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images -> (B, 3, H, W) in [0, 1], the largest middle part in the tower's shape."""
        from torchvision.transforms.v2.functional import pil_to_tensor

        height, width = self.tower.image_size
        bicubic = Image.Resampling.BICUBIC
        fitted = (ImageOps.fit(image, (width, height), method=bicubic) for image in images)
        return torch.stack([pil_to_tensor(image) for image in fitted]).float() / 255

    def normalised(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> as the model takes them, on its device."""
        weight = next(self.image_model.parameters())
        return ((pixels - self.mean) / self.std).to(weight.device)

    @torch.no_grad()
    def stage_infos(self, images: Tensor, captions: Sequence[str]) -> list[StageInfo]:
        """Reduce normalised images (B, 3, H, W), each guided by its caption -> one info a stage."""
        text_cls = None if self.guide is None else self.guide(images, list(captions))
        _, infos = encode_image(
            self.image_model,
            images,
            text_cls,
            schedule=self.settings.schedule,
            scorer=self.settings.scorer,
            fusion=self.settings.fusion,
            guidance_norm=self.settings.guidance_norm,
            without_text="vision",
            merge=self.settings.merge,
            return_info=True,
        )
        return infos

    def __str__(self) -> str:
        s = self.settings
        how = "vision only" if self.guide is None else f"text-guided, fusion {s.fusion:g}"
        return f"{self.name}\n{s.schedule}, scorer {s.scorer}, {how}"


def open_guided(
    spec: str,
    *,
    pretrained: bool = True,
    schedule: str | None = None,
    scorer: str | int | None = None,
    fusion: float | None = None,
) -> Guided:
    """Open a model for reduction; what is None is as its own config says, or else the paper.

    Raises:
        ConfigError: naming the option, what was expected, what came.
        ImportError: a library is missing.
    """
    with blame("--model"):
        model = open_model(spec, pretrained=pretrained)
        image_text = None if isinstance(model, PretrainedModel) else as_image_text(model)
        image_model = model.visual if isinstance(model, PretrainedModel) else model
        image_model = image_model if image_text is None else image_text.image_model
        tower = as_tower(image_model)
        mean, std = (torch.tensor(values)[:, None, None] for values in image_stats(model))
    options = {"schedule": schedule, "scorer": scorer, "fusion": fusion}
    given = {name: value for name, value in options.items() if value is not None}
    settings = _settings(model, tower, given)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    guide = None
    if settings.fusion < 1.0 and isinstance(model, PretrainedModel):
        guide = _our_guide(model, spec)
    elif settings.fusion < 1.0 and image_text is not None:
        guide = _image_text_guide(image_text, spec)
    name = spec if pretrained else f"{spec} (random weights)"
    return Guided(name, image_model, tower, settings, guide, mean, std)


def _settings(model: nn.Module, tower: Tower, given: dict[str, Any]) -> Elip:
    """The model's own settings or the paper's, changed by what was given, checked."""
    settings = Elip(Schedule.parse(PRESETS["clip"]).scaled(tower.depth))
    if isinstance(model, PretrainedModel):
        settings = elip_settings(model)
    try:
        settings = replace(settings, **given)
        settings.schedule.check_depth(tower.depth)
        if not settings.schedule.stages(tower.num_patches):
            raise ValueError(
                f"schedule: expected a group that keeps less than 100%, got '{settings.schedule}'"
            )
    except (TypeError, ValueError) as error:  # it begins with the argument's name
        raise ConfigError(f"--{error}") from error
    return settings


def _our_guide(model: PretrainedModel, spec: str) -> Guide:
    with _tokenizer_of(spec, Path(spec), local=True):
        tokenizer = load_tokenizer(spec)

    def guide(images: Tensor, captions: list[str]) -> Tensor:
        text = tokenize(tokenizer, captions, model.config.context_length)
        text = {name: ids.to(images.device) for name, ids in text.items()}
        return model.text_cls(**text)

    return guide


def _image_text_guide(image_text: ImageTextModel, spec: str) -> Guide:
    """The guidance of another library's whole model, by the tokenizer of its name or folder."""
    library, _, name = spec.partition(":")
    if library == "open_clip":
        import open_clip

        with _tokenizer_of(spec):
            texts = open_clip.get_tokenizer(name.partition("/")[0])
        return lambda images, captions: image_text.text_cls(
            images, texts(captions).to(images.device)
        )
    from transformers import AutoTokenizer

    with _tokenizer_of(spec, Path(name), local=Path(name).is_dir()):
        tokenizer = AutoTokenizer.from_pretrained(name)
    longest = image_text.model.config.text_config.max_position_embeddings
    longest = min(longest, tokenizer.model_max_length)

    def guide(images: Tensor, captions: list[str]) -> Tensor:
        text = tokenizer(
            captions, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(images.device)
        return image_text.text_cls(
            text.input_ids, pixel_values=images, attention_mask=text.attention_mask
        )

    return guide


@contextmanager
def _tokenizer_of(spec: str, folder: Path = Path(), *, local: bool = False) -> Iterator[None]:
    """Around the loading of a tokenizer: where there is none, the remedy."""
    expected = f"--model: expected a tokenizer beside the model, got none with {spec!r}"
    if local and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(f"{expected}; --fusion 1 reduces without text")
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(f"{expected}; --fusion 1 reduces without text ({error})") from error


def read_pairs(images: Sequence[Path], captions: Sequence[str]) -> Shown:
    """Image files with a caption each; ConfigError where one cannot be read or has none."""
    if len(captions) != len(images):
        raise ConfigError(
            f"--caption: expected one for each --image, {len(images)}, got {len(captions)}"
        )
    try:
        files = [decode_image(path, str(path)) for path in images]
    except SampleError as error:
        raise ConfigError(f"--image: {error}") from error
    return list(zip(files, captions, strict=True))


def read_source(spec: str, count: int, tower: Tower) -> Shown:
    """The first `count` readable samples of `open_source`, with their first captions."""
    with blame("--data"):
        source = open_source(spec, image_size=max(tower.image_size))
        shown = list(islice(_readable(source), count))
    if not shown:
        raise ConfigError(f"--data: expected a readable sample, got none in {spec!r}")
    return shown


def _readable(source: Source) -> Iterator[tuple[Image.Image, str]]:
    for index in range(len(source)):
        try:
            sample = source[index]
        except SampleError:
            continue
        yield sample.image, sample.captions[0]
