"""Write tables and charts of docs/appendix.md from the committed results.

    python -m benchmarks.plot [--results DIR] [--page PAGE] [--check]

Reads DIR/<device>/bench*.json, which `pytest benchmarks/ --benchmark-only --benchmark-json=FILE`
writes. Raises an error and writes nothing if parity failed or was not checked, if a run failed or
stopped early, or if the commit is unknown or there are fewer than ten rounds.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib

from benchmarks.marked_block import Block, rewrite
from benchmarks.measured import Refused, Results, read_results
from benchmarks.parity import OURS
from benchmarks.tables import device_tables, has_chart, op_page, tower
from elip_models.analysis.chart_style import GREY, METADATA, STYLE, write_figure
from elip_models.saving.files import write_file

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]

FORMS = {  # form or scorer: colour, marker
    "official": ("#d55e00", "s"),
    "eager": ("#e69f00", "^"),
    "exact": ("#e69f00", "^"),
    "compiled": ("#56b4e9", "v"),
    "cls": ("#56b4e9", "v"),
    OURS: ("#009e73", "o"),
    "last": ("#009e73", "o"),
}
Rows = dict[str, dict[str, float]]


def write(device: Results, docs: Path) -> list[Path]:
    """Write the charts of a device and the page of its ops; return their paths."""
    page = op_page(device)
    if page is None:
        return draw(device, docs)
    path = docs / f"{device.slug}-ops.md"
    path.parent.mkdir(exist_ok=True)
    write_file(path, page.encode())
    return [*draw(device, docs), path]


def sections(results: list[Results]) -> Iterator[str]:
    """Yield the tables of each run, below one heading for each device."""
    for device, runs in groupby(results, lambda run: run.machine["device"]):
        yield f"### {device}"
        yield from map(device_tables, runs)


def stale_files(results: list[Results], docs: Path) -> list[Path]:
    """Return the files of `write` that are missing in `docs` or differ."""
    with TemporaryDirectory() as folder:
        drawn = [path for device in results for path in write(device, Path(folder))]
        pages = [(path.read_bytes(), docs / path.name) for path in drawn]
        return [p for wanted, p in pages if not p.is_file() or p.read_bytes() != wanted]


def draw(results: Results, folder: Path) -> list[Path]:
    """Write <slug>-towers.svg and <slug>-ops.svg if `has_chart` is true; return their paths."""
    folder.mkdir(exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE):
        for kind, panels_of in (("towers", tower_panels), ("ops", op_panels)):
            if has_chart(kind, results.entries):
                panels = panels_of(results.entries)
                figure = plot(panels, f"{kind} on {results.machine['device']}")
                paths.append(folder / f"{results.slug}-{kind}.svg")
                write_figure(figure, paths[-1], bbox_inches="tight", metadata=METADATA)
                plt.close(figure)
    return paths


def tower_panels(entries: list[dict[str, Any]]) -> dict[str, Rows]:
    """Return times relative to dense by case, for training and inference."""
    panels: dict[str, Rows] = {}
    for entry in entries:
        if "flops" in entry:
            rows = panels.setdefault(f"{entry['direction']} time, dense = 1", {})
            rows[tower(entry)] = entry["ratios"]
    return panels


def op_panels(entries: list[dict[str, Any]]) -> dict[str, Rows]:
    """Return the time of each op at its largest shape, relative to a copy of the bytes it moves."""
    largest: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name = f"{entry['op']} {entry.get('direction')}"
        if "possible" in entry and entry["bytes"] > largest.get(name, {"bytes": 0})["bytes"]:
            largest[name] = entry
    rows = {
        name: {form: 1 / share for form, share in entry["possible"].items() if form in FORMS}
        for name, entry in largest.items()
    }
    return {"time, copy of the bytes that the op must move = 1": rows} if rows else {}


def plot(panels: dict[str, Rows], title: str) -> plt.Figure:
    """Draw one row per case with a marker per form; panels share the cases."""
    count = max(map(len, panels.values()))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(9, 1.1 + 0.3 * count), sharex=True, sharey=True, squeeze=False
    )
    for axis, (label, rows) in zip(axes[0], panels.items(), strict=True):
        values = [value for row in rows.values() for value in row.values()]
        for form, (colour, marker) in FORMS.items():
            points = [(row[form], i) for i, row in enumerate(rows.values()) if form in row]
            if points:
                axis.plot(*zip(*points, strict=True), marker, color=colour, label=form)
        axis.axvline(1.0, color=GREY, linewidth=1)
        axis.grid(axis="y", color=GREY, alpha=0.3)
        axis.set_xlabel(label)
        axis.set_yticks(range(len(rows)), list(rows))
        if max(values) > 4:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
    axes[0, 0].invert_yaxis()
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.55 / figure.get_figheight()))
    figure.suptitle(title, color=GREY, fontsize=10)
    below = (0.5, 1 - 0.25 / figure.get_figheight())
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="upper center", bbox_to_anchor=below, ncols=5, frameon=False)
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if results are refused or, with --check, if a file is stale."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "appendix.md")
    parser.add_argument("--check", action="store_true", help="only report stale files")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.results)
    except Refused as reason:
        sys.stderr.write(f"refused: {reason}\n")
        return 1
    text = "\n\n".join(sections(results)) or "No results are committed yet."
    command, docs = "python -m benchmarks.plot", options.page.parent
    block = Block(options.page, "benchmarks", text)
    status = rewrite(block, command=command, check=options.check)
    if options.check:
        for path in (stale := stale_files(results, docs)):
            sys.stderr.write(f"{path} is missing or stale: run {command}\n")
        return int(bool(status or stale))
    if status == 0:
        for device in results:
            write(device, docs)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
