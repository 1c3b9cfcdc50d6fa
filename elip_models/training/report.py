"""The report after a training run: timing and agreement of the scorers, and a picture."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elip_models.analysis.agreement import scorer_agreement
from elip_models.analysis.visualize import draw_reduction, patch_grid
from elip_models.data import (
    SkipReport,
    Source,
    evaluation_batches,
    image_transform,
)
from elip_models.models.base import PretrainedModel
from elip_models.models.io.files import write_json
from elip_models.models.momentum_model import MomentumModel
from elip_models.models.registry import elip_strategy
from elip_models.profiling.measure import measured_on, memory_kind, no_gain
from elip_models.profiling.runner import DENSE, Mode, measure
from elip_models.profiling.workload import Workload
from elip_models.reduction.encode import run_tower
from elip_models.reduction.momentum_scores import forward_with_scores
from elip_models.reduction.schedule import PRESETS
from elip_models.reduction.scorers import SCORERS
from elip_models.reduction.strategies.elip import ELIP
from elip_models.reduction.strategy import Strategy
from elip_models.reduction.user_warnings import deliberately_slow
from elip_models.training.progress import progress_bar
from elip_models.validation import require_extra

with require_extra("elip_models.training"):
    from rich.console import Console
    from rich.table import Table
    from timm.models.vision_transformer import VisionTransformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_AND_ROUNDS = {"cpu": (2, 3), "cuda": (64, 10)}
"""Batch size and interleaved rounds of the timing, by type of device."""


@dataclass(frozen=True)
class ScorerCost:
    """Cost of a step with one scorer, relative to the dense tower measured in the same process."""

    scorer: str
    training: float  # ratio of the time of forward and backward
    inference: float  # ratio of the time of a forward pass
    memory: float  # ratio of what `memory_of` measures in training


class Reporter:
    """Reports on a trained model, from samples that it was not trained on.

    A model that is dense or has another strategy is shown with the paper's strategy. The first
    captions of the samples guide the reduction.
    """

    def __init__(
        self,
        model: PretrainedModel,
        tokenizer: "PreTrainedTokenizerBase",
        source: Source,
        output_dir: Path,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.source = source
        self.output_dir = output_dir
        self.device = next(model.parameters()).device
        self.strategy = elip_strategy(model)

    def picture(self, count: int = 5) -> Path:
        """Write `kept_tokens.png`: patches kept by each stage, CLS attention and captions."""
        images, captions, guidance = self._guided_batch(count)
        tower = self.model.tower
        with torch.no_grad(), deliberately_slow():
            _, infos = run_tower(tower, images, guidance, self.strategy)
        mean, std = (torch.tensor(v)[:, None, None] for v in self.model.image_stats())
        pixels = (images.cpu() * std + mean).clamp(0, 1)
        path = self.output_dir / "kept_tokens.png"
        return draw_reduction(pixels, captions, infos, path, grid=patch_grid(tower))

    def timing(self, console: Console) -> Path:
        """Time ViT-S/16 at 224 px with every scorer; print a table and write `timing.json`."""
        console.print(
            f"comparing {len(SCORERS)} scorers on the trained model, then timing ViT-S/16 at "
            "224 px, dense and with each"
        )
        images, _, guidance = self._guided_batch(100)
        rows = None
        if isinstance(self.model, MomentumModel):
            _, rows = forward_with_scores(self.model.tower_m, images, guidance, self.strategy)
        with deliberately_slow():
            agreement = scorer_agreement(
                self.model.visual, images, guidance, self.strategy, rows=rows
            )
        tower = VisionTransformer(
            img_size=224, embed_dim=384, num_heads=6, pre_norm=True, num_classes=0
        )
        batch_size, rounds = BATCH_AND_ROUNDS["cuda" if self.device.type == "cuda" else "cpu"]
        workload = Workload(tower.to(self.device), batch_size)
        with progress_bar(console) as bar:
            count = 2 * (rounds + 1) * (len(SCORERS) + 1)
            task = bar.add_task("", total=count, unit="measurement")
            costs = scorer_costs(workload, rounds=rounds, progress=lambda: bar.advance(task))
        memory = memory_kind(self.device)
        console.print(_timing_table(costs, agreement, batch_size, memory))
        report = {
            "tower": "ViT-S/16, 224 px, random weights",
            "batch_size": batch_size,
            **measured_on(self.device),
            "rounds": rounds,
            "memory": memory,
            "costs": [asdict(cost) for cost in costs],
            "agreement_with_exact": agreement,
        }
        path = self.output_dir / "timing.json"
        write_json(path, report)
        return path

    @torch.no_grad()
    def _guided_batch(self, count: int) -> tuple[Tensor, list[str], Tensor]:
        """Return images, captions and guidance (B, D) of the first `count` readable samples."""
        config = self.model.config
        transform = image_transform(config.image_size, train=False, resize=config.resize)
        report = SkipReport(1.0, length=len(self.source))  # training has checked the share already
        batch = next(evaluation_batches(self.source, transform, count, report=report))
        captions = [several[0] for several in batch.captions]
        guidance = self.model.encode_captions(self.tokenizer, captions)
        return batch.images.to(self.device), captions, guidance


def scorer_costs(
    workload: Workload, *, rounds: int, progress: Callable[[], object] = lambda: None
) -> list[ScorerCost]:
    """Measure ELIP with its CLIP schedule: the dense tower, then each scorer."""
    strategies: dict[str, Strategy | None] = {DENSE: None}
    strategies |= {name: ELIP(PRESETS["clip"], scorer=name) for name in SCORERS}
    modes: tuple[Mode, Mode] = ("training", "inference")
    train, infer = (
        measure(workload, strategies, mode, rounds=rounds, progress=progress) for mode in modes
    )
    return [
        ScorerCost(n, train[n].time_ratio, infer[n].time_ratio, train[n].memory_ratio or 0.0)
        for n in strategies
    ]


def _timing_table(
    costs: Sequence[ScorerCost],
    agreement: dict[str, list[float]],
    batch_size: int,
    memory: str,
) -> Table:
    table = Table(
        title=f"ViT-S/16 at 224 px, batch {batch_size}: relative to dense, side by side",
        caption=f"memory: {memory}; agreement: share of the tokens that exact drops, by stage, on "
        "the trained model",
    )
    for name in ("scorer", "training time", "inference time", "memory", "agreement"):
        table.add_column(name, no_wrap=True)
    for cost in costs:
        shares = agreement.get(cost.scorer, [])
        table.add_row(
            cost.scorer,
            _ratio(cost.training, cost.scorer),
            _ratio(cost.inference, cost.scorer),
            f"{cost.memory:.2f}",
            " ".join(f"{share:.2f}" for share in shares),
        )
    chance = " ".join(f"{share:.2f}" for share in agreement["chance"])
    table.add_row("chance", "", "", "", chance, style="dim")
    return table


def _ratio(ratio: float, scorer: str) -> str:
    return f"{ratio:.2f} no gain" if scorer != DENSE and no_gain(ratio) else f"{ratio:.2f}"
