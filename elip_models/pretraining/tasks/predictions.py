"""A page of predictions: examples, right answers, and the patches kept of each image."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elip_models.analysis.chart_style import write_figure
from elip_models.analysis.visualize import dimmed, new_figure, patch_grid, surviving_patches
from elip_models.engine.encode import run_tower
from elip_models.pretraining.data import Example, ExampleSource, Source
from elip_models.pretraining.data.read_errors import readable_samples
from elip_models.pretraining.tasks.task import TaskScores, evaluation_transform
from elip_models.strategies import Dense
from elip_models.user_warnings import SlowScorerWarning, ignoring

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.pretraining.models.base import PretrainedModel

COLUMNS, SHOWN = 4, 12
WIDTH = 3.2  # inches
SMALL = {"fontsize": 8, "parse_math": False}
COLOURS = {True: "#2a7f3f", False: "#b3372f"}


def draw_predictions(
    model: "PretrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    source: Source | ExampleSource,
    scores: TaskScores,
    path: Path,
) -> Path:
    """Write a PNG of at most `SHOWN` examples, evenly spaced in the evaluated `source`.

    It shows images, text and predictions. If the model reduces its image tower, patches that were
    dropped or merged are grey.
    """
    predictions = {prediction.id: prediction for prediction in scores.predictions}
    samples = readable_samples(source, range(0, len(source), max(1, len(source) // SHOWN)))
    shown = [(s, predictions[s.id]) for s in samples if s.id in predictions][:SHOWN]
    rows = max(1, -(-len(shown) // COLUMNS))
    figure = new_figure(WIDTH * COLUMNS, (WIDTH + 0.8) * rows)
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (sample, prediction) in zip(axes.flat, shown, strict=False):
        if isinstance(sample, Example):
            images, text, right = sample.images, sample.text, sample.answers
        else:
            images, text, right = (sample.image,), "", sample.captions[:1]
        pixels = [_pixels(model, tokenizer, image, text) for image in images]
        axis.imshow(torch.cat(pixels, dim=2).permute(1, 2, 0).numpy())
        is_right = (prediction.score or 0.0) >= 0.5
        answer = prediction.output + ("" if is_right else f" (right: {', '.join(right)})")
        axis.set_title(textwrap.fill(textwrap.shorten(text, 120), 38), **SMALL)
        style = {"ha": "center", "va": "top", "color": COLOURS[is_right]}
        axis.text(0.5, -0.04, textwrap.fill(answer, 42), transform=axis.transAxes, **style, **SMALL)
    figure.suptitle(scores.summary(), fontsize=10)
    write_figure(figure, path, dpi=110)
    return path


@torch.no_grad()
def _pixels(
    model: "PretrainedModel", tokenizer: "PreTrainedTokenizerBase", image: object, text: str
) -> Tensor:
    """Return the model's input image (3, H, W) in [0, 1], grey at patches without a token."""
    device = next(model.parameters()).device
    seen = evaluation_transform(model)(image)
    mean, std = (torch.tensor(value)[:, None, None] for value in model.image_stats())
    pixels = (seen * std + mean).clamp(0, 1)
    if isinstance(model.reduction, Dense):
        return pixels
    is_guided = text and model.reduction.is_guided
    guide = model.encode_captions(tokenizer, [text]) if is_guided else None
    with ignoring(SlowScorerWarning):
        _, infos = run_tower(model.tower, seen[None].to(device), guide, model.reduction)
    if not infos:
        return pixels
    rows, columns = patch_grid(model.tower, model.reduction)
    alive = surviving_patches(infos, rows * columns)[-1][0]
    return dimmed(pixels, alive.view(rows, columns))
