"""Pictures of the image tokens that a multimodal language model reads to answer a question.

The image tokens of a prompt are in the order of the places on the image that they come from: row by
row, and tile by tile if the processor cuts the image. Models whose tokens have no such order are
refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from elip_models.analysis.visualize import Panel, dimmed, draw_panels
from elip_models.analysis.visualize_inputs import reduction_option_errors
from elip_models.api import record_stages, reduce_, reduction_summary
from elip_models.saving.dense_models import load_transformers
from elip_models.saving.meta_build import library_errors
from elip_models.saving.open_model import missing_files_as_value_error
from elip_models.validation import ConfigError, as_config_error, did_you_mean, shortened
from elip_models.vlm.call import PromptInfo
from elip_models.vlm.families import LANGUAGE_MODEL
from elip_models.vlm.strategies import LANGUAGE_STRATEGIES

TILED = "its processor removes tokens at the borders of tiles and adds some at line ends"
WITHOUT_GRID = {
    "idefics2": "each of its tokens is a mean over the whole image",
    "llava_next": TILED,
    "llava_next_video": TILED,
    "llava_onevision": TILED,
}
"""Why a model's tokens have no place on the image, by `config.model_type`."""
GAP = 4  # pixels between tiles
NOTE = (
    "Grey: the language model does not read the token of this place. Strategies that average "
    "tokens keep the mean at one of their places."
)


