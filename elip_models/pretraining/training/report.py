"""The report after a training run: times of the image tower, and a picture."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from elip_models.analysis.merging import draw_merging
from elip_models.analysis.visualize import draw_reduction, patch_grid
from elip_models.engine.encode import run_tower
from elip_models.pretraining.data import (
    SkipReport,
    Source,
    evaluation_batches,
)
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.tasks.task import evaluation_transform
from elip_models.profiling.measure import measured_on, memory_kind
from elip_models.profiling.runner import DENSE, ProfileRow, profile_model
from elip_models.saving.files import write_json
from elip_models.strategies import Dense
from elip_models.strategies.strategy import Strategy
from elip_models.user_warnings import SlowScorerWarning, ignoring
from elip_models.validation import require_extra

with require_extra("elip_models.pretraining.training"):
    from rich.console import Console
    from rich.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROUNDS = 5
PICTURED = 5  # images


@torch.no_grad()
def draw_kept_tokens(
    model: PretrainedModel, tokenizer: "PreTrainedTokenizerBase", source: Source, path: Path
) -> Path:
    """Write a picture of what the model keeps or merges, with captions.

    It shows the first images of `source`, which the model was not trained on. The first captions
    guide a strategy that reads a text. A model that reduces nothing is drawn with the paper's.
    """
    device = next(model.parameters()).device
    report = SkipReport(1.0, length=len(source))  # training has checked the share already
    batch = next(evaluation_batches(source, evaluation_transform(model), PICTURED, report=report))
    captions = [sample.captions[0] for sample in batch.samples]
    guidance = model.encode_captions(tokenizer, captions)
    with ignoring(SlowScorerWarning):
        images = batch.images.to(device)
        infos = run_tower(model.tower, images, guidance, model.reduction)[1]
        infos = infos or run_tower(model.tower, images, guidance, model.elip_strategy())[1]
    mean, std = (torch.tensor(value)[:, None, None] for value in model.image_stats())
    pixels = (batch.images * std + mean).clamp(0, 1)
    has_scores = all(info.attention is not None for info in infos)
    draw = draw_reduction if has_scores else draw_merging
    return draw(pixels, captions, infos, path, grid=patch_grid(model.tower))


def time_tower(model: PretrainedModel, path: Path, console: Console, batch_size: int) -> Path:
    """Time the image tower, dense and reduced; print a table and write JSON.

    A dense model is timed with the paper's strategy.
    """
    device = next(model.parameters()).device
    is_dense, memory = isinstance(model.reduction, Dense), memory_kind(device)
    strategy = model.elip_strategy() if is_dense else model.reduction
    console.print("timing the image tower, dense and reduced")
    compared = {strategy.name: strategy}
    rows = profile_model(
        "image tower", model.visual, compared, batch_size=batch_size, rounds=ROUNDS
    )
    console.print(_timing_table(rows, strategy, memory))
    report = {**measured_on(device), "rounds": ROUNDS, "memory_is": memory}
    write_json(path, report | {"rows": [asdict(row) for row in rows]})
    return path


def _timing_table(rows: Sequence[ProfileRow], strategy: Strategy, memory: str) -> Table:
    """Return the reduced rows of a profile, in training and in inference."""
    caption = f"memory: {memory}"
    if strategy.is_guided:
        caption += "; guided by random texts"
        if getattr(strategy, "without_text", None) == "dense":
            caption += "; without a text, nothing is reduced"
    title = f"image tower, batch {rows[0].batch_size}: relative to dense"
    table = Table(strategy.name, "tokens", "FLOPs", "time", "memory", title=title, caption=caption)
    for row in rows:
        if row.strategy != DENSE:
            figures = (row.retained, row.flops_ratio, row.time_ratio, row.memory_ratio)
            tokens, flops, time, memory = ("" if x is None else f"{x:.2f}" for x in figures)
            table.add_row(row.mode, tokens, flops, f"{time} {row.verdict}".strip(), memory)
    return table
