"""The FLOPs of the paper's cross-modal models (ELIP, Table 1) beside those counted here.

Counted is a whole step of pre-training, forward and backward, on the meta device: all objectives,
momentum towers included, two FLOPs a multiply-add, at the paper's batch of 36 and with texts of the
full length. EViT and ToMe reduce the momentum tower too, as it is a copy of what they change.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from rich.console import Group
from rich.table import Table

from elip_models.models.cross_modal import CrossModalModel
from elip_models.models.registry import create_model
from elip_models.profiling.measure import count_step
from elip_models.profiling.rows import DENSE
from elip_models.reduction.strategies.evit import EViT
from elip_models.reduction.strategies.tome import ToMe
from elip_models.reduction.strategy import Strategy

BATCH_SIZE = 36
AGREES = 0.01  # an error up to which a count is called the paper's
SHARED = "last, shared momentum"
ELIPS: dict[str, dict[str, Any]] = {  # what is counted: fields of the config
    "official": {"scorer": "official"},
    "exact": {"scorer": "exact"},
    "last": {"scorer": "last"},
    SHARED: {"scorer": "last", "momentum_reduction": "shared"},
}
OTHERS: dict[str, Strategy] = {"EViT": EViT(layers="all"), "ToMe": ToMe(r=13)}


class Table1(NamedTuple):
    """TFLOPs of one model as the paper gives them, None where it does not; models: ours."""

    models: tuple[str, ...]
    dense: float
    elip: float
    evit: float
    tome: float | None


PAPER = {
    "ALBEF": Table1(("albef",), 9.65, 8.50, 3.21, 6.66),
    "BLIP": Table1(("blip",), 11.03, 9.34, 4.80, 6.98),
    "METER": Table1(("meter", "meter_b32"), 8.66, 6.43, 4.68, None),
}
Counts = Mapping[str, Mapping[str, float]]  # TFLOPs by our model and by method


def table1_counts() -> Counts:
    """Count the TFLOPs of a step of every model with every method."""
    return {name: step_counts(name) for paper in PAPER.values() for name in paper.models}


def step_counts(name: str) -> dict[str, float]:
    """Count the TFLOPs of a step of one model: `DENSE`, then those of `ELIPS` and `OTHERS` that it
    takes."""
    with torch.device("meta"):
        model = create_model(name)
    counts = {DENSE: step_tflops(model)}
    has_momentum = bool(model.moved_in_training())
    for method, fields in ELIPS.items():
        if has_momentum or method != SHARED:
            with torch.device("meta"):
                reduced = create_model(f"elip_{name}", **fields)
            counts[method] = step_tflops(reduced)
    for method, strategy in OTHERS.items():
        if has_momentum or method == "EViT":
            model.reduction = model.dense = strategy
            counts[method] = step_tflops(model)
    return counts


def step_tflops(model: CrossModalModel, batch_size: int = BATCH_SIZE) -> float:
    """Count the TFLOPs of a step, forward and backward, of a model on the meta device."""
    config = model.config
    with torch.device("meta"):
        images = torch.empty(batch_size, 3, config.image_size, config.image_size)
        ids = torch.ones(batch_size, config.context_length, dtype=torch.long)
        mask, drawn = torch.ones_like(ids), model.fixed_draw(images, ids)
        flops = count_step(lambda: model(images, ids, mask, drawn=drawn).loss, backward=True)
    return sum(flops) / 1e12


def ratios(counts: Mapping[str, float]) -> dict[str, float]:
    """Divide each method's TFLOPs by those of dense."""
    return {method: each / counts[DENSE] for method, each in counts.items() if method != DENSE}


def nearest(counts: Mapping[str, float], paper: Table1) -> tuple[str, float]:
    """Find the way to count ELIP whose ratio is the nearest to the paper's -> its name and
    error."""
    said, counted = paper.elip / paper.dense, ratios(counts)
    errors = {method: counted[method] / said - 1 for method in ELIPS if method in counted}
    return min(errors.items(), key=lambda item: abs(item[1]))


def table1(counts: Counts) -> Table:
    """Lay out dense TFLOPs and the ratio of every method to them, with errors against the
    paper's."""
    table = Table(title=f"Forward and backward of a pre-training step, batch {BATCH_SIZE}: Table 1")
    table.add_column("model")
    columns = ["dense,\npaper", "dense,\ncounted", "ELIP,\npaper"]
    columns += [method.replace(", ", ",\n") for method in ELIPS]
    columns += [f"{method},\n{of}" for method in OTHERS for of in ("paper", "counted")]
    for column in columns:
        table.add_column(column, justify="right")
    for name, paper in _models():
        counted, dense = ratios(counts[name]), counts[name][DENSE]
        said = paper.elip / paper.dense
        cells = [f"{paper.dense:.2f}", f"{dense:.2f} {_error(dense / paper.dense - 1)}"]
        cells += [f"{said:.3f}", *(_beside(counted.get(method), said) for method in ELIPS)]
        for method, flops in zip(OTHERS, (paper.evit, paper.tome), strict=True):
            share = None if flops is None else flops / paper.dense
            cells += ["-" if share is None else f"{share:.3f}", _beside(counted.get(method), share)]
        table.add_row(name, *cells)
    return table


def conclusion(counts: Counts) -> str:
    """Say which scorer's count the paper's ratios agree with, in a sentence made of the figures."""
    said = []
    for name, paper in _models():
        method, error = nearest(counts[name], paper)
        dense = counts[name][DENSE] / paper.dense - 1
        agrees = "agrees with" if abs(error) <= AGREES else "agrees with none, nearest"
        known = "the same step" if abs(dense) <= AGREES else "not the same step"
        said.append(f"{name} {agrees} '{method}' {_error(error)}, dense {_error(dense)}: {known}")
    return (
        f"The paper's ratio of ELIP against those counted here, within {AGREES:.0%}: "
        + "; ".join(said)
        + ". What a scorer other than 'official' saves beyond that is this library's."
    )


def table1_report() -> tuple[Group, dict[str, Any]]:
    """What `elip profile --paper` prints of Table 1, and the same as plain data."""
    return report_of(table1_counts())


def report_of(counts: Counts) -> tuple[Group, dict[str, Any]]:
    """`table1_report` of these counts."""
    line = conclusion(counts)
    data = {
        "batch_size": BATCH_SIZE,
        "paper_tflops": {name: figures._asdict() for name, figures in PAPER.items()},
        "counted_tflops": {name: dict(each) for name, each in counts.items()},
        "counted_ratios": {name: ratios(each) for name, each in counts.items()},
        "conclusion": line,
    }
    return Group(table1(counts), line), data


def _models() -> Iterator[tuple[str, Table1]]:
    """Each of our models with the paper's figures of it."""
    for paper in PAPER.values():
        for name in paper.models:
            yield name, paper


def _beside(ratio: float | None, said: float | None) -> str:
    """Write a counted ratio with its error against what the paper says, where there are both."""
    if ratio is None:
        return "-"
    return f"{ratio:.3f}" + ("" if said is None else f" {_error(ratio / said - 1)}")


def _error(share: float) -> str:
    return f"({share:+.1%})"
