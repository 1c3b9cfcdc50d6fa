"""The page of `elip demo`, built with Gradio: which tokens of an image a reduction merges.

demo = Demo(open_encoder("timm:vit_small_patch16_224"))
pixels = demo.read(Path("photo.jpg"))
demo.compare(pixels, demo.strategy("tome", keep=0.5), block=6).merged.save("merged.png")
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from elip_models.analysis.feature_measures import cosine
from elip_models.analysis.merging import merged_image, tokens_of_patches
from elip_models.analysis.visualize import grid_shape
from elip_models.calibration.candidates import STRATEGIES
from elip_models.embedding.encoder import DENSE, Encoder
from elip_models.engine.encode import encode_image
from elip_models.images import SampleError, decode_image
from elip_models.profiling.measure import milliseconds, no_gain, ratios_to, time_side_by_side
from elip_models.strategies import DEFAULT
from elip_models.strategies.flops import DEFAULT_KEEP, at_keep, inference_ratio, kept_share
from elip_models.strategies.spec import get_strategy
from elip_models.strategies.strategy import Strategy
from elip_models.towers import as_reducible, as_tower
from elip_models.user_warnings import SlowScorerWarning, UnguidedWarning, ignoring
from elip_models.validation import Bounds, as_config_error, check, require_extra

with require_extra("elip demo"):
    import gradio

DEFAULT_MODEL = "timm:vit_small_patch16_224"
"""A model for which the default reduction saves time on a CPU."""
SAVED = "as saved"
"""The choice of the strategy that a model was saved or trained with."""
DRAWN = [text.removesuffix(":without_text=vision") for text in STRATEGIES if text != "resize"]
"""Strategies whose tokens can be drawn: those of `calibrate` without `resize`."""
ROUNDS = 5  # of the timing
KEPT_SECONDS = 3600  # of uploaded and shown pictures
SHOWN, THUMBNAIL = 24, 300  # images that a search shows, and their pixels
INTRODUCTION = """# What does token reduction merge?
A vision transformer cuts an image into patches, one token each. Token reduction merges similar
tokens or drops unimportant ones, so that the model computes less. Choose an image and move the
sliders. Patches of one token have their mean colour and an outline; dropped patches are grey."""
EVENT = {"api_visibility": "private", "concurrency_id": "model", "concurrency_limit": 1}
"""The options of every event: one runs at a time over all browsers, which keeps times correct."""
CHOOSE = "Choose an image first."
CSS = "#figures :is(th, td) + * { white-space: nowrap }"
"""On a narrow screen, the first column of the figures wraps, and no number or word is cut."""
RANDOM = ", with **random weights**: pictures and cosine say nothing about a trained model"


class Comparison(NamedTuple):
    """An image as the model reads it, and as `elip visualize` draws its tokens after a block.

    `tokens` are the tokens of patches that are left after each block, and `cosine` is that of the
    reduced and the dense feature.
    """

    image: Image.Image
    merged: Image.Image
    tokens: list[int]
    cosine: float


class Demo:
    """A dense model, which is compared to reduced copies with the same weights."""

    def __init__(self, encoder: Encoder) -> None:
        self.dense, self.saved = encoder.reduced(DENSE), encoder.strategy
        with as_config_error("MODEL"):
            self.image_model = as_reducible(self.dense.model).image_model
            self.tower = as_tower(self.image_model)
            pixels = self._pixels(Image.new("RGB", (64, 64)))
            with torch.no_grad():
                patches = self.tower.embed(pixels).shape[1] - self.tower.num_prefix_tokens
        self.size = self.tower.size._replace(image=tuple(pixels.shape[2:]), num_patches=patches)

    @property
    def choices(self) -> list[str]:
        """The strategies to choose from; the model's own is the first, if it has one."""
        return [*([] if self.saved is None else [SAVED]), *DRAWN]

    def strategy(self, choice: str, keep: float) -> Strategy:
        """Return one of `choices` at a mean share of tokens over the blocks, without a text."""
        is_own = choice == SAVED and self.saved is not None
        strategy = (self.saved if is_own else get_strategy(choice)).fitted(self.tower)
        if strategy.is_guided:
            strategy = replace(strategy, without_text="vision").fitted(self.tower)
        return at_keep(strategy, self.size, keep)

    def _pixels(self, image: Image.Image) -> Tensor:
        pixels = self.dense.preprocessing.transform(image)[None]
        parameter = next(self.dense.model.parameters())
        return pixels.to(parameter.device, parameter.dtype)

    def read(self, path: Path) -> Tensor:
        """Return an image file as the model reads it, (1, 3, H, W)."""
        return self._pixels(decode_image(path, path.name))

    def compare(self, pixels: Tensor, strategy: Strategy, block: int) -> Comparison:
        """Compare an image (1, 3, H, W) with and without reduction; blocks count from 1."""
        check("block", block, Annotated[int, Bounds(1, self.tower.depth)])
        with ignoring(UnguidedWarning), ignoring(SlowScorerWarning):
            dense, reduced = self.dense(pixels), self.dense.reduced(strategy)(pixels)
            _, infos = encode_image(self.image_model, pixels, strategy=strategy, return_info=True)
        size = strategy.resized(self.size)
        rows, columns = grid_shape(size.num_patches, size.image)
        after = tokens_of_patches(infos, rows * columns)
        steps = {info.stage.first: step[0].cpu() for info, step in zip(infos, after, strict=True)}
        tokens: list[Tensor | None] = [None]  # of each patch after each block; None: its own
        for i in range(self.tower.depth):
            tokens.append(steps.get(i, tokens[-1]))
        mean, std = self._statistics()
        image = (pixels[0].float().cpu() * std + mean).clamp(0, 1)
        drawn = tokens[block]
        merged = image if drawn is None else merged_image(image, drawn.view(rows, columns))
        return Comparison(
            _as_picture(image).resize(tuple(merged.shape[:0:-1]), Image.Resampling.NEAREST),
            _as_picture(merged),
            [rows * columns if t is None else int((t.unique() >= 0).sum()) for t in tokens[1:]],
            cosine(dense, reduced).item(),
        )

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, (3, 1, 1), that images are normalised by."""
        settings = self.dense.preprocessing.described
        if settings.get("do_normalize") is False:  # of transformers
            return torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
        prefix = "image_" if settings["kind"] == "transformers" else ""
        mean, std = (torch.tensor(settings[f"{prefix}{name}"]) for name in ("mean", "std"))
        return mean[:, None, None], std[:, None, None]

    def time(self, pixels: Tensor, strategy: Strategy, batch_size: int) -> tuple[float, float]:
        """Return milliseconds of a batch of copies of an image, dense, and the reduced share."""
        batch = pixels.expand(batch_size, -1, -1, -1).contiguous()
        encoders = {"dense": self.dense, "reduced": self.dense.reduced(strategy)}
        steps = {name: partial(encoder, batch) for name, encoder in encoders.items()}
        with ignoring(UnguidedWarning), ignoring(SlowScorerWarning):
            times = time_side_by_side(steps, device=batch.device, rounds=ROUNDS)
        return milliseconds(times)["dense"], ratios_to("dense", times)["reduced"]


def _as_picture(pixels: Tensor) -> Image.Image:
    """Return pixels (3, H, W) in [0, 1] as a picture."""
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def example_image(side: int = 448) -> Image.Image:
    """Return the picture with which the page opens: the sun, hills and a house."""
    image = Image.new("RGB", (side, side), "#9cc9f0")
    draw, unit = ImageDraw.Draw(image), side / 8
    for shape, colour, *box in (
        (draw.ellipse, "#ffd94a", 5.6, 0.6, 7.2, 2.2),
        (draw.ellipse, "#5c9b4e", -3, 5, 6, 12),
        (draw.ellipse, "#74b35f", 2, 5.4, 12, 12),
        (draw.rectangle, "#d9bd94", 1.2, 3.8, 3.6, 6.2),
        (draw.polygon, "#a8493a", 0.9, 3.8, 2.4, 2.4, 3.9, 3.8),
        (draw.rectangle, "#6b4a35", 2.1, 4.9, 2.7, 6.2),
    ):
        shape([unit * value for value in box], fill=colour)
    return image


def build_page(
    demo: Demo,
    *,
    batch_size: int = 4,
    random_weights: bool = False,
    embeddings: tuple[Path, Encoder] | None = None,
) -> gradio.Blocks:
    """Return the page for one model, whose times are measured on batches of `batch_size` images.

    If `random_weights` is set, the page states that the model has no trained weights.
    `embeddings` are a folder of `embed` to search in, and the encoder of its model.
    """
    depth, name = demo.tower.depth, demo.dense.name
    keep = DEFAULT_KEEP if demo.saved is None else round(kept_share(demo.saved, demo.size), 2)
    picture = {"format": "png", "interactive": False, "buttons": [], "height": 340}
    with gradio.Blocks(
        title=f"elip demo: {name}",
        analytics_enabled=False,
        delete_cache=(KEPT_SECONDS, KEPT_SECONDS),
    ) as page:
        gradio.Markdown(f"{INTRODUCTION}\n\nModel: `{name}`{RANDOM if random_weights else ''}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=260):
                options = {"type": "filepath", "image_mode": None, "sources": ["upload"]}
                upload = gradio.Image(
                    example_image(), label="Image", height=200, elem_id="image", **options
                )
                strategy = DEFAULT.name if demo.saved is None else SAVED
                inputs = [
                    upload,
                    gradio.Dropdown(demo.choices, value=strategy, label="Strategy"),
                    gradio.Slider(
                        0.2, 1.0, keep, step=0.01, label="Keep: mean share of the tokens"
                    ),
                    gradio.Slider(
                        1, depth, (depth + 1) // 2, step=1, label="Draw the tokens after block"
                    ),
                ]
            with gradio.Column(scale=3):
                with gradio.Row():
                    outputs = [
                        gradio.Image(label="Input of the model", **picture),
                        gradio.Image(label="Merged tokens", elem_id="merged", **picture),
                    ]
                outputs.append(gradio.Markdown(elem_id="figures"))
        gradio.on(
            [page.load, *(component.change for component in inputs)],
            partial(_show, demo, batch_size),
            inputs,
            outputs,
            trigger_mode="always_last",
            show_progress="minimal",
            **EVENT,
        )
        if embeddings is not None:
            _add_search(upload, *embeddings)
    return page


def _show(
    demo: Demo, batch_size: int, path: str | None, choice: str, keep: float, block: int
) -> Iterator[tuple[Image.Image | None, Image.Image | None, str]]:
    """Yield the values of the outputs: without the times, which take longer, then with them."""
    if path is None:
        yield None, None, CHOOSE
        return
    with _shown_errors():
        strategy, pixels = demo.strategy(choice, keep), demo.read(Path(path))
        comparison = demo.compare(pixels, strategy, block)
        patches, left = demo.size.num_patches, comparison.tokens[block - 1]
        figures = (
            "| | dense | reduced |\n|:--|--:|--:|\n"
            f"| tokens after block {block} | {patches} | {left} |\n"
            "| cosine with the dense feature (1: no change, 0: unrelated) "
            f"| 1.000 | {comparison.cosine:.3f} |\n"
            f"| FLOPs | 1 | {inference_ratio(strategy, demo.size):.2f} |\n"
            f"| time of a batch of {batch_size} | "
        )
        note = (
            f"\n\nTokens after each block: {', '.join(map(str, comparison.tokens))}. `{strategy}`"
        )
        yield comparison.image, comparison.merged, f"{figures}.. | measuring |{note}"
        dense, share = demo.time(pixels, strategy, batch_size)
    gain = "no gain" if no_gain(share) else f"{share:.2f} of dense"
    yield comparison.image, comparison.merged, f"{figures}{dense:.1f} ms | {gain} |{note}"


@contextmanager
def _shown_errors() -> Iterator[None]:
    """Show an error of a person's choice on the page, and none in the terminal."""
    try:
        yield
    except (SampleError, TypeError, ValueError) as error:
        raise gradio.Error(str(error), print_exception=False) from error