@dataclass(frozen=True)
class VisualizedLanguageModel:
    """A reduced multimodal language model, its processor, and its name for titles."""

    name: str
    model: nn.Module
    processor: Any

    def inputs(self, image: Image.Image, question: str) -> dict[str, Tensor]:
        """Return the arguments of the model for one image and a question."""
        token = getattr(self.processor, "image_token", "<image>")
        text = f"{token}\n{question}"
        if self.processor.chat_template is not None:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        inputs = self.processor(text=[text], images=[image], return_tensors="pt")
        weight = next(self.model.parameters())
        return dict(inputs.to(weight.device, weight.dtype))

    @torch.no_grad()
    def kept(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Return (n,) bool, which image tokens are read, first by the first layer.

        A further tensor follows for each drop inside the language model.
        """
        with record_stages(self.model) as infos:
            self.model(**inputs, use_cache=False)
        info: PromptInfo = infos[0]
        return [kept[info.images] for kept in (info.kept, *info.kept_behind)]

    def __str__(self) -> str:
        summary = reduction_summary(self.model)
        return ", then ".join(map(str, filter(None, (summary.strategy, summary.inside))))


class TokenGrid(NamedTuple):
    """The places of an image's tokens.

    tiles: (T, 3, H, W) in [0, 1], the parts of the image that the model reads, in the order of
        their tokens.
    rows, columns: of the tokens of each part.
    """

    tiles: Tensor
    rows: int
    columns: int


def open_language_model(
    spec: str, strategy: str | None = None, keep: float | None = None
) -> VisualizedLanguageModel:
    """Open a multimodal language model of transformers with its processor, and reduce it.

    Without `strategy` and `keep`, the strategy is that of its config, or the default of `reduce_`.
    An invalid option raises ConfigError.

    Args:
        spec: a folder, or 'hf:' and a folder or a name of the hub.
        strategy: a strategy of a language model, such as 'diverse:relevance=true'.
        keep: the share of an image's tokens that stay, or their number.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    name = spec.removeprefix("hf:")
    with as_config_error("--model", inner="spec"), missing_files_as_value_error("spec", spec):
        with library_errors(name, "a folder or a name of a model of transformers, for --question"):
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        _check_family(config.model_type)
        with library_errors(name, "a folder or a name with a processor of transformers"):
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        model = load_transformers(name, AutoModelForImageTextToText, config)
    name = (strategy or next(iter(LANGUAGE_STRATEGIES))).partition(":")[0].strip()
    if name not in LANGUAGE_STRATEGIES:
        raise ConfigError(
            f"--strategy: expected one of a language model, {', '.join(LANGUAGE_STRATEGIES)}, with "
            f"--question, got {shortened(strategy)}{did_you_mean(name, LANGUAGE_STRATEGIES)}"
        )
    with reduction_option_errors():
        reduce_(model, strategy, keep=keep)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    visualized = VisualizedLanguageModel(spec, model, processor)
    if not str(visualized):
        raise ConfigError(
            "--strategy: expected one of a language model, since the config of the model has that "
            "of its image tower alone, got none"
        )
    return visualized


def _check_family(model_type: str) -> None:
    """Raise TypeError if the model is not supported, or its tokens have no place on the image."""
    if model_type not in LANGUAGE_MODEL:
        raise TypeError(
            f"expected a multimodal language model, one of {', '.join(LANGUAGE_MODEL)}, got "
            f"{model_type}; leave out --question for others"
        )
    if model_type in WITHOUT_GRID:
        raise TypeError(
            f"expected a model whose image tokens have a place on the image, got {model_type}: "
            f"{WITHOUT_GRID[model_type]}"
        )


def token_grid(
    model: VisualizedLanguageModel, image: Image.Image, inputs: dict[str, Tensor], count: int
) -> TokenGrid:
    """Return the places of the `count` image tokens of a prompt.

    Raises:
        ValueError: they are no grid of square cells.
    """
    from torchvision.transforms.v2.functional import pil_to_tensor

    if "image_grid_thw" in inputs:  # Qwen-VL, which resizes the whole image
        _, height, width = inputs["image_grid_thw"][0].tolist()
        merged = model.model.config.vision_config.spatial_merge_size
        pixels = pil_to_tensor(image).float() / 255
        return TokenGrid(pixels[None], height // merged, width // merged)
    pixels = inputs["pixel_values"].cpu().float().flatten(0, -4)
    if "image_sizes" in inputs:  # Pixtral, which pads
        height, width = inputs["image_sizes"][0].tolist()
        pixels = pixels[..., :height, :width]
    height, width = pixels.shape[-2:]
    tile_tokens = count // len(pixels)
    rows = isqrt(tile_tokens * height // width)
    columns = tile_tokens // max(rows, 1)
    if rows * columns * len(pixels) != count or rows * width != columns * height:
        raise ValueError(
            f"expected image tokens on a grid of square cells, got {count} for {len(pixels)} "
            f"pictures of {width}x{height} pixels"
        )
    return TokenGrid(_denormalised(pixels, model.processor.image_processor), rows, columns)


def _denormalised(pixels: Tensor, image_processor: Any) -> Tensor:
    """Return the pixels (T, 3, H, W) of a model's input in [0, 1]."""
    if not image_processor.do_normalize:
        return pixels.clamp(0, 1)
    stats = (image_processor.image_mean, image_processor.image_std)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in stats)
    return (pixels * std + mean).clamp(0, 1)


def draw_kept_tokens(
    model: VisualizedLanguageModel, images: Sequence[Image.Image], question: str, path: Path
) -> list[Path]:
    """Write a PNG for each image, which dims the places whose tokens are not read.

    Several images have the names NAME_1.png, NAME_2.png and so on. A strategy that keeps every
    token raises ConfigError.
    """
    paths = []
    for i, image in enumerate(images, 1):
        inputs = model.inputs(image, question)
        kept = model.kept(inputs)
        if all(tokens.all() for tokens in kept):
            raise ConfigError(
                f"--strategy: expected one that removes tokens of images, got {model}, which keeps "
                f"all {len(kept[0])}"
            )
        with as_config_error("--model", inner="spec"):
            grid = token_grid(model, image, inputs, len(kept[0]))
        name = path if len(images) == 1 else path.with_stem(f"{path.stem}_{i}")
        paths.append(draw_image(grid, kept, name, title=f"{model.name}\n{model}", caption=question))
    return paths


def draw_image(
    grid: TokenGrid, kept: Sequence[Tensor], path: Path, *, title: str, caption: str
) -> Path:
    """Write a PNG: the image, and for each of `kept` (n,) bool the places of its tokens."""
    panels = [Panel(mosaic([tile.permute(1, 2, 0) for tile in grid.tiles]))]
    for tokens in kept:
        alive = tokens.cpu().view(len(grid.tiles), grid.rows, grid.columns)
        pictures = map(dimmed, grid.tiles, alive)
        panels.append(Panel(mosaic([torch.from_numpy(picture) for picture in pictures])))
    counts = [str(int(tokens.sum())) for tokens in kept]
    titles = ["image", *(f"{count} of {len(kept[0])} tokens" for count in counts)]
    title = f"{title}: {', then '.join(counts)} of {len(kept[0])} image tokens"
    return draw_panels([panels], [caption], path, titles=titles, title=title, note=NOTE)


def mosaic(tiles: Sequence[Tensor]) -> Tensor:
    """Return one picture of tiles (H, W, 3), row by row with white gaps."""
    height, width, _ = tiles[0].shape
    columns = ceil(len(tiles) ** 0.5)
    rows = ceil(len(tiles) / columns)
    canvas = torch.ones(rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3)
    for i, tile in enumerate(tiles):
        y, x = (i // columns) * (height + GAP), (i % columns) * (width + GAP)
        canvas[y : y + height, x : x + width] = tile
    return canvas
