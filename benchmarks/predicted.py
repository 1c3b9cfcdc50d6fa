"""Compare predicted and measured times of every op that a GPU run timed.

    python -m benchmarks.predicted benchmarks/results/DEVICE/bench.json

The prediction contains the launches of this project for an op, in sequence, as in its example.
Kernels of PyTorch, such as projections around the attention output, are not included. No GPU is
needed.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernel_analysis import report
from benchmarks.kernel_analysis.compile import Arch, RecordedLaunch, compile_launch
from benchmarks.kernel_analysis.latency import ALL_MACHINES, Machine, bound, size_of
from benchmarks.parity import OURS
from elip_kernels.testing import WITH_KERNELS

COLUMNS = ("op", "direction", "shape", "dtype", "bytes, us", "predicted, us", "measured, us")
COLUMNS += ("measured / predicted",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read a JSON of the benchmarks, write the table and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predicted", description=__doc__)
    parser.add_argument("path", type=Path, metavar="JSON")
    content = json.loads(parser.parse_args(arguments).path.read_text())
    device = content["machine_info"]["device"]
    machine = next((m for m in ALL_MACHINES if f" {m.name}" in f" {device}"), None)
    if machine is None:
        names = ", ".join(m.name for m in ALL_MACHINES)
        sys.stderr.write(f"{device}: expected one of {names}, of which time is predicted\n")
        return 1
    entries = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
    sys.stdout.write(f"{device}\n{report.table(rows(entries, machine), COLUMNS)}\n")
    return 0


def rows(entries: Iterable[dict[str, Any]], machine: Machine) -> list[dict[str, str]]:
    """Return one row per entry of an op whose kernels ran."""
    found = []
    for entry in entries:
        if entry.get("kernels") and entry["op"] in WITH_KERNELS:
            roof, seconds = predicted(entry, machine)
            measured = entry["milliseconds"][OURS] / 1e3
            times = (f"{1e6 * each:.1f}" for each in (roof, seconds, measured))
            shape = " ".join(f"{name}{size}" for name, size in entry["shape"].items())
            cells = (entry["op"], entry["direction"], shape, entry["dtype"], *times)
            ratio = f"{measured / seconds:.2f}"
            found.append(dict(zip(COLUMNS, (*cells, ratio), strict=True)))
    return found


def predicted(entry: dict[str, Any], machine: Machine) -> tuple[float, float]:
    """Return the seconds of an op's launches: by their bytes alone, and by the model."""
    B, N = entry["shape"]["B"], entry["shape"]["N"]
    keep = entry["shape"].get("K", N - entry["shape"].get("r", 1))
    launches = report.recorded_call(entry["op"], B, N, keep, entry["dtype"], machine.arch)
    is_wanted = {"forward": (False,), "backward": (True,)}.get(entry["direction"], (False, True))
    times = [
        bound(size_of(each), at_once(each, N, entry["dtype"], machine.arch), machine)
        for each in launches
        if ("_bwd_" in each.name) in is_wanted
    ]
    return sum(roof for roof, _ in times), sum(seconds for _, seconds in times)


_AT_ONCE: dict[tuple[str, int, str, Arch], int] = {}


def at_once(launch: RecordedLaunch, N: int, dtype: str, arch: Arch) -> int:
    """Return how many programs an SM or CU runs at once, from the compiled code (cached)."""
    key = launch.name, N, dtype, arch
    if key not in _AT_ONCE:
        code = compile_launch(launch, arch)
        _AT_ONCE[key] = code.occupancy[0] // code.num_warps
    return _AT_ONCE[key]


if __name__ == "__main__":
    sys.exit(main())
