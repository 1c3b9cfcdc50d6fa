"""Measure what token reduction saves on this machine: a table, and a JSON to send us.

    python -m benchmarks.gpu                     # minutes on a GPU; on a CPU with smaller sizes
    python -m benchmarks.gpu --model vit_small_patch14_dinov2 --batch 1 256 --settings "merge 0.5"
    python -m benchmarks.gpu --show gpu.json     # print the table of an earlier run

A model runs in three ways: eager, by torch.compile, and as a CUDA graph of the eager calls. Each
setting is timed side by side with the dense model that runs in the same way. A ratio is the median
of interleaved rounds, with the 95% interval of a median. The op `reduce` is timed beside PyTorch's
own operators. Weights and images are random, since the time does not depend on them.

Parity: the features of each setting against fp64 with the same merged tokens; the error is at most
twice that of dense. The features of each way have a cosine of at least `ALIKE` with those of eager.
What cannot run, or is not alike, has its reason in the table instead of a time.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from benchmarks import bench_reduce
from benchmarks.bench_strategies import compare_with_fp64
from benchmarks.cases import DEVICE, ON_GPU, described, sweep
from benchmarks.comparison import capture_graph, compare
from benchmarks.machine import PACKAGES, provenance
from benchmarks.median_interval import LEAST, median_interval
from benchmarks.parity import OURS, in_fp64, on_device, parity, why_not_compiled, with_compiled
from benchmarks.settings import DENSE, Setting, read_settings
from benchmarks.tables import milliseconds as in_milliseconds
from benchmarks.tables import no_gain, sizes, table
from elip_kernels.testing import Case
from elip_models.profiling.measure import (
    Step,
    milliseconds,
    peak_bytes,
    ratios_to,
    time_side_by_side,
)
from elip_models.profiling.table import DTYPES
from elip_models.saving.files import read_object, write_json
from elip_models.validation import check_output

ALIKE = 0.99
SETTINGS = "merge 0.7, merge 0.5, resize 0.5"
if ON_GPU:
    MODELS, BATCHES, DTYPE_NAMES = ["vit_base_patch16_224"], [1, 64], ["fp16", "bf16"]
else:
    MODELS, BATCHES, DTYPE_NAMES = ["vit_tiny_patch16_224"], [1, 8], ["fp32"]


class Workload(NamedTuple):
    """A timm model in a dtype, and the images of a batch."""

    model: str
    dtype: str
    batch: int


def eager(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """Return the call of the model."""
    return partial(model, images)


def compiled(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """Return the call of the model under torch.compile."""
    return partial(torch.compile(model, fullgraph=True, dynamic=False), images)


def graph(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """Return the replay of a CUDA graph of the model; all calls return the same tensor."""
    features = model(images).clone()
    replay = capture_graph(lambda: lambda: features.copy_(model(images)))

    def call() -> Tensor:
        replay()
        return features

    return call


WAYS = {"eager": eager, "compile": compiled, "CUDA graph": graph}


def ways_left_out() -> dict[str, str]:
    """Return the ways that this machine does not have, and why."""
    reasons = {"compile": why_not_compiled(), "CUDA graph": None if ON_GPU else "no GPU"}
    return {way: reason for way, reason in reasons.items() if reason is not None}


@torch.no_grad()
def measure(
    workload: Workload, settings: str, ways: Sequence[str], rounds: int, advance: Step
) -> dict[str, Any]:
    """Return the results of a workload: its entry in the JSON."""
    dtype = DTYPES[workload.dtype]
    model = timm.create_model(workload.model, num_classes=0).eval().to(DEVICE, dtype)
    size = model.pretrained_cfg["input_size"][1:]
    images = torch.randn(workload.batch, 3, *size, device=DEVICE, dtype=dtype)
    every = read_settings(settings, model)
    rows = [_described(setting, model, images) for setting in every]
    for way in ways:
        timed = _timed(WAYS[way], every, images, rounds)
        for row in rows:
            row["ways"][way] = timed[row["setting"]]
        advance()
    return {**workload._asdict(), "pixels": list(size), "rounds": rounds, "settings": rows}


def _described(setting: Setting, model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Return FLOPs, parity and memory of a setting, without its times."""
    return {
        "setting": setting.text,
        "flops": round(setting.summary.forward_flops, 4),
        "parity": None if setting.text == DENSE else _parity(setting, model),
        "peak_bytes": peak_bytes(partial(setting.model, images), DEVICE) if ON_GPU else None,
        "ways": {},
    }


