"""Write the results of README.md: cost and quality of each strategy, from the committed results.

python docs/readme_table.py             # rewrite the block between the two markers
python docs/readme_table.py --check     # exit status 1 if the block is stale

Times of towers come from `benchmarks/results/DEVICE`, the pretrained model from
`benchmarks/results/real`, the accuracy of a trained model from `benchmarks/results/studies`.
"""

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import measured
from benchmarks.marked_block import rewrite
from benchmarks.studies.analysis import against
from benchmarks.studies.results import Document, Interval, by_seed, read_results
from benchmarks.tables import table
from elip_models.profiling.measure import NO_GAIN, no_gain
from elip_models.reduction.flops import DEFAULT_KEEP
from elip_models.reduction.strategies import DEFAULT, STRATEGIES
from elip_models.saving.files import read_object

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
BATCH, THREADS = 8, 2
"""Of the times of the pretrained model."""
TOP1, LOSS = "reduced.top1", "reduced.contrastive_loss"
TASKS = {"top1": "top-1", "text_to_image_r5": "R@5"}
RATES = (0.7, 0.5, 0.35)
SHOWN = ("resize_merge", "resize", "merge", "tome", "evit", "elip", "random")
PICTURE = (
    "![A photograph of a pagoda by a lake, then the same picture as 127 and as 11 areas of one "
    "colour](docs/merged_tokens.png)\n\n"
    "*What `tome` merges: a DINOv2 ViT-S/14 with `keep=0.5` begins with 256 "
    "tokens, one for each patch of the photograph. Patches that were merged into one token have "
    "their mean colour, and may be apart. Photograph by "
    "[danielbuechele](https://www.flickr.com/photos/danielbuechele/6061409035), "
    "[CC BY 2.0](https://creativecommons.org/licenses/by/2.0/), cropped and coloured. "
    "`python -m benchmarks.real.picture` draws it.*"
)


class OutdatedText(Exception):
    """A sentence of this script is not true for the results."""


def block(results: Path) -> str:
    """Return the result in a sentence, a picture, the table and its explanation, and findings."""
    tasks = read_object(results / "real" / "tasks_test.json")
    quality = read_results(results / "studies" / "quality.json")
    return "\n\n".join(
        [
            in_a_sentence(tasks),
            PICTURE,
            note(tasks),
            strategy_table(tasks),
            "\n".join(f"- {line}" for line in findings(quality, results)),
        ]
    )


