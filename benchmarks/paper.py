"""FLOPs of the paper's models, beside those of its Tables 1 and 5: `python -m benchmarks.paper`.

Table 1 has the cross-modal models. The count is of a whole pre-training step, forward and backward,
on the meta device: all objectives, with momentum towers, two FLOPs per multiply-add, the paper's
batch of 36 and texts of full length. EViT and ToMe reduce every layer, as in the paper, and the
momentum tower too. The paper has no figure for METER with ToMe.

Table 5 has the CLIP models. The paper does not state their batch, so ratios to the dense model are
compared, which do not depend on it. The readings of Table 5 that were tried (one tower or both, one
pass or both, with and without the scoring pass, every batch that the paper names) are fitted by
`paper_flops.py` at commit 1a22749; docs/paper.md has the conclusions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

from elip_models.cli import run_command
from elip_models.pretraining.models.cross_modal import CrossModalModel
from elip_models.pretraining.models.momentum_model import MomentumModel
from elip_models.pretraining.models.registry import create_model, family_of
from elip_models.profiling.measure import FlopCount, count_step
from elip_models.profiling.runner import DENSE, count
from elip_models.profiling.workload import Workload
from elip_models.saving.files import write_json
from elip_models.strategies import RandomPruning
from elip_models.strategies.elip import ELIP
from elip_models.strategies.evit import EViT
from elip_models.strategies.strategy import Strategy
from elip_models.validation import check_output

BATCH_SIZE = 36
SHARED = "last, shared momentum"
ELIPS: dict[str, dict[str, Any]] = {  # fields of the config by method
    "official": {"scorer": "official"},
    "exact": {"scorer": "exact"},
    "last": {"scorer": "last"},
    SHARED: {"scorer": "last", "momentum_reduction": "shared"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "EViT": {"strategy": "evit:keep_ratio=0.7,layers=all"},
    "ToMe": {"strategy": "tome:r=13"},
}


class Table1(NamedTuple):
    """TFLOPs of one model in the paper (None if missing), and the names of our models."""

    models: tuple[str, ...]
    dense: float
    elip: float
    evit: float
    tome: float | None

    def of(self, method: str) -> float | None:
        """Return the paper's figure for a method."""
        return {DENSE: self.dense, "EViT": self.evit, "ToMe": self.tome}.get(method, self.elip)


TABLE1 = {
    "ALBEF": Table1(("albef",), 9.65, 8.50, 3.21, 6.66),
    "BLIP": Table1(("blip",), 11.03, 9.34, 4.80, 6.98),
    "METER": Table1(("meter", "meter_b32"), 8.66, 6.43, 4.68, None),
}
StepCounts = Mapping[str, Mapping[str, float]]  # TFLOPs by our model and by method


def step_counts(name: str) -> dict[str, float]:
    """Count the TFLOPs of a step of one model, dense and with every method that it supports."""
    has_momentum = issubclass(family_of(name), MomentumModel)
    own = {"momentum_reduction": "own"} if has_momentum else {}
    forms = {DENSE: (name, {})}
    for method, fields in ELIPS.items():
        if has_momentum or method != SHARED:  # which needs a momentum tower
            forms[method] = f"elip_{name}", fields
    forms |= {method: (name, fields | own) for method, fields in OTHERS.items()}
    counts = {}
    for method, (model, fields) in forms.items():
        with torch.device("meta"):
            counts[method] = step_tflops(create_model(model, **fields))
    return counts


def step_tflops(model: CrossModalModel) -> float:
    """Count the TFLOPs of a step of the paper's batch, forward and backward, on the meta device."""
    config = model.config
    with torch.device("meta"):
        images = torch.empty(BATCH_SIZE, 3, config.image_size, config.image_size)
        inputs = model.random_inputs(images)
        flops = count_step(lambda: model(**inputs).loss, backward=True)
    return sum(flops) / 1e12


def ratios(counts: Mapping[str, float]) -> dict[str, float]:
    """Divide each method's TFLOPs by those of dense."""
    return {method: flops / counts[DENSE] for method, flops in counts.items() if method != DENSE}


