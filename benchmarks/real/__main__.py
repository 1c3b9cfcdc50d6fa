"""Measure what token reduction keeps of DINOv2's features of photographs.

    python -m benchmarks.real FOLDER [--names SPLIT.txt] [--settings "tome 0.7, evit 0.5"]
    python -m benchmarks.real FOLDER [--names SPLIT.txt] --output X.json --time

The first command measures quality; docs/real_model.md explains the columns. The second adds the
time of each setting in X.json relative to dense. Run it while nothing else runs.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.real import dinov2
from benchmarks.real.dinov2 import batches, photograph_paths
from benchmarks.real.evaluation import (
    MEASURES,
    SETTINGS,
    TITLE,
    Setting,
    dense_setting,
    evaluate,
    measured_on,
    onnx_error,
    read_settings,
    rows,
)
from elip_models.profiling.measure import milliseconds, ratios_to, time_side_by_side
from elip_models.saving.files import read_object, write_json
from elip_models.validation import check_output

CHECKED = 8
"""Photographs that are compared with onnxruntime, and that a timed batch has."""
THREADS = (1, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console()
    try:
        check_output("--output", options.output)
        paths = photograph_paths(options.folder, options.names)
        if options.time:
            document = _timed_document(options, paths, console)
        else:
            document = _document(options, paths, console)
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    console.print(_table(document))
    if options.output is not None:
        write_json(options.output, document)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="a folder of JPEG or PNG files")
    add("--names", type=Path, help="a file with the names to use, one a line, in their order")
    add("--images", type=int, default=300, help="photographs of a set (default: %(default)s)")
    add("--sets", type=int, default=1, help="disjoint sets of photographs (default: %(default)s)")
    add("--settings", default=SETTINGS, help="strategies and keep (default: %(default)s)")
    add("--against", metavar="SETTING", help="add differences from this setting, paired by image")
    add("--seed", type=int, default=0, help="of strategies that draw (default: %(default)s)")
    add("--output", type=Path, metavar="X.json", help="write the results to this file")
    add("--time", action="store_true", help="measure times alone, and add them to --output")
    add("--rounds", type=int, default=11, help="with --time, interleaved (default: %(default)s)")
    return parser


def _document(
    options: argparse.Namespace, paths: Sequence[Path], console: Console
) -> dict[str, Any]:
    """Return the results of all settings."""
    sets = _sets(paths, options.images, options.sets)
    model = dinov2.timm_model()
    settings = read_settings(options.settings, model)
    if options.against not in (None, *(setting.text for setting in settings)):
        raise ValueError(f"against: expected one of the settings, got {options.against!r}")
    used = [path for paths in sets for path in paths]
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=len(used) * (1 + len(settings)))
        advance = partial(bar.advance, task)
        values = evaluate(model, settings, sets, seed=options.seed, advance=advance)
    return {
        **measured_on(),
        "model": TITLE,
        "photographs": {
            "names": options.names.name if options.names else None,
            "images": options.images,
            "sets": options.sets,
            "sha256": hashlib.sha256("\n".join(path.name for path in used).encode()).hexdigest(),
        },
        "seed": options.seed,
        "onnxruntime": onnx_error(model, used[:CHECKED]),
        "against": options.against,
        "settings": rows(settings, values, options.against),
    }


def _sets(paths: Sequence[Path], images: int, sets: int) -> list[Sequence[Path]]:
    """Return disjoint sets of photographs, in the order of `paths`."""
    if min(images, sets) < 1 or images * sets > len(paths):
        raise ValueError(
            f"images: expected sets of 1 to {len(paths)} photographs in all, as many as there are, "
            f"got {sets} of {images}"
        )
    return [paths[i * images : (i + 1) * images] for i in range(sets)]


def _timed_document(
    options: argparse.Namespace, paths: Sequence[Path], console: Console
) -> dict[str, Any]:
    """Return the results in `--output` with times."""
    if options.output is None:
        raise ValueError("time: expected --output, the results to add times to, got none")
    document = read_object(options.output)
    model = dinov2.timm_model()
    texts = ", ".join(row["setting"] for row in document["settings"])
    settings = [dense_setting(model), *read_settings(texts, model)]
    (images,) = batches(paths[:CHECKED])
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("runs", total=len(THREADS) * len(settings) * (1 + options.rounds))
        advance = partial(bar.advance, task)
        threads = _times(settings, images, options.rounds, advance)
    measured = {**measured_on(), "batch": len(images), "rounds": options.rounds}
    del measured["threads"]
    return document | {"time": measured | {"by_threads": threads}}


@torch.no_grad()
def _times(
    settings: Sequence[Setting], images: torch.Tensor, rounds: int, advance: Any
) -> dict[str, Any]:
    """Return milliseconds, and ratios to dense of the same round, by number of threads."""
    steps = {each.text: partial(each.model, images) for each in settings}
    found, before = {}, torch.get_num_threads()
    for threads in THREADS:
        torch.set_num_threads(threads)
        device = images.device
        times = time_side_by_side(steps, device=device, rounds=rounds, progress=advance)
        ratios = {name: round(each, 4) for name, each in ratios_to("dense", times).items()}
        found[str(threads)] = {"milliseconds": milliseconds(times), "ratios": ratios}
    torch.set_num_threads(before)
    return found


def _table(document: dict[str, Any]) -> Table:
    """Return means and intervals, and times if they were measured."""
    times = document.get("time", {}).get("by_threads", {})
    shown = Table("setting", "FLOPs", *MEASURES, *(f"time, {n} threads" for n in times))
    shown.columns[0].overflow = "fold"
    for row in document["settings"]:
        cells = [_cell(row[name]) for name in MEASURES]
        ratios = [f"{each['ratios'][row['setting']]:.2f}" for each in times.values()]
        shown.add_row(row["setting"], f"{row['flops']:.2f}", *cells, *ratios)
        if "difference" in row:
            cells = [_cell(row["difference"][name]) for name in MEASURES]
            shown.add_row(f"  minus {document['against']}", "", *cells)
    return shown


def _cell(interval: dict[str, float] | None) -> str:
    if interval is None:
        return "–"
    return f"{interval['mean']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"


if __name__ == "__main__":
    sys.exit(main())
