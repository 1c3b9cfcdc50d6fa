"""Cost and gain of token reduction: one row for each model, strategy, batch and mode.

FLOPs of one image (or pair) are counted op by op on the meta device, forward and backward. They
include the scorer and a second text pass; attention counts as two products. Times are medians of
ratios to the dense model, in interleaved rounds of one process. Memory is the peak of a step on a
GPU. On a CPU it is what autograd saves for backward, without parameters.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn

from elip_models.profiling.measure import (
    FlopCount,
    count_step,
    memory_of,
    no_gain,
    ratios_to,
    time_side_by_side,
)
from elip_models.profiling.workload import Workload
from elip_models.strategies.strategy import Strategy, TokenCounts
from elip_models.user_warnings import SlowScorerWarning, ignoring

Mode = Literal["training", "inference"]
MODES: tuple[Mode, ...] = get_args(Mode)
DENSE = "dense"


@dataclass(frozen=True)
class ProfileRow:
    """One row of the table of `elip profile`; ratios are to the dense row."""

    model: str
    strategy: str
    settings: str  # the strategy with its options that are not the default
    step: str  # what is measured, 'image tower' or 'whole model'
    mode: Mode
    batch_size: int
    image_size: tuple[int, int]  # height and width in pixels
    tokens: tuple[TokenCounts, ...]  # of each block of the image tower
    retained: float  # mean tokens over the layers, relative to dense
    forward_flops: float  # of one image or pair
    backward_flops: float
    flops_ratio: float
    seconds: float | None = None  # median of a step; None if not measured
    time_ratio: float | None = None
    memory: int | None = None  # bytes of a step; None if not measured
    memory_ratio: float | None = None
    verdict: str = ""  # 'no gain' for a time ratio above 0.97


class StepCost(NamedTuple):
    """Time and memory of a step, and their ratios to dense."""

    seconds: float
    time_ratio: float
    memory: int | None = None  # None in inference on a CPU
    memory_ratio: float | None = None


def profile_model(
    name: str,
    model: nn.Module,
    strategies: Mapping[str, Strategy],
    *,
    batch_size: int = 8,
    modes: Sequence[Mode] = MODES,
    rounds: int | None = 10,
) -> list[ProfileRow]:
    """Measure one model: a row for dense and for each strategy, in each mode.

    The model is an image model that a tower supports, or a whole language-image model, on the
    device and in the dtype to measure. A model on 'meta' cannot be timed. Without `rounds`, only
    tokens and FLOPs are counted.
    """
    workload = Workload(model, batch_size)
    compared: dict[str, Strategy | None] = {DENSE: None, **strategies}
    rows = []
    for mode in modes:
        counts = count(workload, compared, mode)
        measured = None if rounds is None else measure(workload, compared, mode, rounds=rounds)
        for label, strategy in compared.items():
            tokens = tokens_of(workload, strategy, mode)
            flops, dense = counts[label], counts[DENSE]
            figures = {} if measured is None else measured[label]._asdict()
            rows.append(
                ProfileRow(
                    model=name,
                    strategy=label,
                    settings="" if strategy is None else str(strategy),
                    step=workload.step,
                    mode=mode,
                    batch_size=batch_size,
                    image_size=workload.tower.image_size,
                    tokens=tokens,
                    retained=fmean(map(fmean, tokens)) / workload.tower.size.num_tokens,
                    forward_flops=flops.forward / batch_size,
                    backward_flops=flops.backward / batch_size,
                    flops_ratio=sum(flops) / sum(dense),
                    verdict=verdict(strategy, figures.get("time_ratio")),
                    **figures,
                )
            )
    return rows


def tokens_of(workload: Workload, strategy: Strategy | None, mode: Mode) -> tuple[TokenCounts, ...]:
    """Return the number of tokens in each block of the image tower."""
    size = workload.tower.size
    text_cls = torch.empty(workload.batch_size, size.width, device="meta")
    if strategy is None or not strategy.reduces(text_cls, mode == "training"):
        return (TokenCounts(size.num_tokens, size.num_tokens),) * size.depth
    return strategy.token_counts(size)


def verdict(strategy: Strategy | None, time_ratio: float | None) -> str:
    """Return 'no gain' for a time ratio that is no speedup, else an empty string."""
    timed = strategy is not None and time_ratio is not None
    return "no gain" if timed and no_gain(time_ratio) else ""


def count(
    workload: Workload, strategies: Mapping[str, Strategy | None], mode: Mode
) -> dict[str, FlopCount]:
    """Count the FLOPs of a step with each strategy, on the meta device."""
    twin = workload.on_meta()
    with in_mode(twin, mode), twin.tracing():
        return {
            name: count_step(twin.forward(strategy), backward=mode == "training")
            for name, strategy in strategies.items()
        }


def measure(
    workload: Workload,
    strategies: Mapping[str, Strategy | None],
    mode: Mode,
    *,
    rounds: int = 10,
) -> dict[str, StepCost]:
    """Measure time and memory of a step with each strategy, one of which is `DENSE`."""
    if workload.device.type == "meta":
        raise ValueError("model: expected one with weights to time, got one on the meta device")
    with in_mode(workload, mode):
        forwards = {name: workload.forward(strategy) for name, strategy in strategies.items()}
        steps = forwards
        if mode == "training":
            steps = {name: partial(workload.train_step, step) for name, step in forwards.items()}
        times = time_side_by_side(steps, device=workload.device, rounds=rounds)
        ratios = ratios_to(DENSE, times)
        costs = {name: StepCost(median(times[name]), ratios[name]) for name in strategies}
        if mode == "inference" and workload.device.type != "cuda":
            return costs
        parameters = tuple(workload.model.parameters())
        memory = {
            name: memory_of(step, workload.device, forward=forwards[name], parameters=parameters)
            for name, step in steps.items()
        }
    return {
        name: cost._replace(memory=memory[name], memory_ratio=memory[name] / memory[DENSE])
        for name, cost in costs.items()
    }


@contextmanager
def in_mode(workload: Workload, mode: Mode) -> Iterator[None]:
    """Set the model to training or inference inside the context; slow scorers do not warn."""
    was_training = workload.model.training
    workload.model.train(mode == "training")
    try:
        with ignoring(SlowScorerWarning), torch.inference_mode(mode == "inference"):
            yield
    finally:
        workload.model.train(was_training)
