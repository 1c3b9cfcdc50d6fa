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
from elip_models.reduction.flops import DEFAULT_KEEP
from elip_models.reduction.strategies import DEFAULT, STRATEGIES
from elip_models.saving.files import read_object

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
THREADS = "2"  # of the times of the pretrained model
TOP1, LOSS = "reduced.top1", "reduced.contrastive_loss"
MEASURES = ("cosine", "neighbours")
FINAL = "merge:class_token_only=true"
STRATEGY_TEXTS = {name: strategy.summary for name, strategy in STRATEGIES.items()} | {
    FINAL: "as `merge`; the last block computes only the class token"
}
LABELS = {  # of strategies in the results of photographs, if another than the name
    "merge": "tome:compare=tokens,keep_norm=true",
    FINAL: "tome:compare=tokens,keep_norm=true,class_token_only=true",
}
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
    photographs = read_object(results / "real" / "dinov2_s_flickr8k_strategies.json")
    settings = {row["setting"]: row for row in photographs["settings"]}
    ratios = photographs["time"]["by_threads"][THREADS]["ratios"]
    training = max(strategy_entries(results, "training"), key=batch_size)
    quality = read_results(results / "studies" / "quality.json")
    header = ["strategy", "what it does", "cosine", "neighbours kept", "time", "training time"]
    rows = []
    for name in sorted(STRATEGY_TEXTS, key=lambda name: -neighbours(settings, name)):
        if (setting := setting_of(name, 0.5)) in settings:
            measures = [share(settings[setting][measure]) for measure in MEASURES]
            times = f"{ratios[setting]:.2f}", time_cell(training, name)
            rows.append([f"`{name}`", STRATEGY_TEXTS[name], *measures, *times])
    return "\n\n".join(
        [
            in_a_sentence(photographs, settings, read_object(results / "real" / "collection.json")),
            PICTURE,
            note(photographs, settings, training),
            table(header, rows, left=2),
            rates(settings, ratios),
            "\n".join(f"- {line}" for line in findings(quality, results)),
        ]
    )


def setting_of(name: str, keep: float) -> str:
    """Return the label of a strategy at a rate in the results of photographs."""
    return f"{LABELS.get(name, name)} {keep:g}"


def neighbours(settings: dict[str, dict[str, Any]], name: str) -> float:
    """Return the neighbours that a strategy keeps at half of the tokens; -1 if not measured."""
    row = settings.get(setting_of(name, 0.5))
    return -1.0 if row is None else row["neighbours"]["mean"]


def in_a_sentence(
    photographs: dict[str, Any], settings: dict[str, dict[str, Any]], collection: dict[str, Any]
) -> str:
    """Return what the default setting saves and costs."""
    setting, times = setting_of(DEFAULT.name, DEFAULT_KEEP), photographs["time"]
    row, ratio = settings[setting], times["by_threads"][THREADS]["ratios"][setting]
    many = collection["reduced"]
    if many["keep"] != DEFAULT_KEEP or setting_of(many["strategy"], DEFAULT_KEEP) not in settings:
        raise OutdatedText(f"{__file__}: expected {DEFAULT_KEEP} in collection.json, got {many}")
    few = settings[setting_of(many["strategy"], DEFAULT_KEEP)]
    return (
        f"**By default, `reduce_` applies `{DEFAULT.name}` with `keep={DEFAULT_KEEP}`. A "
        f"pretrained DINOv2 ViT-S, not trained further, then takes {ratio:.2f} of the dense time "
        f"({row['flops']:.2f} of the FLOPs; batch {times['batch']}, {times['device']}). Of the ten "
        f"nearest neighbours of a photograph, it keeps {row['neighbours']['mean']:.0%} among "
        f"{photographs['photographs']['images']} photographs. The features have a mean cosine of "
        f"{row['cosine']['mean']:.3f} with the dense ones.** `{many['strategy']}` at the same rate "
        f"keeps {few['neighbours']['mean']:.0%} of them, and {many['recall_at_10']['mean']:.0%} "
        f"among {collection['photographs']:,} photographs "
        "([scaling](docs/scaling.md#a-collection-of-a-billion-images))."
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
    photographs: dict[str, Any], settings: dict[str, dict[str, Any]], training: dict[str, Any]
) -> str:
    """Return the explanation of the columns: models, images, devices and sizes."""
    source, times = photographs["photographs"], photographs["time"]
    costs = [row["flops"] for row in settings.values() if row["setting"].endswith(" 0.5")]
    count = source["images"] * source["sets"]
    measured = [name for name in STRATEGIES if name in training["ratios"]]
    others = [name for name in measured if setting_of(name, 0.5) not in settings]
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
    costs = [cost for name, cost in entry["strategy_flops"].items() if name in STRATEGIES]
    return f"{min(costs):.2f} to {max(costs):.2f}"


def rates(settings: dict[str, dict[str, Any]], ratios: dict[str, float]) -> str:
    """Return the table of neighbours and times at each rate."""
    titles = {name: f"`{name}`" for name in ("tome", FINAL, "resize")}
    rows = [
        [f"`keep={keep}`"]
        + [
            f"{settings[setting]['neighbours']['mean']:.2f} ({ratios[setting]:.2f})"
            for setting in (setting_of(name, keep) for name in titles)
        ]
        for keep in (0.7, 0.5, 0.35)
    ]
    return table(["neighbours kept (time)", *titles.values()], rows, left=1)


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
