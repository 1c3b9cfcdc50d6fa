"""Write the results of README.md: cost and quality of each strategy, from the committed results.

python docs/readme_table.py             # rewrite the blocks between the markers
python docs/readme_table.py --check     # exit status 1 if a block is stale

The image models come from `benchmarks/results/real`, the vision-language models from
`benchmarks/results/vlm`.
"""

from pathlib import Path
from typing import Any

from benchmarks.marked_block import Block, run
from benchmarks.real.training import DENSE, REDUCED
from benchmarks.real.training_tables import interval_over_seeds, values_by_seed
from benchmarks.tables import table
from elip_models.saving.files import read_object
from elip_models.strategies import DEFAULT
from elip_models.strategies.flops import DEFAULT_KEEP

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BATCHES, THREADS = (8, 1), 2
"""Of the times of the pretrained model."""
TASKS = {"top1": "top-1", "text_to_image_r5": "R@5"}
MEASURES = {
    "top1": "top-1",
    "knn": "k-NN",
    "text_to_image_r1": "R@1",
    "text_to_image_r5": "R@5",
    "image_to_text_r1": "image-to-text R@1",
    "image_to_text_r5": "image-to-text R@5",
}
TABLE = (
    "merge 0.7",
    "resize 0.7",
    "evit 0.7",
    "resize_merge 0.5",
    "resize 0.5",
    "merge 0.5",
    "merge 0.35",
)
STUDIES = "finetune", "clip"
CLIP_KEEP, RECALL = 0.5, "text_to_image_r5"
LANGUAGE_STRATEGY, LANGUAGE_KEEP = "diverse", 0.25


def bullets(results: Path) -> str:
    """Return a line for each kind of use, each with at most two figures."""
    tasks = read_object(results / "real" / "tasks_test.json")
    finetuned, clip = (read_object(results / "real" / f"{name}.json") for name in STUDIES)
    lines = [
        single_images(tasks),
        *vision_language_models(results),
        fine_tuning(finetuned),
        clip_training(clip),
    ]
    return "\n".join(f"- {line}" for line in lines)


def times(tasks: dict[str, Any], batch: int) -> dict[str, float]:
    """Return the time of each setting relative to dense, at a batch size."""
    wanted = (batch, THREADS)
    runs = tasks["time"]["runs"]
    return next(run["ratios"] for run in runs if (run["batch"], run["threads"]) == wanted)


def single_images(tasks: dict[str, Any]) -> str:
    """Return what the default saves for one image at a time."""
    batched, single = (
        percent(1 - times(tasks, batch)[f"{DEFAULT.name} {DEFAULT_KEEP}"]) for batch in BATCHES
    )
    return (
        f"**One image at a time**: the default saves only {single} of the time with two threads, "
        f"against {batched} for batches."
    )


def vision_language_models(results: Path) -> list[str]:
    """Return what the prefill of a language model saves, and what small trained ones lose."""
    bench = read_object(results / "vlm" / "amd-epyc-2-cores" / "bench.json")
    prefill = next(
        entry["extra_info"]
        for entry in bench["benchmarks"]
        if entry["name"] == f"test_vlm[{LANGUAGE_STRATEGY}-prefill]"
    )
    study = read_object(results / "vlm" / "study.json")
    seeds = {row["setting"]: row["by_seed"] for row in study["settings"]}
    pairs = zip(seeds[f"{LANGUAGE_STRATEGY} {LANGUAGE_KEEP}"], seeds[DENSE], strict=True)
    losses = [100 * (dense - reduced) for reduced, dense in pairs]
    saved = percent(1 - prefill["ratios"][str(LANGUAGE_KEEP)])
    return [
        f"**Vision-language models**: with a quarter of the image tokens, the prefill of a LLaVA "
        f"takes {saved} less time, and decoding little less ([measured with random weights]"
        "(docs/vlm.md#how-much-time-it-saves)).",
        f"Three tiny LLaVAs, trained on all tokens of drawn scenes and then run on a quarter of "
        f"them by `{LANGUAGE_STRATEGY}`, lost between {min(losses):.1f} and {max(losses):.1f} "
        "points of accuracy "
        "([study](docs/results.md#image-tokens-of-a-language-model)).",
    ]


