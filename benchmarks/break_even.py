"""Predict from which batch a reduced vision transformer is faster than the dense one on a GPU.

    python -m benchmarks.break_even [--model vit_base_patch16_224] [--keep 0.7] [--gpu H100]

The table has the launches of a forward pass in bf16 and their predicted time: of the model as it is
and compiled, without the host, as in a CUDA graph. An eager call also needs the host. Its time is
`--host-ms` for the dense model, multiplied for a reduced one by the ratio of the processor times
that are measured here, with a stub of Triton's driver. Nothing of this was measured on a GPU.

    seconds of a launch  LAUNCH + max(bytes / bandwidth, FLOPs / rate, waits * latency)
    eager                max(sum over the launches, host)

For this project's kernels see `kernel_analysis.latency`. PyTorch's matrix products and attention
run at `EFFICIENCY` of the peak rate and wait `PRODUCT_WAITS` times, its other kernels twice.
Compiled, neighbours that are not `ALONE` are one, which moves as many bytes as the largest of them.
"""

import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.kernel_analysis.compile import RecordedLaunch, recorded_launches
from benchmarks.kernel_analysis.latency import ALL_MACHINES, LAUNCH, Machine, size_of
from benchmarks.kernel_analysis.stub_device import stub_device
from benchmarks.machine import machine
from benchmarks.tables import table
from elip_models import reduce_
from elip_models.profiling.commit import commit
from elip_models.saving.files import write_json