def _add_search(upload: gradio.Image, folder: Path, encoder: Encoder) -> None:
    """Add a search in a folder of embeddings, by a text or by the image of the comparison."""
    from elip_models.embedding.collection import open_collection
    from elip_models.embedding.search import find, image_features, text_features

    gradio.Markdown(f"## Search in `{folder}`")
    with gradio.Row():
        with gradio.Column(scale=1, min_width=260):
            text = gradio.Textbox(
                label="Text", max_length=1000, visible=encoder.has_text, elem_id="text"
            )
            button = gradio.Button("Find similar images", elem_id="similar")
        with gradio.Column(scale=3):
            gallery = gradio.Gallery(label="Most similar images", columns=3, elem_id="results")

    def images_like(features: Tensor) -> list[tuple[Image.Image, str]]:
        hits = find(open_collection(folder), features, "", top=SHOWN).hits
        return [(_thumbnail(hit.path), f"{hit.similarity:.3f} {hit.key}") for hit in hits]

    def search_text(query: str | None) -> list[tuple[Image.Image, str]]:
        with _shown_errors():
            return images_like(text_features(encoder, query or ""))

    def search_image(path: str | None) -> list[tuple[Image.Image, str]]:
        with _shown_errors():
            if path is None:
                raise ValueError(CHOOSE)
            return images_like(image_features(encoder, Path(path)))

    text.submit(search_text, text, gallery, **EVENT)
    button.click(search_image, upload, gallery, **EVENT)


def _thumbnail(path: str | None) -> Image.Image:
    """Return a small copy of an image, grey if it is not a readable file of this machine."""
    image = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "#808080")
    if path is not None:
        with suppress(SampleError):
            image = decode_image(Path(path), path)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image