def fine_tuning(study: dict[str, Any]) -> str:
    """Return what fine-tuning with the default saves, and may cost."""
    values, arm = values_by_seed(study), f"{DEFAULT.name} {DEFAULT_KEEP}"
    reduced, dense = values[arm, REDUCED, REDUCED]["top1"], values[DENSE, DENSE, DENSE]["top1"]
    mean, half = interval_over_seeds(reduced, dense)
    return (
        f"**Fine-tuning** with the default, on small images: a step takes "
        f"{percent(1 - study['time']['ratios'][arm])} less time. The loss of top-1 may reach "
        f"{half - mean:.1f} points (end of the confidence interval), and does not differ "
        "significantly from that of as many fewer steps "
        "([all strategies](docs/results.md#fine-tuning-with-fewer-tokens))."
    )


def clip_training(study: dict[str, Any]) -> str:
    """Return what training a CLIP with half of the tokens saves and costs."""
    values, arm = values_by_seed(study), f"{DEFAULT.name} {CLIP_KEEP}"
    trained, dense = values[arm, REDUCED, DENSE][RECALL], values[DENSE, DENSE, DENSE][RECALL]
    mean, _ = interval_over_seeds(trained, dense)
    return (
        f"**Training a CLIP** with half of the image tokens: a step takes "
        f"{percent(1 - study['time']['ratios'][arm])} less time. Run with all tokens afterwards, "
        f"the model loses {-mean:.1f} points of text-to-image R@5; run with half of them, it loses "
        "more than half of the dense steps would cost "
        "([all strategies](docs/results.md#training-a-clip))."
    )


def percent(share: float) -> str:
    """Return '31%'."""
    return f"{100 * share:.0f}%"


def points(interval: dict[str, float]) -> str:
    """Return '−1.4 (−3.5 to 0.8)' in points."""
    mean, low, high = (100 * interval[end] for end in ("mean", "low", "high"))
    return f"{mean:+.1f} ({low:.1f} to {high:.1f})".replace("-", "−")


def settings_table(tasks: dict[str, Any]) -> str:
    """Return the table of the README, and what was measured.

    A row for each of `TABLE`: points against dense, the worst of all measures, and the times.
    """
    rows = {row["setting"]: row for row in tasks["settings"]}
    of_batches = [times(tasks, batch) for batch in BATCHES]
    dense = ["dense", *(f"{100 * tasks['dense'][task]['mean']:.1f}%" for task in TASKS)]
    cells = [[*dense, "", *("1" for _ in BATCHES)]]
    for name in TABLE:
        differences = rows[name]["difference"]
        worst = min(differences, key=lambda measure: differences[measure]["mean"])
        cells.append(
            [
                f"`{name}`",
                *(points(differences[task]) for task in TASKS),
                f"{MEASURES[worst]}: {points(differences[worst])}",
                *(f"{ratios[name]:.2f}" for ratios in of_batches),
            ]
        )
    header = ["strategy and `keep`", *TASKS.values(), f"largest drop of {len(MEASURES)} measures"]
    header += [f"time, batch {batch}" for batch in BATCHES]
    photographs = tasks["photographs"]
    note = (
        f"*{tasks['model'].split(',')[0]}, pretrained, without further training. Change in "
        "percentage points against the dense model, with the 95% confidence interval; time "
        f"relative to dense. Top-1: a linear probe on {photographs['clothes']['measured']} "
        "photographs of ten easy classes of clothes. R@5: the share of captions whose photograph "
        f"is among the five best of {photographs['flickr8k']['measured']:,}. "
        "Intervals are not adjusted for the number of rows, and too short if few photographs "
        f"change. {tasks['time']['device']}; no GPU was measured. [All measures]"
        "(docs/results.md).*"
    )
    return f"{table(header, cells, left=1)}\n\n{note}"


def blocks() -> list[Block]:
    """Return the settings and the results."""
    tasks, page = read_object(RESULTS / "real" / "tasks_test.json"), ROOT / "README.md"
    return [
        Block(page, "settings", settings_table(tasks)),
        Block(page, "results", bullets(RESULTS)),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a page has no markers, or is stale under --check."""
    return run(blocks, "python docs/readme_table.py", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
