"""Write the results of README.md: cost and quality of each strategy, from the committed results.

python docs/readme_table.py             # rewrite the block between the two markers
python docs/readme_table.py --check     # exit status 1 if the block is stale

The image models come from `benchmarks/results/real`, the language models from
`benchmarks/results/vlm`.
"""

from pathlib import Path
from typing import Any

from benchmarks.marked_block import Block, run
from benchmarks.real.training import DENSE, REDUCED
from benchmarks.real.training_tables import difference, values_by_seed
from benchmarks.tables import table
from elip_models.reduction.flops import DEFAULT_KEEP
from elip_models.reduction.strategies import DEFAULT, STRATEGIES
from elip_models.saving.files import read_object

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BATCH, THREADS = 8, 2
"""Of the times of the pretrained model."""
TASKS = {"top1": "top-1, points", "text_to_image_r5": "R@5, points"}
HALF = "resize_merge 0.5"
TABLE = ("merge 0.7", HALF, "resize 0.5", "evit 0.7")
STUDIES = "finetune", "clip"
PAPER, CLIP_KEEP, RECALL = "elip:scorer=exact", 0.5, "text_to_image_r5"
LANGUAGE_STRATEGY, LANGUAGE_KEEP = "diverse", 0.25
CHART = (
    "![Top-1 accuracy and recall against time, for merging, a smaller image, EViT and random "
    "pruning](docs/time_against_accuracy.svg)"
)


class OutdatedText(Exception):
    """A sentence of this script is not true for the results."""


def block(results: Path) -> str:
    """Return the chart, and what it and other results say of three kinds of models."""
    tasks = read_object(results / "real" / "tasks_test.json")
    finetuned, clip = (read_object(results / "real" / f"{name}.json") for name in STUDIES)
    lines = [
        image_models(tasks),
        language_models(results),
        fine_tuning(finetuned),
        clip_training(clip),
    ]
    return "\n\n".join([CHART, caption(tasks), "\n".join(f"- {line}" for line in lines)])