def _parity(setting: Setting, model: nn.Module) -> dict[str, Any]:
    """Return the errors against fp64, or the reason why they are too large."""
    try:
        return compare_with_fp64(model, {setting.text: setting.summary.strategy})
    except AssertionError as error:
        return {"passed": False, "reason": str(error)}


def _timed(
    way: Callable[[nn.Module, Tensor], Callable[[], Tensor]],
    settings: Sequence[Setting],
    images: Tensor,
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """Return time and ratio of each setting that runs, and the reason of each that does not."""
    torch.compiler.reset()
    steps: dict[str, Step] = {}
    found: dict[str, dict[str, Any]] = {}
    for setting in settings:
        try:
            step = way(setting.model, images)
            cosines = F.cosine_similarity(step().double(), setting.model(images).double())
        except Exception as error:  # compilers raise errors of many types
            found[setting.text] = {"left_out": f"{type(error).__name__}: {error}".splitlines()[0]}
            continue
        if cosines.min() >= ALIKE:
            steps[setting.text] = step
        else:
            reason = f"its features have a cosine of {cosines.min():.4f} with those of eager"
            found[setting.text] = {"left_out": reason}
    if DENSE not in steps:
        return found | {name: {"left_out": "dense did not run"} for name in steps}
    times = time_side_by_side(steps, device=DEVICE, rounds=rounds)
    ratios, medians = ratios_to(DENSE, times, median_interval), milliseconds(times)
    return found | {name: {"ms": medians[name], "ratio": ratios[name]} for name in steps}


@torch.no_grad()
def measure_op(case: Case, rounds: int) -> dict[str, Any]:
    """Return the time of `reduce` beside PyTorch's own operators: its entry in the JSON."""
    inputs, forms = on_device(case.inputs()), bench_reduce.forms_of(case.K)
    exact = forms["official"](*in_fp64(inputs, bench_reduce.IMAGES))
    forms, left_out = with_compiled(forms, case, inputs)
    checked = parity(exact, {name: form(*inputs) for name, form in forms.items()})
    work = bench_reduce.work_of(case, "forward")
    facts, _ = compare(
        forms, inputs, work, direction="forward", rounds=rounds, summary=median_interval
    )
    return {"op": "reduce", **facts, **described(case), "parity": checked, "left_out": left_out}


def report(document: dict[str, Any]) -> str:
    """Return the tables of a document, in Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    commit = document["commit"].get("id", "unknown")[:7]
    about = f"{document['device']}, {document['date']}, commit {commit}; {versions}."
    return "\n\n".join([about, *_models(document), *_ops(document["ops"])])


def _models(document: dict[str, Any]) -> list[str]:
    """Return the table of the models, and the reasons of its dashes."""
    absent = {f"{way}: {reason}" for way, reason in document["left_out"].items()}
    rows = []
    for run in document["runs"]:
        for row in run["settings"]:
            cells = [_cell(row["ways"].get(way), row["setting"] == DENSE) for way in WAYS]
            named = f"`{run['model']}`", run["dtype"], str(run["batch"]), f"`{row['setting']}`"
            rows.append([*named, f"{row['flops']:.2f}", *cells, _mebibytes(row["peak_bytes"])])
            where = f"{run['model']} {run['dtype']} {run['batch']}, {row['setting']}"
            for way, timed in row["ways"].items():
                absent |= {f"{where}, {way}: {timed[key]}" for key in ("left_out",) if key in timed}
            if row["parity"] is not None and not row["parity"]["passed"]:
                absent.add(f"{where}: WRONG, {row['parity']['reason']}")
    header = ["model", "dtype", "batch", "setting", "FLOPs", *WAYS, "peak memory, MiB"]
    note = (
        "Time relative to dense in the same way, with its 95% interval; milliseconds for dense. "
        "Memory is that of an eager call, beyond weights and images."
    )
    return [note, table(header, rows, left=4), *(f"– {reason}" for reason in sorted(absent))]


def _cell(timed: dict[str, Any] | None, is_dense: bool) -> str:
    """Return a time in milliseconds or a ratio with its interval; a dash if there is none."""
    if timed is None or "left_out" in timed:
        return "–"
    return f"{in_milliseconds(timed['ms'])} ms" if is_dense else _ratio(timed["ratio"])


def _ratio(interval: dict[str, float]) -> str:
    """Return a ratio with its interval, marked if it is no gain."""
    verdict = " no gain" if no_gain(interval["mean"]) else ""
    return "{mean:.2f} ({low:.2f} to {high:.2f})".format(**interval) + verdict


def _mebibytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:.0f}"


def _ops(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of the op."""
    others = ("eager", "compiled", "official")
    rows = []
    for entry in entries:
        found = [entry["ratios"].get(name) for name in others]
        ratios = ["–" if interval is None else _ratio(interval) for interval in found]
        ran = "kernel" if entry["kernels"] else "PyTorch"
        ours = in_milliseconds(entry["milliseconds"][OURS])
        possible = f"{100 * entry['possible'][OURS]:.0f}%"
        rows.append([f"`{entry['op']}`, {ran}", sizes(entry), ours, *ratios, possible])
    header = ["op, what ran", "shape", "ms", "vs eager PyTorch", "vs torch.compile"]
    header += ["vs a loop over images", "speed of a copy"]
    return [table(header, rows, left=2)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", nargs="+", default=MODELS, help="of timm (default: %(default)s)")
    add("--batch", nargs="+", type=int, default=BATCHES, help="images (default: %(default)s)")
    add("--dtype", nargs="+", choices=DTYPES, default=DTYPE_NAMES, help="default: %(default)s")
    add("--settings", default=SETTINGS, help="strategy and keep (default: %(default)s)")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: %(default)s")
    add("--rounds", type=int, default=21, help="interleaved (default: %(default)s)")
    add("--output", type=Path, default="gpu.json", metavar="FILE", help="default: %(default)s")
    add("--show", type=Path, metavar="FILE", help="measure nothing; print the table of this JSON")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    if options.show is not None:
        console.print(report(read_object(options.show)), markup=False, highlight=False)
        return 0
    if options.rounds < LEAST:
        parser.error(f"--rounds: expected at least {LEAST}, got {options.rounds}")
    left_out = {way: why for way, why in ways_left_out().items() if way in options.ways}
    ways = [way for way in options.ways if way not in left_out]
    workloads = [
        Workload(model, dtype, batch)
        for model in options.model
        for dtype in options.dtype
        for batch in options.batch
    ]
    cases = sweep("default" if ON_GPU else "smallest")
    try:
        check_output("--output", options.output)
        with Progress(console=console, transient=True) as progress:
            total = len(workloads) * len(ways) + len(cases)
            advance = partial(progress.advance, progress.add_task("measurements", total=total))
            runs = [
                measure(each, options.settings, ways, options.rounds, advance) for each in workloads
            ]
            ops = []
            for case in cases:
                ops.append(measure_op(case, options.rounds))
                advance()
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        parser.error(str(error))
    document = {**provenance((*PACKAGES, "elip-kernels")), "left_out": left_out}
    document |= {"runs": runs, "ops": ops}
    write_json(options.output, document)
    console.print(report(document), markup=False, highlight=False)
    console.print(
        f"\nWrote {options.output}. Attach this file to an issue of the project, and the tables of "
        "the documentation gain your device. It has the name of the device and the versions of "
        "packages, and nothing else of your machine.",
        markup=False,
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
