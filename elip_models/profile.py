"""What a reduction costs and gains on this machine: step times side by side, and agreement.

Times are ratios against the dense tower, measured in interleaved rounds of one process; medians.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

import elip_kernels
from elip_models.reduction.encode import encode_image
from elip_models.reduction.schedule import Schedule
from elip_models.reduction.stage import (
    SCORERS,
    ElipSettings,
    reduce_stage,
    score_stage,
)
from elip_models.towers import as_tower

NO_GAIN = 0.97  # a time ratio above this is called no gain


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue, where it has one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_side_by_side(
    steps: dict[str, Callable[[], object]], *, device: torch.device, rounds: int = 10
) -> dict[str, list[float]]:
    """Seconds of each step in each of `rounds` rounds, after one round of warm-up.

    The steps of a round run one after the other, so that whatever slows the machine for a while
    slows all of them; the order turns by one step a round.
    """
    names = list(steps)
    for name in names:
        steps[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            synchronize(device)
            start = time.perf_counter()
            steps[name]()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return times


def ratios_to(baseline: str, times: dict[str, list[float]]) -> dict[str, float]:
    """Median over rounds of each step's time over the baseline's of the same round."""
    return {
        name: median(t / base for t, base in zip(values, times[baseline], strict=True))
        for name, values in times.items()
    }


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Bytes that autograd saves for backward inside; each storage once, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storages.values())


@dataclass(frozen=True)
class TowerCost:
    """One row of `profile_tower`: time and saved bytes, relative to the dense tower of the run."""

    scorer: str
    training: float
    inference: float
    saved: float


def profile_tower(
    model: nn.Module,
    *,
    schedule: Schedule | str,
    batch_size: int,
    image_size: int,
    scorers: tuple[str, ...] = tuple(SCORERS),
    rounds: int = 10,
) -> list[TowerCost]:
    """Time forward with backward, and inference, of a tower dense and with each scorer.

    Args:
        model: an image model that a tower reads, on the device and in the dtype to measure.
        schedule: of the reduction.
        batch_size, image_size: of the random images.
        rounds: interleaved rounds; medians of the ratios are reported.

    Returns:
        A row for 'dense' and one for each scorer, in this order.
    """
    tower, weight = as_tower(model), next(model.parameters())
    random = {"device": weight.device, "dtype": weight.dtype}
    images = torch.randn(batch_size, 3, image_size, image_size, **random)
    text = torch.randn(batch_size, tower.width, **random)

    def infer(scorer: str) -> Tensor:
        if scorer == "dense":
            plan = {"schedule": f"{tower.depth}(100%)"}
        else:
            plan = {"schedule": schedule, "scorer": scorer}
        return encode_image(model, images, text, **plan)[:, 0]

    def train(scorer: str) -> None:
        infer(scorer).square().sum().backward()
        model.zero_grad(set_to_none=True)

    def measure(step: Callable[[str], object]) -> dict[str, float]:
        steps = {name: partial(step, name) for name in names}
        return ratios_to("dense", time_side_by_side(steps, device=weight.device, rounds=rounds))

    names, was_training = ("dense", *scorers), model.training
    saved = {}
    for name in names:
        with saved_bytes(model) as count:
            infer(name)
        saved[name] = count()
    training = measure(train)
    with torch.inference_mode():
        inference = measure(infer)
    model.train(was_training)
    return [TowerCost(n, training[n], inference[n], saved[n] / saved["dense"]) for n in names]


@torch.no_grad()
def scorer_agreement(
    model: nn.Module,
    images: Tensor,
    text_cls: Tensor | None,
    settings: ElipSettings,
    scorers: tuple[str, ...] = ("official", "cls", "last"),
) -> dict[str, list[float]]:
    """Share of the tokens that `exact` drops which each scorer drops too, by stage.

    All scorers see the tokens that `exact` lets through. 'chance' is what a random choice shares.

    Args:
        model: an image model that a tower reads.
        images: (B, 3, H, W).
        text_cls: (B, D), the guidance in the tower's width, or None: vision only.
        settings: of the reduction; its scorer is not used.
    """
    tower, tokens = as_tower(model), as_tower(model).embed(images)
    stages = {stage.first: stage for stage in settings.schedule.stages(tower.num_patches)}
    shares: dict[str, list[float]] = {name: [] for name in (*scorers, "chance")}
    for i, block in enumerate(tower.blocks):
        if i in stages:
            dropped = {}
            for name in scorers:
                row = score_stage(
                    tower, stages[i], tokens, text_cls, replace(settings, scorer=name)
                )
                dropped[name] = _dropped(tokens, row, stages[i].keep)
            exact = replace(settings, scorer="exact")
            entered = tokens
            tokens, info = reduce_stage(tower, stages[i], tokens, text_cls, exact)
            reference = _dropped(entered, info.attention, stages[i].keep)
            for name in scorers:
                shares[name].append(((dropped[name] & reference).sum() / reference.sum()).item())
            candidates = entered.shape[1] - 1
            shares["chance"].append((candidates - stages[i].keep) / candidates)
        tokens = block(tokens)
    return shares


def _dropped(tokens: Tensor, attention: Tensor, keep: int) -> Tensor:
    """(B, N) bool: the tokens that this attention row drops."""
    _, info = elip_kernels.reduce(tokens, attention, keep, return_info=True)
    dropped = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    dropped[:, 0] = False
    return dropped.scatter_(1, info.kept, False)
