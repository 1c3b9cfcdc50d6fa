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
from elip_models.profiling.measure import NO_GAIN, no_gain
from elip_models.reduction.strategies import DEFAULT_KEEP
from elip_models.saving.files import read_object

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
THREADS = "2"  # of the times of the pretrained model
TOP1, LOSS = "reduced.top1", "reduced.contrastive_loss"
TOKENS = "tome:compare=tokens,keep_norm=true"
FINAL = f"{TOKENS},class_token_only=true"
MEASURES = ("cosine", "neighbours")
ARMS = {  # strategy: arm of the study `quality`, and what the strategy does
    TOKENS: (None, "`tome` that compares tokens instead of keys and keeps their norms"),
    FINAL: (None, "compares tokens, keeps norms; the last block computes only the class token"),
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
    ratios = photographs["time"]["by_threads"][THREADS]["ratios"]
    training = max(strategy_entries(results, "training"), key=batch_size)
    quality = read_results(results / "studies" / "quality.json")
    header = ["strategy", "what it does", "cosine", "neighbours kept", "time", "training time"]
    rows = []
    for name in sorted(ARMS, key=lambda name: -neighbours(found, name)):
        if (setting := f"{name} 0.5") in found:
            measures = [share(found[setting][each]) for each in MEASURES]
            times = f"{ratios[setting]:.2f}", time_cell(training, name)
            rows.append([f"`{name}`", ARMS[name][1], *measures, *times])
    return "\n\n".join(
        [
            in_a_sentence(photographs, found, read_object(results / "real" / "collection.json")),
            PICTURE,
            note(photographs, found, training),
            table(header, rows, left=2),
            rates(found, ratios),
            "\n".join(f"- {line}" for line in findings(quality, results)),
        ]
    )


def neighbours(found: dict[str, dict[str, Any]], name: str) -> float:
    """Return the neighbours that a strategy keeps at half of the tokens; -1 if not measured."""
    row = found.get(f"{name} 0.5")
    return -1.0 if row is None else row["neighbours"]["mean"]


def in_a_sentence(
    photographs: dict[str, Any], found: dict[str, dict[str, Any]], collection: dict[str, Any]
) -> str:
    """Return what the default setting saves and costs."""
    setting, times = f"tome {DEFAULT_KEEP}", photographs["time"]
    row, ratio = found[setting], times["by_threads"][THREADS]["ratios"][setting]
    many = collection["reduced"]
    if f"{many['strategy']} {many['keep']:g}" != setting:
        raise OutdatedText(f"{__file__}: expected {setting} in collection.json, got {many}")
    return (
        f"**By default, `reduce_` applies `tome` with `keep={DEFAULT_KEEP}`. A pretrained DINOv2 "
        f"ViT-S, not trained further, then takes {ratio:.2f} of the dense time "
        f"({row['flops']:.2f} of the FLOPs; batch {times['batch']}, {times['device']}). Of the ten "
        f"nearest neighbours of a photograph, it keeps {row['neighbours']['mean']:.0%} among "
        f"{photographs['photographs']['images']} photographs, and "
        f"{many['recall_at_10']['mean']:.0%} among {collection['photographs']:,} "
        "([scaling](docs/scaling.md#a-collection-of-a-billion-images)). The features have a mean "
        f"cosine of {row['cosine']['mean']:.3f} with the dense ones.**"
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
    return f"{ratio:.2f}" + (" no gain" if no_gain(ratio) else "")


def note(
    photographs: dict[str, Any], found: dict[str, dict[str, Any]], training: dict[str, Any]
) -> str:
    """Return the explanation of the columns: models, images, devices and sizes."""
    source, times = photographs["photographs"], photographs["time"]
    costs = [row["flops"] for row in found.values() if row["setting"].endswith(" 0.5")]
    count = source["images"] * source["sets"]
    others = [name for name in ARMS if f"{name} 0.5" not in found]
    return "\n".join(
        [
            f"- **Cosine, neighbours kept, time**: {photographs['model'].split(',')[0]}, not "
            f"trained further, with half of the tokens ({min(costs):.2f} to {max(costs):.2f} of "
            f"the dense FLOPs), on {count} photographs of Flickr8k's test split in "
            f"{source['sets']} sets. Cosine is that of the reduced and the dense CLS feature. "
            f"[Neighbours kept](docs/glossary.md#neighbours-kept) are among {source['images']} "
            "photographs. Time is relative to dense in inference at batch "
            f"{times['batch']}, with {THREADS} threads on {times['device']}. `elip` has no text "
            "here and selects by the image alone. In brackets: 95% confidence intervals over "
            "images.",
            f"- **Training time** is relative to the dense `{training['op']}`, "
            f"{training['shape']['image']} px, {training['dtype']}, at {cost_range(training)} of "
            f"its training FLOPs and batch {batch_size(training)}, on {training['device']}. For "
            f"{in_words(others)} see [benchmarks](docs/benchmarks.md).",
        ]
    )


def cost_range(entry: dict[str, Any]) -> str:
    """Return '0.70 to 0.72', the FLOPs of all strategies of an entry."""
    costs = [cost for name, cost in entry["strategy_flops"].items() if name in ARMS]
    return f"{min(costs):.2f} to {max(costs):.2f}"


def rates(found: dict[str, dict[str, Any]], ratios: dict[str, float]) -> str:
    """Return the table of neighbours and times at each rate."""
    titles = {"tome": "`tome`", FINAL: "settings of the first row", "resize": "`resize`"}
    rows = [
        [f"`keep={keep}`"]
        + [
            f"{found[f'{name} {keep}']['neighbours']['mean']:.2f} ({ratios[f'{name} {keep}']:.2f})"
            for name in titles
        ]
        for keep in (0.7, 0.5, 0.35)
    ]
    return table(["neighbours kept (time)", *titles.values()], rows, left=1)


def findings(quality: Document, results: Path) -> list[str]:
    """Return what the results show, a line each."""
    gap = against(quality, "dense", (TOP1, LOSS))[ARMS["tome"][0], TOP1]
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