STRATEGIES = ("tome", "evit", "elip", "pitome", "crossget", "random")
PEAK = {"H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bf16 FLOPs per second, from the data sheets."""
EFFICIENCY, PRODUCT_WAITS, OTHER_WAITS = 0.6, 6, 2
AT_ONCE = 4  # programs of this project's kernels on an SM
SHOWN, LARGEST = (1, 8, 64), 512
NO_KERNEL = {"empty", "new_empty", "empty_like", "detach", "_unsafe_view", "promote_types"}
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", ATTENTION}
ALONE = PRODUCTS | {"sort", "topk", "cumsum", "scatter", "scatter_add", "index_add_"}
"""Ops that a compiler does not join with their neighbours."""


@dataclass(frozen=True)
class Launch:
    """A launch whose bytes, FLOPs and programs are linear in the batch size.

    Each pair is the value at batch 0 and the slope. `programs` is None for kernels of PyTorch.
    """

    name: str
    bytes: tuple[float, float]
    flops: tuple[float, float]
    waits: int
    programs: tuple[float, float] | None = None

    @property
    def fuses(self) -> bool:
        """Return whether a compiler joins this launch with its neighbours."""
        return self.programs is None and self.name not in ALONE

    def seconds(self, batch: int, gpu: Machine, peak: float) -> float:
        """Return the predicted time at a batch size."""
        size, flops = (each[0] + batch * each[1] for each in (self.bytes, self.flops))
        turns = 1
        if self.programs is not None:
            programs = self.programs[0] + batch * self.programs[1]
            turns = -(-round(programs) // (AT_ONCE * gpu.processors))
        waited = turns * self.waits * gpu.latency
        return LAUNCH + max(size / gpu.bandwidth, flops / (EFFICIENCY * peak), waited)


class Found(NamedTuple):
    """A launch at one batch size."""

    name: str
    bytes: int
    flops: int
    waits: int
    programs: int | None


class _Recorder(TorchDispatchMode):
    """Record the launches of a forward pass on CPU tensors, in order."""

    def __init__(self, launches: list[RecordedLaunch]) -> None:
        super().__init__()
        self.launches, self.found = launches, list[Found]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = len(self.launches)
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "elip":
            for launch in self.launches[before:]:
                size = size_of(launch)
                self.found.append(Found(launch.name, size.bytes, 0, size.waits, size.programs))
        elif not func.is_view and name not in NO_KERNEL:
            tensors = [each for each in tree_leaves((args, kwargs, out)) if torch.is_tensor(each)]
            waits = PRODUCT_WAITS if name in PRODUCTS else OTHER_WAITS
            size = sum(each.nbytes for each in tensors)
            self.found.append(Found(name, size, _flops(func, args, out), waits, None))
        return out


def _flops(func: Any, args: tuple[Any, ...], out: Any) -> int:
    """Return the FLOPs of a product or of attention, 0 for all else."""
    if func.overloadpacket.__name__ == ATTENTION:
        q, k = args[:2]
        return 4 * q.numel() * k.shape[2]
    formula = flop_registry.get(func.overloadpacket)
    return 0 if formula is None else formula(*args, out_val=out)


@torch.no_grad()
def launches_of(model: nn.Module, images: Tensor, arch: int | str) -> list[Launch]:
    """Return the launches of a model, from batches of two and of three of the images."""
    passes = []
    for batch in (2, 3):
        with recorded_launches(arch) as launches, _Recorder(launches) as recorder:
            model(images[:batch])
        passes.append(recorder.found)
    two, three = passes
    if [each.name for each in two] != [each.name for each in three]:
        raise ValueError("model: expected the same launches at each batch size, got others")
    return [_linear(*each) for each in zip(two, three, strict=True)]


def _linear(two: Found, three: Found) -> Launch:
    def line(name: str) -> tuple[float, float]:
        first, second = getattr(two, name), getattr(three, name)
        return 3 * first - 2 * second, second - first

    programs = None if two.programs is None else line("programs")
    return Launch(two.name, line("bytes"), line("flops"), max(two.waits, three.waits), programs)


def compiled(launches: Sequence[Launch]) -> list[Launch]:
    """Return the launches with each run of neighbours that fuse as one."""
    found: list[Launch] = []
    for each in launches:
        if each.fuses and found and found[-1].fuses:
            largest = max(found[-1], each, key=lambda launch: sum(launch.bytes))
            found[-1] = replace(largest, name=f"{found[-1].name}+{each.name}")
        else:
            found.append(each)
    return found


def total(launches: Sequence[Launch], batch: int, gpu: Machine, host: float = 0.0) -> float:
    """Return the seconds of a forward pass whose calls take the host `host` seconds."""
    peak = PEAK[gpu.name.split()[0]]
    return max(sum(each.seconds(batch, gpu, peak) for each in launches), host)


def first_faster(dense: Sequence[float], reduced: Sequence[float]) -> int | None:
    """Return the batch from which on a reduced model is faster, or None.

    Args:
        dense, reduced: seconds at batch 1, 2, and so on.
    """
    pairs = enumerate(zip(dense, reduced, strict=True), 1)
    first = 1 + max((batch for batch, (one, other) in pairs if other >= one), default=0)
    return first if first <= len(dense) else None


@torch.no_grad()
def host_ratios(models: dict[str, nn.Module], image: Tensor, rounds: int = 9) -> dict[str, float]:
    """Return the processor time of each model relative to "dense"; its fastest round counts."""
    best = dict.fromkeys(models, float("inf"))
    with stub_device(keep=False):
        for _ in range(rounds):
            for name, model in models.items():
                start = time.process_time()
                for _ in range(10):
                    model(image)
                best[name] = min(best[name], time.process_time() - start)
    return {name: each / best["dense"] for name, each in best.items()}


def predict(options: argparse.Namespace) -> dict[str, Any]:
    """Return launches, times and break-even batches of the dense and of each reduced model."""
    gpu = next(each for each in ALL_MACHINES if each.name.startswith(options.gpu))
    every = ("dense", *STRATEGIES)
    dense = timm.create_model(options.model, num_classes=0).eval()
    patch = dense.patch_embed.patch_size
    narrow = timm.create_model(  # so narrow that only the host's time counts
        options.model,
        num_classes=0,
        embed_dim=24,
        num_heads=3,
        img_size=tuple(4 * side for side in patch),
    ).eval()
    small = {name: _reduced(narrow, name, options.keep) for name in every}
    ratios = host_ratios(small, torch.rand(1, 3, *narrow.patch_embed.img_size))
    images = torch.rand(3, 3, *dense.patch_embed.img_size).bfloat16()
    found, seconds = {}, {}
    for name in every:
        model = _reduced(dense.bfloat16(), name, options.keep)
        launches = launches_of(model, images, gpu.arch)
        modes = {
            "eager": (launches, options.host_ms / 1e3 * ratios[name]),
            "graph": (launches, 0.0),
            "compiled graph": (compiled(launches), 0.0),
        }
        seconds[name] = {
            mode: [total(of_mode, batch, gpu, host) for batch in range(1, LARGEST + 1)]
            for mode, (of_mode, host) in modes.items()
        }
        times = seconds[name]["graph"]
        found[name] = {
            "launches": len(launches),
            "compiled": len(modes["compiled graph"][0]),
            "microseconds": {str(batch): round(1e6 * times[batch - 1], 1) for batch in SHOWN},
            "host_ratio": round(ratios[name], 3),
            "faster_from": {
                mode: first_faster(seconds["dense"][mode], each)
                for mode, each in seconds[name].items()
            },
        }
    return {
        "gpu": gpu.name,
        "model": options.model,
        "keep": options.keep,
        "host_ms": options.host_ms,
        "largest": LARGEST,
        "host": machine(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "models": found,
    }


def _reduced(model: nn.Module, name: str, keep: float) -> nn.Module:
    copied = deepcopy(model)
    return copied if name == "dense" else reduce_(copied, name, keep=keep)


def shown(document: dict[str, Any]) -> str:
    """Return the predictions as a table."""
    header = ["model", "launches", "compiled", *(f"us, batch {batch}" for batch in SHOWN), "host"]
    modes = ("eager", "graph", "compiled graph")
    header += [f"faster from batch: {mode}" for mode in modes]
    rows = [
        [
            name,
            str(each["launches"]),
            str(each["compiled"]),
            *(f"{time:,.0f}" for time in each["microseconds"].values()),
            f"{each['host_ratio']:.2f}",
            *("" if name == "dense" else batch_or_none(each, mode) for mode in modes),
        ]
        for name, each in document["models"].items()
    ]
    return table(header, rows, left=1)


def batch_or_none(model: dict[str, Any], mode: str) -> str:
    """Return the batch from which on a model is faster, or a dash."""
    batch = model["faster_from"][mode]
    return "–" if batch is None else str(batch)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.break_even",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="vit_base_patch16_224", help="a model of timm (default: %(default)s)")
    add("--keep", type=float, default=0.7, help="share of the tokens (default: %(default)s)")
    add("--gpu", choices=PEAK, default="H100", help="(default: %(default)s)")
    add("--host-ms", type=float, default=1.2, help="of the dense model (default: %(default)s)")
    add("--output", type=Path, metavar="X.json", help="write the predictions to this file")
    options = parser.parse_args(arguments)
    document = predict(options)
    sys.stdout.write(f"{document['gpu']}, predicted\n{shown(document)}\n")
    if options.output is not None:
        write_json(options.output, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
