"""The report after a training run: times of the image tower, and a picture."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from elip_models.analysis.visualize import draw_reduction, patch_grid
from elip_models.pretraining.data import (
    SkipReport,
    Source,
    evaluation_batches,
    image_transform,
)
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.profiling.measure import measured_on, memory_kind
from elip_models.profiling.runner import DENSE, ProfileRow, profile_model
from elip_models.reduction.encode import run_tower
from elip_models.reduction.strategies import Dense
from elip_models.reduction.strategy import Strategy
from elip_models.reduction.user_warnings import ignore_slow_scorers
from elip_models.saving.files import write_json
from elip_models.validation import require_extra

with require_extra("elip_models.pretraining.training"):
    from rich.console import Console
    from rich.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROUNDS = 5


class Reporter:
    """Reports on a trained model, from samples that it was not trained on.

    A dense model is timed with the paper's strategy. The picture of any model shows the paper's
    strategy, guided by the first captions of the samples.
    """

    def __init__(
        self,
        model: PretrainedModel,
        tokenizer: "PreTrainedTokenizerBase",
        source: Source,
        output_dir: Path,
    ) -> None:
        self.model, self.tokenizer, self.source = model, tokenizer, source
        self.output_dir = output_dir
        self.device = next(model.parameters()).device
        self.strategy = model.elip_strategy()

    @torch.no_grad()
    def picture(self, count: int = 5) -> Path:
        """Write `kept_tokens.png`: patches kept by each stage, CLS attention and captions."""
        config, tower = self.model.config, self.model.tower
        transform = image_transform(config.image_size, train=False, resize=config.resize)
        report = SkipReport(1.0, length=len(self.source))  # training has checked the share already
        batch = next(evaluation_batches(self.source, transform, count, report=report))
        captions = [several[0] for several in batch.captions]
        guidance = self.model.encode_captions(self.tokenizer, captions)
        with ignore_slow_scorers():
            _, infos = run_tower(tower, batch.images.to(self.device), guidance, self.strategy)
        mean, std = (torch.tensor(v)[:, None, None] for v in self.model.image_stats())
        pixels = (batch.images * std + mean).clamp(0, 1)
        path = self.output_dir / "kept_tokens.png"
        return draw_reduction(pixels, captions, infos, path, grid=patch_grid(tower))

    def timing(self, console: Console, batch_size: int) -> Path:
        """Time the image tower, dense and reduced; print a table and write `timing.json`."""
        reduction, memory = self.model.reduction, memory_kind(self.device)
        strategy = self.strategy if isinstance(reduction, Dense) else reduction
        console.print("timing the image tower, dense and reduced")
        tower, compared = self.model.visual, {strategy.name: strategy}
        rows = profile_model("image tower", tower, compared, batch_size=batch_size, rounds=ROUNDS)
        console.print(_timing_table(rows, strategy, memory))
        report = {**measured_on(self.device), "rounds": ROUNDS, "memory_is": memory}
        path = self.output_dir / "timing.json"
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
