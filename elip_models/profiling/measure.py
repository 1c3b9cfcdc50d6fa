"""Measurement of steps: interleaved timing, memory, FLOPs.

`elip profile`, the benchmarks and the report of a training run use these functions.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

NO_GAIN = 0.97  # see `no_gain`
MIN_SECONDS = 2e-3  # of one measurement: a shorter step is called several times in a row

Step = Callable[[], object]


def time_side_by_side(
    steps: dict[str, Step],
    *,
    device: torch.device,
    rounds: int = 10,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time every step once in each round, after a warm-up; return the seconds of a call by step.

    The steps of a round run one after the other, so that a slow phase of the machine affects all of
    them. Each round starts with the next step. `progress` is called after each
    warm-up and measurement.
    """
    names = list(steps)
    calls: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in names}
    for name, step in steps.items():
        calls[name] = _calls(step, device)
        progress()
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            times[name].append(_seconds(steps[name], calls[name], device))
            progress()
    return times


def _calls(step: Step, device: torch.device) -> int:
    """Warm the step up and return the number of calls in one measurement."""
    seconds = _seconds(step, 1, device)
    if seconds < 100 * MIN_SECONDS:  # the first call may be slower than the next ones
        seconds = _seconds(step, 1, device)
    return max(1, min(1000, int(MIN_SECONDS / seconds)))


def _seconds(step: Step, calls: int, device: torch.device) -> float:
    """Return the seconds of a call, measured by CUDA events on a GPU."""
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


def ratios_to(
    baseline: str,
    times: dict[str, list[float]],
    summary: Callable[[list[float]], Any] = median,
) -> dict[str, Any]:
    """Divide each step's times by the baseline's of the same round; return a summary by step."""
    return {
        name: summary([t / base for t, base in zip(values, times[baseline], strict=True)])
        for name, values in times.items()
    }


def milliseconds(times: dict[str, list[float]]) -> dict[str, float]:
    """Return the median time of each step in milliseconds."""
    return {name: 1e3 * median(values) for name, values in times.items()}


def no_gain(ratio: float) -> bool:
    """Return whether a time ratio is above 0.97, too close to 1 to count as a speedup."""
    return not ratio < NO_GAIN


def memory_of(
    step: Step, device: torch.device, *, forward: Step, parameters: Iterable[Tensor] = ()
) -> int:
    """Return the bytes of a step: its peak on a GPU, elsewhere what `forward` saves for backward.

    `forward` is the forward pass of the step. The `parameters` do not count as saved.
    """
    if device.type == "cuda":
        return peak_bytes(step, device)
    with saved_bytes(parameters) as saved:
        forward()
    return saved()


def memory_kind(device: torch.device) -> str:
    """Describe what `memory_of` measures on the device."""
    return "peak of a step" if device.type == "cuda" else "bytes saved for backward"


def device_named(name: str | torch.device | None) -> torch.device:
    """Return a device of this machine; None for the GPU if there is one, else the CPU.

    Raises:
        ValueError: the machine has no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device).cpu()  # raises for the device 'meta'
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"device: expected one of this machine, such as 'cuda:1' or 'cpu', got "
            f"{str(name)!r}: {error!s:.200}"
        ) from error
    return device


def measured_on(device: torch.device) -> dict[str, str | int]:
    """Return the device, its threads and the version of torch, for the header of a result."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the version of each package that is installed."""
    versions = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


@contextmanager
def saved_bytes(parameters: Iterable[Tensor] = ()) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the bytes that autograd saves for backward in the context.

    Each storage counts once; those of `parameters` do not count.
    """
    known = {p.untyped_storage().data_ptr() for p in parameters}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that its own node stores would keep the graph for good

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storages.values())


def peak_bytes(step: Step, device: torch.device) -> int:
    """Return the peak of CUDA memory during a call, minus the memory allocated before it."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


class FlopCount(NamedTuple):
    """The floating-point operations of a step."""

    forward: int
    backward: int


def count_step(forward: Callable[[], Tensor], *, backward: bool) -> FlopCount:
    """Count the FLOPs of a forward pass and, if asked, of backward from its output's squares.

    Each op has a formula; attention counts as two matrix products.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = forward()
        forward_flops = counter.get_total_flops()
        if backward:
            output.square().sum().backward()
    return FlopCount(forward_flops, counter.get_total_flops() - forward_flops)