def rows_by_setting(tasks: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the results by setting, with the time of each."""
    run = next(
        run for run in tasks["time"]["runs"] if (run["batch"], run["threads"]) == (BATCH, THREADS)
    )
    return {
        row["setting"]: row | {"time": run["ratios"][row["setting"]]} for row in tasks["settings"]
    }


def in_a_sentence(tasks: dict[str, Any]) -> str:
    """Return what the default setting saves and costs."""
    row = rows_by_setting(tasks)[f"{DEFAULT.name} {DEFAULT_KEEP}"]
    photographs = tasks["photographs"]
    return (
        f"**By default, `reduce_` applies `{DEFAULT.name}` with `keep={DEFAULT_KEEP}`. A "
        f"pretrained DINOv2 ViT-S, not trained further, then takes {row['time']:.2f} of the dense "
        f"time ({row['flops']:.2f} of the FLOPs; batch {BATCH}, {tasks['time']['device']}). The "
        "top-1 accuracy of a linear probe changes by "
        f"{points(row['difference']['top1'])} points, R@5 of text-image retrieval by "
        f"{points(row['difference']['text_to_image_r5'])}** (95% intervals over "
        f"{photographs['clothes']['measured']} and {photographs['flickr8k']['measured']} "
        "photographs)."
    )


def points(interval: dict[str, float]) -> str:
    """Return '−1.4 (−3.5 to 0.8)' in points."""
    mean, low, high = (100 * interval[end] for end in ("mean", "low", "high"))
    return f"{mean:+.1f} ({low:.1f} to {high:.1f})".replace("-", "−")


def note(tasks: dict[str, Any]) -> str:
    """Return the explanation of the table."""
    dense, photographs = tasks["dense"], tasks["photographs"]
    errors = [
        100 * (row["difference"][task]["high"] - row["difference"][task]["low"]) / 2
        for row in tasks["settings"]
        for task in TASKS
    ]
    return (
        f"Points that {tasks['model'].split(',')[0]} loses or gains against dense, without "
        f"training: **top-1** of a linear probe of dense features on "
        f"{photographs['clothes']['measured']} photographs of clothes (dense: "
        f"{100 * dense['top1']['mean']:.1f}), and **R@5** of text-to-image retrieval among "
        f"{photographs['flickr8k']['measured']} photographs of Flickr8k (dense: "
        f"{100 * dense['text_to_image_r5']['mean']:.1f}). The 95% intervals reach at most "
        f"{max(errors):.1f} points to each side ([all results](docs/real_model.md)). **Time** is "
        f"relative to dense at batch {BATCH}, {THREADS} threads, {tasks['time']['device']}. `elip` "
        "has no text here and selects by the image alone."
    )


def strategy_table(tasks: dict[str, Any]) -> str:
    """Return points of top-1 and R@5, and the time, of each strategy at each rate."""
    settings = rows_by_setting(tasks)
    rows = [
        [f"`{name}`", STRATEGIES[name].summary]
        + [cell(settings.get(f"{name} {keep}")) for keep in RATES]
        for name in SHOWN
    ]
    header = ["top-1, R@5 (time)", "", *(f"`keep={keep}`" for keep in RATES)]
    return table(header, rows, left=2)


def cell(row: dict[str, Any] | None) -> str:
    """Return '−0.3, −1.1 (0.71)', or a dash."""
    if row is None:
        return "–"
    gaps = (f"{100 * row['difference'][task]['mean']:+.1f}" for task in TASKS)
    return f"{', '.join(gaps)} ({row['time']:.2f})".replace("-", "−")


def strategy_entries(results: Path, direction: str) -> list[dict[str, Any]]:
    """Return the entries that compare strategies in a direction, in the order of the file."""
    return [
        entry
        for device in measured.read_results(results)
        for entry in device.entries
        if "strategies" in entry and entry["direction"] == direction
    ]


def batch_size(entry: dict[str, Any]) -> int:
    """Return the batch size of an entry."""
    return entry["shape"]["B"]


def is_reduced(entry: dict[str, Any], name: str) -> bool:
    """Return whether a strategy needs fewer FLOPs than the dense model in this direction."""
    return entry["strategy_flops"][name] < 1


def findings(quality: Document, results: Path) -> list[str]:
    """Return what the results show, a line each."""
    gap = against(quality, "dense", (TOP1, LOSS))["tome", TOP1]
    if gap.is_significant:
        raise OutdatedText(f"{__file__}: expected no significant difference of `tome`, got {gap}")
    return [
        single_images(results),
        "**Training with `tome`.** The top-1 accuracy of a tiny CLIP, trained further on generated "
        f"scenes at {trained_cost(quality):.2f} of the dense FLOPs, shows no significant "
        f"difference from dense: {interval(gap, TOP1, ' points', '95% CI ')}, {gap.seeds} seeds, "
        f"80% power for {100 * gap.detectable:.1f} points ([study](docs/study.md)).",
    ]


def trained_cost(quality: Document) -> float:
    """Return the FLOPs of a training step of `tome` relative to dense, mean over seeds."""
    return fmean(by_seed(quality, "tome", "step_flops").values())


def single_images(results: Path) -> str:
    """Return which strategies save no time in inference at the smallest batch.

    Raises:
        OutdatedText: `tome` saves time there, or `evit` does not.
    """
    entry = min(strategy_entries(results, "inference"), key=batch_size)
    measured = [name for name in STRATEGIES if name in entry["ratios"] and is_reduced(entry, name)]
    slow = [name for name in measured if no_gain(entry["ratios"][name])]
    if "tome" not in slow or "evit" in slow:
        raise OutdatedText(f"{__file__}: expected `tome` without gain and `evit` with one")
    return (
        f"**Inference at batch {batch_size(entry)}.** {in_words(slow)} give no gain (a ratio above "
        f"{NO_GAIN}) for `{entry['op']}` at {entry['strategy_flops']['tome']:.2f} of the dense "
        f"FLOPs, on {entry['device']}. For single images measure `evit`, which takes "
        f"{entry['ratios']['evit']:.2f} of the dense time there."
    )


def in_words(names: list[str]) -> str:
    """Return '`a`, `b` and `c`'."""
    quoted = [f"`{name}`" for name in names]
    return " and ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]]))


def signed(value: float, metric: str, sign: str = "+") -> str:
    """Return a difference with its sign, in points for top-1."""
    scale, digits = (100, 1) if metric == TOP1 else (1, 3)
    return f"{scale * value:{sign}.{digits}f}".replace("-", "−")


def interval(gap: Interval, metric: str, unit: str = "", label: str = "") -> str:
    """Return '+0.4 (−1.5 to 2.3)', in bold if the interval excludes zero."""
    half = gap.half or 0.0
    low, high = (signed(value, metric, "-") for value in (gap.mean - half, gap.mean + half))
    text = f"{signed(gap.mean, metric)}{unit} ({label}{low} to {high})"
    return f"**{text}**" if gap.is_significant else text


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if the page has no markers, or is stale under --check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(arguments)
    text, command = block(options.results), "python docs/readme_table.py"
    return rewrite(options.page, BEGIN, END, text, command=command, check=options.check)


if __name__ == "__main__":
    raise SystemExit(main())
