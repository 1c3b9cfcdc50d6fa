"""FLOPs of the paper's CLIP models (ELIP, Table 5) compared with those counted here.

The paper does not state the batch, so ratios to the dense model are compared. Ratios to dense do
not depend on the batch or on the unit. The readings of Table 5 that were tried (one tower or both,
one pass or both, with and without the scoring pass, every batch that the paper names) are fitted by
this file at commit 1a22749; docs/fidelity.md has the conclusions.
"""

from typing import Any, NamedTuple

import torch
from rich.table import Table

from elip_models.pretraining.models.registry import create_model
from elip_models.profiling.measure import FlopCount
from elip_models.profiling.runner import DENSE, count
from elip_models.profiling.workload import Workload
from elip_models.reduction.strategies import RandomPruning
from elip_models.reduction.strategies.elip import ELIP
from elip_models.reduction.strategies.evit import EViT
from elip_models.reduction.strategy import Strategy


class Figures(NamedTuple):
    """TFLOPs of one model: dense, with ELIP, with EViT."""

    dense: float
    elip: float
    evit: float


PAPER = {  # ELIP, Table 5
    "clip_vit_s16": Figures(31.34, 23.98, 12.91),
    "clip_vit_b16": Figures(97.41, 72.21, 32.62),
}
UNSCORED = "ELIP, scoring not counted"
EVITS = ("EViT 0.7 at every layer", "EViT 0.7 at 3, 6, 9")
IMAGE, BOTH = "image tower", "both towers"
Counts = dict[tuple[str, str], dict[str, FlopCount]]


def paper_counts() -> Counts:
    """Count the FLOPs of one pair by (model, towers) and method, on the meta device."""
    counts: Counts = {}
    for name in PAPER:
        with torch.device("meta"):
            model = create_model(f"elip_{name}")
        schedule = model.reduction.schedule
        methods: dict[str, Strategy | None] = {DENSE: None, UNSCORED: RandomPruning(schedule)}
        methods |= {f"ELIP, {s}": ELIP(schedule, scorer=s) for s in ("last", "exact", "official")}
        methods |= dict(zip(EVITS, (EViT(0.7, "all"), EViT(0.7)), strict=True))
        for towers, part in ((IMAGE, model.visual), (BOTH, model)):
            counts[name, towers] = count(Workload(part, 1), methods, "training")
    return counts


def ratio_table(counts: Counts) -> Table:
    """Return a table of ratios to dense of every method, with errors to the paper."""
    table = Table(
        title="FLOPs relative to dense, forward and backward: Table 5 of the paper, and counted"
    )
    table.add_column("method")
    for name in PAPER:
        for column in ("paper", BOTH, IMAGE):
            table.add_column(f"{column}\n{name.removeprefix('clip_')}", justify="right")
    for method in next(iter(counts.values())):
        cells = []
        for name, paper in PAPER.items():
            reported = getattr(paper, method[:4].lower() if method != DENSE else DENSE)
            cells.append(f"{reported / paper.dense:.3f}")
            for towers in (BOTH, IMAGE):
                flops = counts[name, towers]
                ratio = sum(flops[method]) / sum(flops[DENSE])
                cells.append(f"{ratio:.3f} ({ratio * paper.dense / reported - 1:+.1%})")
        table.add_row(method, *cells)
    return table


def paper_report() -> tuple[Table, dict[str, Any]]:
    """Return the report of `python -m benchmarks.paper` on Table 5, and its data."""
    counts = paper_counts()
    data = {
        "paper_tflops": {name: figures._asdict() for name, figures in PAPER.items()},
        "counted": [
            {"model": name, "towers": towers, "method": method, **flops._asdict()}
            for (name, towers), methods in counts.items()
            for method, flops in methods.items()
        ],
    }
    return ratio_table(counts), data
