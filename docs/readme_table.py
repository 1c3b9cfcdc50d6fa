"""Write the results of README.md: cost and quality of each strategy, from the committed results.

python docs/readme_table.py             # rewrite the block between the two markers
python docs/readme_table.py --check     # exit status 1 if the block is stale

Costs come from `benchmarks/results/DEVICE`, quality from `benchmarks/results/studies`.
"""

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import measured
from benchmarks.marked_block import rewrite
from benchmarks.studies.results import Document, Interval, by_seed, difference, read_results
from elip_models.profiling.measure import NO_GAIN, no_gain

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
    "elip": ("last", "the paper's stages, text-guided, with the fast scorer `last`"),
    "trips": ("trips", "selects patches by the text alone"),
    "adaptive": ("adaptive", "keeps 90% of the attention of each image"),
    "random": ("random", "control: random patches"),
    "patch_dropout": ("patch-dropout", "drops random patches, in training only"),
    "resize": ("resize", "control: a smaller image"),
}
PICTURE = (
    "![A photograph of a pagoda by a lake, then the same picture as 127 and as 11 areas of one "
    "colour](docs/merged_tokens.png)\n\n"
    "*What the default strategy, ToMe, merges: a DINOv2 ViT-S/14 with `keep=0.5` begins with 256 "
    "tokens, one for each patch of the photograph. Patches that were merged into one token have "
    "their mean colour, and may be apart. Photograph by "
    "[danielbuechele](https://www.flickr.com/photos/danielbuechele/6061409035), "
    "[CC BY 2.0](https://creativecommons.org/licenses/by/2.0/), cropped and coloured. "
    "`python -m benchmarks.real.picture` draws it.*"
)
Gaps = dict[str, dict[str, Interval]]  # by strategy and metric: its difference from dense


class OutdatedText(Exception):
    """A sentence of this script is not true for the results."""


def block(results: Path) -> str:
    """Return the result in a sentence, a picture, the table and its explanation, and findings."""
    quality = read_results(results / "studies" / "quality.json")
    later = read_results(results / "studies" / "reduced_later.json")
    columns = time_columns(results)
    gaps = {
        name: {metric: difference(quality, arm, "dense", metric) for metric in (TOP1, LOSS)}
        for name, (arm, _) in ARMS.items()
    }
    header = [
        "strategy",
        "what it does",
        "training FLOPs (ViT-S)",
        *(title for title, _ in columns),
    ]
    header += ["change in top-1 (points)", "change in loss"]
    rows = []
    for name in sorted(ARMS, key=lambda name: gaps[name][LOSS].mean):
        cells = [f"`{name}`", ARMS[name][1], f"{columns[0][1]['strategy_flops'][name]:.2f}"]
        cells += [time_cell(entry, name) for _, entry in columns]
        rows.append([*cells, *(interval(gaps[name][metric], metric) for metric in (TOP1, LOSS))])
    rule = ["---"] * 2 + ["--:"] * (len(header) - 2)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])
    return "\n\n".join(
        [
            in_a_sentence(columns, gaps),
            PICTURE,
            note(quality, columns, gaps),
            table,
            findings(quality, later, gaps, results),
        ]
    )


def in_a_sentence(columns: list[tuple[str, dict[str, Any]]], gaps: Gaps) -> str:
    """Return what the default strategy saves and costs.

    Raises:
        OutdatedText: a change in quality is significant.
    """
    gap = gaps["tome"][TOP1]
    if any(each.is_significant for each in gaps["tome"].values()):
        raise OutdatedText(f"{__file__}: expected no significant change by `tome`")
    times = " and ".join(
        f"{entry['ratios']['tome']:.2f} of the {title}" for title, entry in columns
    )
    flops = columns[0][1]["strategy_flops"]["tome"]
    return (
        f"**At {flops:.2f} of the training FLOPs, the default strategy `tome` takes {times} of a "
        "dense ViT-S. A tiny CLIP trained with it shows no significant difference in top-1 "
        f"accuracy: {interval(gap, TOP1, ' points', '95% CI ')}, {gap.seeds} seeds.**"
    )


