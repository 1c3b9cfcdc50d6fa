"""How steps are measured: times side by side, CUDA graphs, memory, FLOPs, and where it was.

`elip profile`, the benchmarks and the report of a training run measure by this file alone.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

NO_GAIN = 0.97  # see `no_gain`
LEAST_SECONDS = 2e-3  # of one measurement: a shorter step is called several times in a row

Step = Callable[[], object]


def time_side_by_side(
    steps: dict[str, Step], *, device: torch.device, rounds: int = 10
) -> dict[str, list[float]]:
    """Time every step once in each of `rounds` rounds, after a warm-up -> seconds a call, by step.

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
    """Warm the step up -> how many calls one measurement takes."""
    seconds = _seconds(step, 1, device)
    if seconds < 100 * LEAST_SECONDS:  # else even a slow first call is a long one
        seconds = _seconds(step, 1, device)
    return max(1, min(1000, int(LEAST_SECONDS / seconds)))


def _seconds(step: Step, calls: int, device: torch.device) -> float:
    """Measure seconds a call, by the device's own clock where it has one."""
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
    """A CUDA graph that is called as a step.

    A graph knows addresses alone, so it keeps the step that it recorded, and with the step every
    tensor that lies at these addresses.
    """

    graph: torch.cuda.CUDAGraph
    step: Step

    def __call__(self) -> None:
        self.graph.replay()


def graphed(prepare: Callable[[], Step]) -> Graphed:
    """Record the step that `prepare` returns as a CUDA graph, which launches without Python.

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
    """Divide each step's time by the baseline's of the same round -> median over rounds, by
    step.
    """
    return {
        name: median(t / base for t, base in zip(values, times[baseline], strict=True))
        for name, values in times.items()
    }


def milliseconds(times: dict[str, list[float]]) -> dict[str, float]:
    """Seconds of all rounds -> median milliseconds, by step."""
    return {name: 1e3 * median(values) for name, values in times.items()}


def no_gain(ratio: float) -> bool:
    """Tell whether a time ratio is too near to one, or above it, to be called a gain."""
    return not ratio < NO_GAIN


def memory_of(
    step: Step, device: torch.device, *, forward: Step, parameters: Iterable[Tensor] = ()
) -> int:
    """Measure the bytes of a step: its peak on a GPU; elsewhere what autograd saves for backward in
    `forward`, `parameters` aside.
    """
    if device.type == "cuda":
        return peak_bytes(step, device)
    with saved_bytes(parameters) as saved:
        forward()
    return saved()


def memory_is(device: torch.device) -> str:
    """Say in words what `memory_of` measures on the device."""
    return "peak of a step" if device.type == "cuda" else "bytes saved for backward"


def measured_on(device: torch.device) -> dict[str, str | int]:
    """Name the device, its threads and the version of torch, for a table of times to show."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


@contextmanager
def saved_bytes(parameters: Iterable[Tensor] = ()) -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd saves for backward inside; each storage once, `parameters`
    aside.

    Yields a call that gives the count.
    """
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
    """Measure the most CUDA memory that a call takes beyond what is allocated before it."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


class FlopCount(NamedTuple):
    """The floating-point operations of a step."""

    forward: int
    backward: int


def count_step(forward: Callable[[], Tensor], *, backward: bool) -> FlopCount:
    """Count the floating-point operations of a forward and, apart from it, of the backward of its
    output's squares, by the formula of each op; attention counts as two products.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = forward()
        ahead = counter.get_total_flops()
        if backward:
            output.square().sum().backward()
    return FlopCount(ahead, counter.get_total_flops() - ahead)