def rows_by_setting(tasks: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the results by setting, with the time of each."""
    run = next(
        run for run in tasks["time"]["runs"] if (run["batch"], run["threads"]) == (BATCH, THREADS)
    )
    return {
        row["setting"]: row | {"time": run["ratios"][row["setting"]]} for row in tasks["settings"]
    }


def image_models(tasks: dict[str, Any]) -> str:
    """Return what the default and a smaller image with merges save and cost.

    Raises:
        OutdatedText: the default loses significantly on a task.
    """
    rows = rows_by_setting(tasks)
    default, half = rows[f"{DEFAULT.name} {DEFAULT_KEEP}"], rows[HALF]
    if any(gap["high"] < 0 for gap in default["difference"].values()):
        raise OutdatedText(f"{__file__}: expected no significant loss, got {default['difference']}")
    return (
        f"**Image models**: the default takes {percent(1 - default['time'])} less time, without "
        f"training. Top-1 changes by {points(default['difference']['top1'], '95% CI ')} points and "
        f"R@5 by {points(default['difference']['text_to_image_r5'])}; none of "
        f"{len(default['difference'])} measures shows a significant loss. `{HALF.split()[0]}`, "
        f"which makes the image smaller too, takes {percent(1 - half['time'])} less with half of "
        f"the tokens. It changes top-1 by {points(half['difference']['top1'])} points and R@5 by "
        f"{points(half['difference']['text_to_image_r5'])}."
    )


def language_models(results: Path) -> str:
    """Return what the prefill of a language model saves, and what a trained one loses."""
    bench = read_object(results / "vlm" / "amd-epyc-2-cores" / "bench.json")
    prefill = next(
        entry["extra_info"]
        for entry in bench["benchmarks"]
        if entry["name"] == f"test_vlm[{LANGUAGE_STRATEGY}-prefill]"
    )
    study = read_object(results / "vlm" / "study.json")
    name = f"{LANGUAGE_STRATEGY} {LANGUAGE_KEEP}"
    row = next(row for row in study["settings"] if row["setting"] == name)
    cost = points(dict(zip(("mean", "low", "high"), row["difference"], strict=True)))
    ratio = prefill["ratios"][str(LANGUAGE_KEEP)]
    return (
        f"**Language models**: with {percent(LANGUAGE_KEEP)} of the {prefill['tokens']['image']} "
        f"image tokens, the prefill of a LLaVA takes {ratio:.2f} of "
        f"the time. The accuracy of a small LLaVA, not trained further, changes by {cost} points "
        "([study](docs/results.md#image-tokens-of-a-language-model))."
    )


def fine_tuning(study: dict[str, Any]) -> str:
    """Return what fine-tuning with the default costs, beside a smaller image and fewer steps."""
    values, ratios = values_by_seed(study), study["time"]["ratios"]
    dense = values[DENSE, DENSE, DENSE]["top1"]
    arm, smaller = (f"{name} {DEFAULT_KEEP}" for name in (DEFAULT.name, "resize"))
    reduced, small = (values[each, REDUCED, REDUCED]["top1"] for each in (arm, smaller))
    fewer = values[f"{DENSE} {DEFAULT_KEEP}", DENSE, DENSE]["top1"]
    return (
        "**Fine-tuning**: a step of DINOv2 ViT-S/14 with the default takes "
        f"{percent(1 - ratios[arm])} less time. Trained on {study['settings']['train']:,} "
        f"photographs, the reduced model changes top-1 by {difference(reduced, dense, '95% CI ')} "
        f"points. A smaller image (`resize`, {percent(1 - ratios[smaller])} less time) changes it "
        f"by {difference(small, dense)}, dense training with {percent(DEFAULT_KEEP)} of the steps "
        f"by {difference(fewer, dense)} ({len(dense)} seeds, "
        "[all strategies](docs/results.md#fine-tuning-with-fewer-tokens))."
    )


def clip_training(study: dict[str, Any]) -> str:
    """Return what training a CLIP with half of the tokens costs, beside half of the steps."""
    values, ratios = values_by_seed(study), study["time"]["ratios"]
    dense = values[DENSE, DENSE, DENSE][RECALL]

    def change(name: str, forward: str = DENSE, label: str = "") -> str:
        end = DENSE if name == DENSE else REDUCED
        return difference(values[f"{name} {CLIP_KEEP}", end, forward][RECALL], dense, label)

    default, share = DEFAULT.name, percent(CLIP_KEEP)
    return (
        f"**Training a CLIP** of DINOv2 and MiniLM with {share} of the image tokens: a step on "
        f"photographs with captions takes {percent(1 - ratios[f'{default} {CLIP_KEEP}'])} less "
        f"time. Used with all tokens, the model changes R@5 by "
        f"{change(default, label='95% CI ')} points, used with half of them by "
        f"{change(default, REDUCED)}. With all tokens, a smaller image in training changes it by "
        f"{change('resize')}, the paper's method by {change(PAPER)}, dense training with {share} "
        f"of the steps by {change(DENSE)} ({len(dense)} seeds, "
        "[all strategies](docs/results.md#training-a-clip))."
    )


def percent(share: float) -> str:
    """Return '31%'."""
    return f"{100 * share:.0f}%"


def points(interval: dict[str, float], label: str = "") -> str:
    """Return '−1.4 (−3.5 to 0.8)' in points, with a label of the interval."""
    mean, low, high = (100 * interval[end] for end in ("mean", "low", "high"))
    return f"{mean:+.1f} ({label}{low:.1f} to {high:.1f})".replace("-", "−")


def caption(tasks: dict[str, Any]) -> str:
    """Return what the chart shows."""
    photographs = tasks["photographs"]
    errors = [
        100 * (row["difference"][task]["high"] - row["difference"][task]["low"]) / 2
        for row in tasks["settings"]
        for task in TASKS
    ]
    return (
        f"*A pretrained {tasks['model'].split(',')[0]} without further training, with 70, 50 and "
        f"35% of the tokens. Left: {photographs['clothes']['measured']} photographs of clothes; "
        f"right: {photographs['flickr8k']['measured']:,} photographs of Flickr8k. Lines that leave "
        f"the charts fall further. 95% intervals reach at most {max(errors):.1f} points to "
        f"each side. Batch {BATCH}, {THREADS} threads, {tasks['time']['device']}; "
        "no GPU was measured ([all results](docs/results.md)).*"
    )


def settings_table(tasks: dict[str, Any]) -> str:
    """Return a row for each of `TABLE`: points against dense, and the time."""
    rows = rows_by_setting(tasks)
    dense = ["dense", *(f"{100 * tasks['dense'][task]['mean']:.1f}" for task in TASKS), "1"]
    cells = [
        [
            f"`{name}`: {STRATEGIES[name.split()[0]].summary}",
            *(points(rows[name]["difference"][task]) for task in TASKS),
            f"{rows[name]['time']:.2f}",
        ]
        for name in TABLE
    ]
    header = ["strategy and `keep`", *TASKS.values(), "time"]
    return table(header, [dense, *cells], left=1)


def blocks() -> list[Block]:
    """Return the results and the settings."""
    tasks, page = read_object(RESULTS / "real" / "tasks_test.json"), ROOT / "README.md"
    return [
        Block(page, "results", block(RESULTS)),
        Block(page, "settings", settings_table(tasks)),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a page has no markers, or is stale under --check."""
    return run(blocks, "python docs/readme_table.py", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