def strategy_entries(results: Path, direction: str) -> list[dict[str, Any]]:
    """Return the entries that compare strategies in a direction, in the order of the file."""
    return [
        entry
        for device in measured.read_results(results)
        for entry in device.entries
        if "strategies" in entry and entry["direction"] == direction
    ]


def time_columns(results: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return title and entry of the largest batch in each direction, training first."""
    found = {direction: strategy_entries(results, direction) for direction in DIRECTIONS}
    return [
        (f"{direction} time", max(entries, key=batch_size))
        for direction, entries in found.items()
        if entries
    ]


def batch_size(entry: dict[str, Any]) -> int:
    """Return the batch size of an entry."""
    return entry["shape"]["B"]


def is_reduced(entry: dict[str, Any], name: str) -> bool:
    """Return whether a strategy needs fewer FLOPs than the dense model in this direction."""
    return entry["strategy_flops"][name] < 1


def time_cell(entry: dict[str, Any], name: str) -> str:
    """Return a time ratio with "no gain" if it is one, or a dash if it was not measured."""
    ratio = entry["ratios"].get(name)
    if ratio is None:
        return "–"
    if not is_reduced(entry, name):
        return "1 (not reduced)"
    return f"{ratio:.2f}" + (" no gain" if no_gain(ratio) else "")


def note(quality: Document, columns: list[tuple[str, dict[str, Any]]], gaps: Gaps) -> str:
    """Return the explanation of the columns: models, devices, sizes, metrics and seeds."""
    devices = list(dict.fromkeys(entry["device"] for _, entry in columns))
    batches = ", ".join(f"{title} at batch {batch_size(entry)}" for title, entry in columns)
    entry = columns[0][1]
    costs = [
        cost for arm, _ in ARMS.values() for cost in by_seed(quality, arm, "step_flops").values()
    ]
    top1, loss = (fmean(by_seed(quality, "dense", metric).values()) for metric in (TOP1, LOSS))
    found = [(metric, gap.verdict) for gap in gaps.values() for metric, gap in gap.items()]
    worse = {(TOP1, "below"), (LOSS, "above")}
    significant = {each for each in found if each[1] in ("above", "below")}
    always = " (here always worse)" if significant <= worse else ""
    return "\n".join(
        [
            "Every strategy was set to nearly the same training FLOPs and compared with the dense "
            "model. Cost and quality were measured with different models:",
            "",
            f"- **FLOPs and time** are ratios to the dense `{entry['op']}`, "
            f"{entry['shape']['image']} px, {entry['dtype']}, on {' and '.join(devices)}: "
            f'{batches}. "No gain" means a time ratio above {NO_GAIN}.',
            "- **Quality** is that of a tiny CLIP, trained on generated scenes. Its training was "
            f"continued with each strategy, and without one (dense), with {count_seeds(quality)} "
            "seeds. Top-1 is the share of held-out images and texts whose own pair ranks first "
            "among 100 pairs; in that evaluation the images are reduced too (not by "
            "`patch_dropout`), and no text guides them. The dense model has a "
            f"top-1 of {top1:.1%} and a contrastive loss of {loss:.2f}. The table gives the mean "
            "change from dense and its 95% confidence interval (CI).",
            f"- The tiny CLIP was trained at {min(costs):.2f} to {max(costs):.2f} of the dense "
            f"FLOPs, the other model at {cost_range(entry)}: the two studies had different "
            "targets, and FLOPs change in steps of whole patches.",
            f"- **Bold**: significantly different from dense{always}. Rows are in the order of "
            "the change in loss, the lowest first.",
        ]
    )


def cost_range(entry: dict[str, Any]) -> str:
    """Return '0.70 to 0.72', the FLOPs of all strategies of an entry."""
    costs = [entry["strategy_flops"][name] for name in ARMS]
    return f"{min(costs):.2f} to {max(costs):.2f}"


def findings(quality: Document, later: Document, gaps: Gaps, results: Path) -> str:
    """Return what the results show, as bullet points."""
    lines = [
        conclusion(quality, gaps),
        single_images(results),
        "**`tome` against a shorter dense training with the same FLOPs.** "
        + verdict(quality, "tome", "dense-short"),
    ]
    for share in ("0.50", "0.30"):
        lines.append(
            f"**`tome` at {share} of the inference FLOPs, not trained further, against dense.** "
            + verdict(later, f"tome-{share}", "dense")
        )
    return "\n".join(f"- {line}" for line in lines)


def conclusion(quality: Document, gaps: Gaps) -> str:
    """Return which strategies keep the quality of the dense model.

    Raises:
        OutdatedText: the results do not support the sentences.
    """
    loss = {name: gap[LOSS] for name, gap in gaps.items()}
    order = sorted(loss, key=lambda name: loss[name].mean)
    best = order[:3]
    unclear = [name for name in order[3:] if not loss[name].is_significant]
    control = difference(quality, ARMS["elip"][0], ARMS["random"][0], LOSS)
    holds = (
        "tome" in best
        and not any(loss[name].is_significant for name in best)
        and max(upper(loss[name]) for name in best) < min(upper(loss[name]) for name in unclear)
        and control.verdict == "not significant"
        and control.mean > 0
    )
    if not holds:
        raise OutdatedText(f"{__file__}: expected the results to fit `conclusion`; rewrite it")
    excluded, allowed = (max(upper(loss[name]) for name in names) for names in (best, unclear))
    return (
        f"**Which strategy?** Begin with `tome`, the default. {in_words(best)} have the smallest "
        "change in loss of this tiny model; it is not significant, and their intervals exclude an "
        f"increase above {excluded:.3f}. {in_words(unclear)} show no significant change in loss "
        f"either, but their intervals allow an increase of up to {allowed:.3f}. `elip` is not "
        "better than the control `random` here: its loss differs by "
        f"{interval(control, LOSS, label='95% CI ')}."
    )


def single_images(results: Path) -> str:
    """Return which strategies save no time in inference at the smallest batch.

    Raises:
        OutdatedText: `tome` saves time there, or `evit` does not.
    """
    entry = min(strategy_entries(results, "inference"), key=batch_size)
    slow = [name for name in ARMS if is_reduced(entry, name) and no_gain(entry["ratios"][name])]
    if "tome" not in slow or "evit" in slow:
        raise OutdatedText(f"{__file__}: expected `tome` without gain and `evit` with one")
    return (
        f"**Inference at batch {batch_size(entry)}.** {in_words(slow)} give no gain on this "
        f"machine. For single images measure `evit`, which takes {entry['ratios']['evit']:.2f} of "
        "the dense time."
    )


def in_words(names: list[str]) -> str:
    """Return '`a`, `b` and `c`'."""
    quoted = [f"`{name}`" for name in names]
    return " and ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]]))


def verdict(document: Document, arm: str, reference: str) -> str:
    """Return one sentence about top-1 and one about the loss, a significant change first."""
    gaps = {metric: difference(document, arm, reference, metric) for metric in (TOP1, LOSS)}
    order = sorted(gaps, key=lambda metric: not gaps[metric].is_significant)
    return " ".join(judged(gaps[metric], metric) for metric in order)


def judged(gap: Interval, metric: str) -> str:
    """Return a sentence: how much a metric changed, and whether that is significant."""
    label, unit = ("Top-1", " points") if metric == TOP1 else ("The loss", "")
    if gap.is_significant:
        direction = "higher" if gap.mean > 0 else "lower"
        return f"{label} is significantly {direction}: {interval(gap, metric, unit, '95% CI ')}."
    mean, low, high = (
        signed(value, metric) for value in (gap.mean, gap.mean - gap.half, upper(gap))
    )
    return (
        f"{label} differs by {mean}{unit}, not significantly with {gap.seeds} seeds: the 95% CI "
        f"allows {low} to {high}{unit}."
    )


def upper(gap: Interval) -> float:
    """Return the upper end of an interval."""
    return gap.mean + (gap.half or 0.0)


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
    text, command = block(options.results), "python docs/readme_table.py"
    return rewrite(options.page, BEGIN, END, text, command=command, check=options.check)


if __name__ == "__main__":
    raise SystemExit(main())