def table1(counts: StepCounts) -> Table:
    """Return a table of TFLOPs and ratios to dense of every method, with errors to the paper."""
    table = Table(title=f"Forward and backward of a pre-training step, batch {BATCH_SIZE}: Table 1")
    for column in ("model", "method"):
        table.add_column(column)
    for column in ("TFLOPs,\npaper", "\ncounted", "vs dense,\npaper", "\ncounted"):
        table.add_column(column, justify="right")
    for name, paper in [(name, figures) for figures in TABLE1.values() for name in figures.models]:
        table.add_section()
        for method, flops in counts[name].items():
            reported, dense = paper.of(method), counts[name][DENSE]
            share = None if reported is None else reported / paper.dense
            label = f"ELIP, {method}" if method in ELIPS else method
            cells = [_figure(reported, 2), _with_error(flops, reported, 2)]
            cells += [_figure(share, 3), _with_error(flops / dense, share, 3)]
            table.add_row(name if method == DENSE else "", label, *cells)
    return table


def table1_report() -> tuple[Table, dict[str, Any]]:
    """Return the report of `python -m benchmarks.paper` on Table 1, and its data."""
    counts = {name: step_counts(name) for paper in TABLE1.values() for name in paper.models}
    data = {
        "batch_size": BATCH_SIZE,
        "paper_tflops": {name: figures._asdict() for name, figures in TABLE1.items()},
        "counted_tflops": counts,
        "counted_ratios": {name: ratios(methods) for name, methods in counts.items()},
    }
    return table1(counts), data


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _with_error(value: float, reported: float | None, digits: int) -> str:
    """Return a counted value, with its error if the paper reports one."""
    text = _figure(value, digits)
    return text if reported is None else f"{text} ({value / reported - 1:+.1%})"


class Figures(NamedTuple):
    """TFLOPs of one model: dense, with ELIP, with EViT."""

    dense: float
    elip: float
    evit: float


TABLE5 = {  # ELIP, Table 5
    "clip_vit_s16": Figures(31.34, 23.98, 12.91),
    "clip_vit_b16": Figures(97.41, 72.21, 32.62),
}
UNSCORED = "ELIP, scoring not counted"
EVITS = ("EViT 0.7 at every layer", "EViT 0.7 at 3, 6, 9")
IMAGE, BOTH = "image tower", "both towers"
Counts = dict[tuple[str, str], dict[str, FlopCount]]


def table5_counts() -> Counts:
    """Count the FLOPs of one pair by (model, towers) and method, on the meta device."""
    counts: Counts = {}
    for name in TABLE5:
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
    for name in TABLE5:
        for column in ("paper", BOTH, IMAGE):
            table.add_column(f"{column}\n{name.removeprefix('clip_')}", justify="right")
    for method in next(iter(counts.values())):
        cells = []
        for name, paper in TABLE5.items():
            reported = getattr(paper, method[:4].lower() if method != DENSE else DENSE)
            cells.append(f"{reported / paper.dense:.3f}")
            for towers in (BOTH, IMAGE):
                flops = counts[name, towers]
                ratio = sum(flops[method]) / sum(flops[DENSE])
                cells.append(f"{ratio:.3f} ({ratio * paper.dense / reported - 1:+.1%})")
        table.add_row(method, *cells)
    return table


def table5_report() -> tuple[Table, dict[str, Any]]:
    """Return the report of `python -m benchmarks.paper` on Table 5, and its data."""
    counts = table5_counts()
    data = {
        "paper_tflops": {name: figures._asdict() for name, figures in TABLE5.items()},
        "counted": [
            {"model": name, "towers": towers, "method": method, **flops._asdict()}
            for (name, towers), methods in counts.items()
            for method, flops in methods.items()
        ],
    }
    return ratio_table(counts), data


def paper(
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Count the FLOPs of the paper's models, and compare them to the paper's figures."""
    check_output("--output", output)
    table_5, figures_5 = table5_report()
    table_1, figures_1 = table1_report()
    Console().print(table_1, table_5, sep="\n\n")
    if output is not None:
        write_json(output, {"paper": figures_5, "paper_table1": figures_1})


if __name__ == "__main__":
    run_command(paper, name="python -m benchmarks.paper")
