"""Write the results of README.md: cost and quality of each strategy, from the committed results.

python docs/readme_table.py             # rewrite the block between the two markers
python docs/readme_table.py --check     # exit status 1 if the block is stale

Times come from `benchmarks/results/DEVICE`, features from `benchmarks/results/real`, the accuracy
of a trained model from `benchmarks/results/studies`.
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
from elip_models.models.io.files import read_object
from elip_models.profiling.measure import NO_GAIN, no_gain
from elip_models.reduction.strategies import DEFAULT_KEEP

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
DIRECTIONS = ("training", "inference")
TOP1, LOSS = "reduced.top1", "reduced.contrastive_loss"
TOKENS = "tome:compare=tokens,keep_norm=true"
FINAL = f"{TOKENS},class_token_only=true"
MEASURES = ("cosine", "neighbours")
NONE = "–"
ARMS = {  # strategy: arm of the study `quality`, and what the strategy does
    TOKENS: (None, "`tome` that compares tokens instead of keys and keeps their norms"),
    FINAL: (None, "the same, and the last block computes only the class token"),
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


class OutdatedText(Exception):
    """A sentence of this script is not true for the results."""


def block(results: Path) -> str:
    """Return the result in a sentence, a picture, the table and its explanation, and findings."""
    photographs = read_object(results / "real" / "dinov2_s_flickr8k_strategies.json")
    found = {row["setting"]: row for row in photographs["settings"]}
    columns = time_columns(results)
    quality = read_results(results / "studies" / "quality.json")
    header = ["strategy", "what it does", "features: cosine", "neighbours kept"]
    header += [title for title, _ in columns]
    rows = []
    for name in sorted(ARMS, key=lambda name: -neighbours(found, name)):
        row = found.get(f"{name} 0.5")
        measures = [NONE] * 2 if row is None else [share(row[each]) for each in MEASURES]
        times = [time_cell(entry, name) for _, entry in columns]
        rows.append([f"`{name}`", ARMS[name][1], *measures, *times])
    return "\n\n".join(
        [
            in_a_sentence(found, columns),
            PICTURE,
            note(photographs, found, columns),
            table(header, rows, left=2),
            "\n".join(f"- {line}" for line in findings(found, quality, results)),
        ]
    )


def neighbours(found: dict[str, dict[str, Any]], name: str) -> float:
    """Return the neighbours that a strategy keeps at half of the tokens; -1 if not measured."""
    row = found.get(f"{name} 0.5")
    return -1.0 if row is None else row["neighbours"]["mean"]


def in_a_sentence(
    found: dict[str, dict[str, Any]], columns: list[tuple[str, dict[str, Any]]]
) -> str:
    """Return what the default setting saves and costs."""
    row, entry = found[f"tome {DEFAULT_KEEP}"], columns[-1][1]
    return (
        f"**At {entry['strategy_flops']['tome']:.2f} of the FLOPs, the default strategy `tome` "
        f"takes {entry['ratios']['tome']:.2f} of the inference time of a dense ViT-S at batch "
        f"{batch_size(entry)} on {entry['device']}. On a pretrained DINOv2, without training, the "
        f"default `keep={DEFAULT_KEEP}` keeps "
        f"{row['neighbours']['mean']:.0%} of the ten nearest neighbours of a photograph; the "
        f"features have a mean cosine of {row['cosine']['mean']:.3f} with the dense ones.**"
    )


def share(measured: dict[str, float]) -> str:
    """Return '0.458 (0.445 to 0.470)'."""
    return "{mean:.3f} ({low:.3f} to {high:.3f})".format(**measured)


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


def note(
    photographs: dict[str, Any],
    found: dict[str, dict[str, Any]],
    columns: list[tuple[str, dict[str, Any]]],
) -> str:
    """Return the explanation of the columns: models, images, devices and sizes."""
    devices = list(dict.fromkeys(entry["device"] for _, entry in columns))
    batches = ", ".join(f"{title} at batch {batch_size(entry)}" for title, entry in columns)
    entry, source = columns[0][1], photographs["photographs"]
    costs = [row["flops"] for row in found.values() if row["setting"].endswith(" 0.5")]
    count = source["images"] * source["sets"]
    return "\n".join(
        [
            f"- **Features**: {photographs['model'].split(',')[0]}, not trained further, with half "
            f"of the tokens ({min(costs):.2f} to {max(costs):.2f} of the dense FLOPs), on {count} "
            f"photographs of Flickr8k's test split in {source['sets']} sets. Cosine is that of the "
            "reduced and the dense CLS feature. Neighbours kept is the share of an image's ten "
            "nearest images, of 300, that stay its nearest. `elip` has no text here and selects by "
            "the image alone. In brackets: 95% confidence intervals over images.",
            f"- **Times** are ratios to the dense `{entry['op']}`, {entry['shape']['image']} px, "
            f"{entry['dtype']}, at {cost_range(entry)} of its training FLOPs, on "
            f'{" and ".join(devices)}: {batches}. "No gain" means a ratio above {NO_GAIN}.',
        ]
    )


def cost_range(entry: dict[str, Any]) -> str:
    """Return '0.70 to 0.72', the FLOPs of all strategies of an entry."""
    costs = [cost for name, cost in entry["strategy_flops"].items() if name in ARMS]
    return f"{min(costs):.2f} to {max(costs):.2f}"


def findings(found: dict[str, dict[str, Any]], quality: Document, results: Path) -> list[str]:
    """Return what the results show, a line each."""
    by_rate = "; ".join(
        f"at `keep={keep}` {found[f'tome {keep}']['neighbours']['mean']:.2f} with `tome`, "
        f"{found[f'{FINAL} {keep}']['neighbours']['mean']:.2f} with the settings of the first row, "
        f"{found[f'resize {keep}']['neighbours']['mean']:.2f} with `resize`"
        for keep in (0.7, 0.5, 0.35)
    )
    gap = against(quality, "dense", (TOP1, LOSS))[ARMS["tome"][0], TOP1]
    if gap.is_significant:
        raise OutdatedText(f"{__file__}: expected no significant difference of `tome`, got {gap}")
    return [
        f"**Which rate?** Neighbours kept: {by_rate}. `elip calibrate` finds the rate for your "
        "model and your images.",
        single_images(results),
        "**Training with `tome`.** The top-1 accuracy of a tiny CLIP, trained further on generated "
        f"scenes at {trained_cost(quality):.2f} of the dense FLOPs, shows no significant "
        f"difference from dense: {interval(gap, TOP1, ' points', '95% CI ')}, {gap.seeds} seeds, "
        f"80% power for {100 * gap.detectable:.1f} points ([study](docs/study.md)).",
    ]


def trained_cost(quality: Document) -> float:
    """Return the FLOPs of a training step of `tome` relative to dense, mean over seeds."""
    return fmean(by_seed(quality, ARMS["tome"][0], "step_flops").values())


def single_images(results: Path) -> str:
    """Return which strategies save no time in inference at the smallest batch.

    Raises:
        OutdatedText: `tome` saves time there, or `evit` does not.
    """
    entry = min(strategy_entries(results, "inference"), key=batch_size)
    measured = [name for name in ARMS if name in entry["ratios"] and is_reduced(entry, name)]
    slow = [name for name in measured if no_gain(entry["ratios"][name])]
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
