"""Write the results of README.md: cost and quality of each strategy, from the committed results.

python docs/readme_table.py             # rewrite the block between the two markers
python docs/readme_table.py --check     # exit status 1 if the block is stale

Costs come from `benchmarks/results/DEVICE`, quality from `benchmarks/results/studies`.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import measured
from benchmarks.studies.results import Document, Interval, by_seed, difference, read_results
from elip_models.profiling.measure import no_gain

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
DIRECTIONS = ("training", "inference")
TOP1, LOSS = "reduced.top1", "reduced.contrastive_loss"
ARMS = {  # strategy: arm of the study `quality`, and what the strategy does
    "tome": ("tome", "merges similar tokens in every block"),
    "guided_tome": ("guided-tome", "as `tome`, but patches with high CLS attention merge last"),
    "pitome": ("pitome", "merges patches that are similar to many others"),
    "crossget": ("crossget", "merges similar patches with low CLS attention"),
    "evit": ("evit", "keeps the patches with high CLS attention, in three blocks"),
    "elip": ("last", "the paper's stages, text-guided, with the cheap scorer `last`"),
    "trips": ("trips", "selects patches by the text alone"),
    "adaptive": ("adaptive", "keeps 90% of the attention of each image"),
    "random": ("random", "keeps random patches: the control"),
    "patch_dropout": ("patch-dropout", "drops random patches, in training only"),
    "resize": ("resize", "a smaller image: the other control"),
}


def block(results: Path) -> str:
    """Return the table, the note above it and the sentences below it."""
    quality = read_results(results / "studies" / "quality.json")
    later = read_results(results / "studies" / "reduced_later.json")
    columns = time_columns(results)
    gaps = {
        name: {metric: difference(quality, arm, "dense", metric) for metric in (TOP1, LOSS)}
        for name, (arm, _) in ARMS.items()
    }
    header = ["strategy", "what it does", "FLOPs", *(title for title, _ in columns)]
    header += ["top-1, points", "contrastive loss"]
    rows = []
    for name in sorted(ARMS, key=lambda name: gaps[name][LOSS].mean):
        cells = [f"`{name}`", ARMS[name][1], f"{columns[0][1]['strategy_flops'][name]:.2f}"]
        cells += [time_cell(entry["ratios"].get(name)) for _, entry in columns]
        rows.append([*cells, *(interval(gaps[name][metric], metric) for metric in (TOP1, LOSS))])
    rule = ["---"] * 2 + ["--:"] * (len(header) - 2)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])
    return "\n\n".join([note(quality, columns), table, sentences(quality, later)])


def time_columns(results: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return title and entry of the largest batch, by device and direction, training first."""
    columns = []
    for device in measured.read_results(results):
        entries = [entry for entry in device.entries if "strategies" in entry]
        for direction in DIRECTIONS:
            found = [entry for entry in entries if entry["direction"] == direction]
            if found:
                entry = max(found, key=lambda entry: entry["shape"]["B"])
                columns.append((f"{direction} time", entry))
    return columns


def time_cell(ratio: float | None) -> str:
    """Return a time ratio, "no gain" if it is one, or a dash if it was not measured."""
    if ratio is None:
        return "–"
    return f"{ratio:.2f}" + (" no gain" if no_gain(ratio) else "")


def note(quality: Document, columns: list[tuple[str, dict[str, Any]]]) -> str:
    """Return what the table shows: devices, models, sizes and seeds."""
    devices = list(dict.fromkeys(entry["device"] for _, entry in columns))
    batches = ", ".join(f"{title} at batch {entry['shape']['B']}" for title, entry in columns)
    model, shape = columns[0][1]["op"], columns[0][1]["shape"]
    costs = [
        cost for arm, _ in ARMS.values() for cost in by_seed(quality, arm, "step_flops").values()
    ]
    return (
        "Everything is relative to the dense model. **FLOPs and times** are ratios, measured with "
        f"`{model}`, {shape['image']} px, {columns[0][1]['dtype']}, on {' and '.join(devices)} "
        f"({batches}; FLOPs of a training step). **Quality** is measured with a tiny CLIP on "
        f"generated scenes, trained further at {min(costs):.2f} to {max(costs):.2f} of the dense "
        f"FLOPs: paired differences over {count_seeds(quality)} seeds with their 95% confidence "
        "intervals. Bold: the interval excludes zero. High top-1 and low loss are good."
    )


def sentences(quality: Document, later: Document) -> str:
    """Return the comparison at equal FLOPs, and the results without training, as bullet points."""
    lines = [
        "- Compared with a shorter dense training that uses the same FLOPs, "
        + verdict(quality, "tome", "dense-short")
    ]
    for share in ("0.50", "0.30"):
        lines.append(
            f"- Without any training after the reduction, at {share} of the FLOPs, "
            + verdict(later, f"tome-{share}", "dense")
        )
    return "\n".join(lines)


def verdict(document: Document, arm: str, reference: str) -> str:
    """Return a sentence about ToMe: significant or not, in top-1 and in the loss."""
    top1, loss = (difference(document, arm, reference, metric) for metric in (TOP1, LOSS))
    is_worse = top1.verdict == "below" or loss.verdict == "above"
    is_better = top1.verdict == "above" or loss.verdict == "below"
    words = {(True, False): "is significantly worse", (False, True): "is significantly better"}
    word = words.get((is_worse, is_better), "shows no significant difference")
    points = interval(top1, TOP1, " points", "95% CI ")
    return f"`tome` {word}: top-1 {points}, loss {interval(loss, LOSS, label='95% CI ')}."


def interval(gap: Interval, metric: str, unit: str = "", label: str = "") -> str:
    """Return '+0.4 (−1.5 to 2.3)', in bold if the interval excludes zero."""
    scale, digits = (100, 1) if metric == TOP1 else (1, 3)
    mean, half = scale * gap.mean, scale * (gap.half or 0.0)
    text = f"{mean:+.{digits}f}{unit} ({label}{mean - half:.{digits}f} to {mean + half:.{digits}f})"
    text = text.replace("-", "−")
    return f"**{text}**" if gap.verdict in ("above", "below") else text


def count_seeds(document: Document) -> int:
    """Return how many seeds the runs of a study have."""
    return len({run["seed"] for run in document["runs"]})


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if the page has no markers, or is stale under --check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(arguments)
    current = options.page.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not pattern.search(current):
        sys.stderr.write(f"{options.page}: expected {BEGIN} and {END} in it, got neither\n")
        return 1
    text = f"{BEGIN}\n\n{block(options.results)}\n\n{END}"
    wanted = pattern.sub(lambda _: text, current, count=1)
    if options.check and wanted != current:
        sys.stderr.write(f"{options.page} is stale: run python docs/readme_table.py\n")
        return 1
    if wanted != current:
        options.page.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
