"""What a reduction costs and gains on this machine: step times side by side, and agreement.

Times are ratios against the dense tower, measured in interleaved rounds of one process; medians.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elip_models.reduction.encode import encode_image
from elip_models.reduction.schedule import Schedule
from elip_models.reduction.scorers import SCORERS
from elip_models.reduction.stage import Elip
from elip_models.reduction.strategy import Context
from elip_models.towers import Tower, as_tower

NO_GAIN = 0.97  # a time ratio above this is called no gain
LEAST_SECONDS = 2e-3  # of one measurement: a shorter step is called several times in a row

Step = Callable[[], object]


def time_side_by_side(
    steps: dict[str, Step], *, device: torch.device, rounds: int = 10
) -> dict[str, list[float]]:
    """Seconds a call of each step in each of `rounds` rounds, after a warm-up.

    The steps of a round run one after the other, so that whatever slows the machine for a while
    slows all of them; the order turns by one step a round.
    """
    names = list(steps)
    calls = {name: _calls(step, device) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            times[name].append(_seconds(steps[name], calls[name], device))
    return times


def _calls(step: Step, device: torch.device) -> int:
    """Warm the step up -> how often one measurement calls it."""
    seconds = _seconds(step, 1, device)
    if seconds < 100 * LEAST_SECONDS:  # else even a slow first call is a long one
        seconds = _seconds(step, 1, device)
    return max(1, min(1000, int(LEAST_SECONDS / seconds)))


def _seconds(step: Step, calls: int, device: torch.device) -> float:
    """Seconds a call, by the device's own clock where it has one."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    seconds = time.perf_counter() - start
    if device.type == "cuda":
        end.record()
        end.synchronize()
        seconds = begin.elapsed_time(end) / 1e3
    return seconds / calls


@dataclass(frozen=True)
class Graphed:
    """A CUDA graph as a step. A graph knows addresses alone: the step that it records stays with
    it, and with the step every tensor that lies there."""

    graph: torch.cuda.CUDAGraph
    step: Step

    def __call__(self) -> None:
        self.graph.replay()


def graphed(prepare: Callable[[], Step]) -> Graphed:
    """The step that `prepare` returns as a CUDA graph: its launches alone, without Python.

    `prepare` runs on the stream of the capture, so that a step may be the backward pass of a
    forward pass in `prepare`.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step = prepare()
        for _ in range(3):
            step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return Graphed(graph, step)


def ratios_to(baseline: str, times: dict[str, list[float]]) -> dict[str, float]:
    """Median over rounds of each step's time over the baseline's of the same round."""
    return {
        name: median(t / base for t, base in zip(values, times[baseline], strict=True))
        for name, values in times.items()
    }


@contextmanager
def saved_bytes(parameters: Iterable[Tensor] = ()) -> Iterator[Callable[[], int]]:
    """Bytes that autograd saves for backward inside; each storage once, `parameters` aside."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storages.values())


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most CUDA memory that a call takes beyond what is allocated before it."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def count_flops(step: Step) -> int:
    """Floating-point operations of a call, by the formula of each op; attention as two products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return counter.get_total_flops()


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
    infer = forward_steps(
        model, schedule=schedule, batch_size=batch_size, image_size=image_size, scorers=scorers
    )
    train = {name: partial(train_step, model, step) for name, step in infer.items()}
    device = next(model.parameters()).device
    was_training, saved = model.training, {}
    model.train()
    for name, step in infer.items():
        with saved_bytes(model.parameters()) as count:
            step()
        saved[name] = count()
    training = ratios_to("dense", time_side_by_side(train, device=device, rounds=rounds))
    model.eval()
    with torch.inference_mode():
        inference = ratios_to("dense", time_side_by_side(infer, device=device, rounds=rounds))
    model.train(was_training)
    return [TowerCost(n, training[n], inference[n], saved[n] / saved["dense"]) for n in infer]


def forward_steps(
    model: nn.Module,
    *,
    schedule: Schedule | str,
    batch_size: int,
    image_size: int,
    scorers: tuple[str, ...] = tuple(SCORERS),
) -> dict[str, Callable[[], Tensor]]:
    """A forward pass for 'dense' and for each scorer, all of the same random images and text.

    See `profile_tower` for the arguments. Each step returns the CLS output (B, D).
    """
    tower, weight = as_tower(model), next(model.parameters())
    random = {"device": weight.device, "dtype": weight.dtype}
    images = torch.randn(batch_size, 3, image_size, image_size, **random)
    text = torch.randn(batch_size, tower.width, **random)

    def infer(**plan: Schedule | str) -> Tensor:
        return encode_image(model, images, text, **plan)[:, 0]

    steps = {"dense": partial(infer, schedule=f"{tower.depth}(100%)")}
    return steps | {name: partial(infer, schedule=schedule, scorer=name) for name in scorers}


def train_step(model: nn.Module, forward: Callable[[], Tensor]) -> None:
    """Forward and backward, without an optimiser."""
    forward().square().sum().backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def scorer_agreement(
    model: nn.Module,
    images: Tensor,
    text_cls: Tensor | None,
    settings: Elip,
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
    for i in range(tower.depth):
        if i in stages:
            dropped = {}
            for name in scorers:
                scorer = replace(settings, scorer=name)
                row = scorer.score(tower, stages[i], tokens, text_cls)
                dropped[name] = _dropped(tower, tokens, row, stages[i].keep)
            exact = replace(settings, scorer="exact")
            entered = tokens
            tokens, info = exact.step(tower, stages[i], tokens, Context(text_cls))
            reference = _dropped(tower, entered, info.attention, stages[i].keep)
            for name in scorers:
                shares[name].append(((dropped[name] & reference).sum() / reference.sum()).item())
            candidates = entered.shape[1] - tower.num_prefix_tokens
            shares["chance"].append((candidates - stages[i].keep) / candidates)
        tokens = tower.block(i, tokens)
    return shares


def _dropped(tower: Tower, tokens: Tensor, attention: Tensor, keep: int) -> Tensor:
    """(B, N) bool: the tokens that this attention row drops."""
    _, info = tower.reduce(tokens, attention, keep, merge=False)
    dropped = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    dropped[:, : tower.num_prefix_tokens] = False
    return dropped.scatter_(1, info.kept, False)
