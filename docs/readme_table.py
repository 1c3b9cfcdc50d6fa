"""Write the results of README.md: cost and quality of each strategy, from the committed results.

python docs/readme_table.py             # rewrite the blocks between the markers
python docs/readme_table.py --check     # exit status 1 if a block is stale

The image models come from `benchmarks/results/real`, the vision-language models from
`benchmarks/results/vlm`.
"""

from pathlib import Path
from typing import Any

from benchmarks.marked_block import Block, run
from benchmarks.official_tome import OFFICIAL
from benchmarks.real import panel_tables
from benchmarks.real.training import DENSE, REDUCED
from benchmarks.real.training_tables import interval_over_seeds, values_by_seed
from benchmarks.tables import table
from elip_models.intervals import Interval
from elip_models.saving.files import read_object
from elip_models.strategies import DEFAULT
from elip_models.strategies.flops import DEFAULT_KEEP

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NAMES = "panel", "camvid", "retrieval"
BATCHES, THREADS = (8, 1), 2
"""Of the times of the pretrained model."""
TABLE = {
    "merge 0.7": "merge 0.7",
    "tome 0.715": "tome 0.715",
    "resize:size=196": "dense@294",
    "evit 0.725": "evit 0.725",
    "resize_merge 0.5": "merge 0.7@294",
    "resize:size=168": "dense@252",
    "distilled_resize_merge": "",
    "distilled_resize": "",
}
"""Settings of the panel, and those of the same strategy and about the same time on CamVid."""
STUDIES = "finetune", "clip"
RECALL, OTHER_RECALL = "text_to_image_r5", "image_to_text_r5"
CLIP_KEEP = 0.5
LANGUAGE_STRATEGY, LANGUAGE_KEEP = "diverse", 0.25


def bullets(results: Path) -> str:
    """Return a line for each kind of use, each with at most two figures."""
    tasks = read_object(results / "real" / "tasks_test.json")
    finetuned, clip = (read_object(results / "real" / f"{name}.json") for name in STUDIES)
    lines = [
        distilled(read_object(results / "real" / "panel.json")),
        beside_tome(read_object(results / "official_tome.json")),
        single_images(tasks),
        vision_language_models(results),
        training(finetuned, clip),
    ]
    return "\n".join(f"- {line}" for line in lines)


def times(tasks: dict[str, Any], batch: int) -> dict[str, float]:
    """Return the time of each setting relative to dense, at a batch size."""
    wanted = (batch, THREADS)
    runs = tasks["time"]["runs"]
    return next(run["ratios"] for run in runs if (run["batch"], run["threads"]) == wanted)


def distilled(panel: dict[str, Any]) -> str:
    """Return what distilling the setting of half the time wins back."""
    means = {row.setting: panel_tables.points(row.mean) for row in panel_tables.rows(panel)}
    return (
        "**At half of the time, [distil](docs/calibrate.md#recover-quality-without-labels)**: "
        f"`resize_merge 0.5` then changes {means['distilled_resize_merge']} points of top-1 "
        f"instead of {means['resize_merge 0.5']}; a smaller image, distilled likewise, does "
        "not differ significantly."
    )


def beside_tome(document: dict[str, Any]) -> str:
    """Return how `tome` compares with the official code of ToMe."""
    (name, found), *_ = document["models"].items()
    ours = f"tome:r={document['merged_per_block']}"
    pairs = []
    for batch in BATCHES:
        ratios = panel_tables.times(found, batch)
        pairs.append(f"{ratios[ours].mean:.2f} and {ratios[OFFICIAL].mean:.2f} at batch {batch}")
    return (
        f"**Beside ToMe's own code** on a `{name}`, `tome` gives the same outputs (they differ by "
        f"at most {found['largest_relative_difference']:.0e}). `tome` and that code take, of the "
        f"dense time, {', '.join(pairs)}."
    )


def single_images(tasks: dict[str, Any]) -> str:
    """Return what the default saves for one image at a time."""
    batched, single = (
        percent(1 - times(tasks, batch)[f"{DEFAULT.name} {DEFAULT_KEEP}"]) for batch in BATCHES
    )
    return (
        f"**One image at a time**: the default saves only {single} of the time with two threads, "
        f"against {batched} for batches."
    )


def vision_language_models(results: Path) -> str:
    """Return what the prefill of a language model saves, and what small trained ones lose."""
    bench = read_object(results / "vlm" / "amd-epyc-2-cores" / "bench.json")
    prefill = next(
        entry["extra_info"]
        for entry in bench["benchmarks"]
        if entry["name"] == f"test_vlm[{LANGUAGE_STRATEGY}-prefill]"
    )
    study = read_object(results / "vlm" / "study.json")
    seeds = {row["setting"]: row["by_seed"] for row in study["settings"]}
    arms = (f"{LANGUAGE_STRATEGY} {LANGUAGE_KEEP}", DENSE)
    reduced, dense = (dict(enumerate(seeds[arm])) for arm in arms)
    losses = [100 * (dense[seed] - reduced[seed]) for seed in dense]
    mean, half = (points / 100 for points in interval_over_seeds(reduced, dense))
    change = panel_tables.points(Interval(mean, mean - half, mean + half))
    saved = percent(1 - prefill["ratios"][str(LANGUAGE_KEEP)])
    return (
        f"**Vision-language models**: with a quarter of the image tokens, the prefill of a LLaVA "
        f"takes {saved} less time, and decoding little less ([random weights]"
        "(docs/vlm.md#how-much-time-it-saves)). Three tiny LLaVAs, trained on all tokens of drawn "
        f"scenes, lost {min(losses):.1f} to {max(losses):.1f} points of accuracy on a quarter of "
        f"them, on the mean {change} with the 95% interval over seeds "
        "([study](docs/results.md#image-tokens-of-a-language-model))."
    )


def training(finetuned: dict[str, Any], clip: dict[str, Any]) -> str:
    """Return what training saves and may cost: fine-tuning, and a CLIP with half of the tokens."""
    values, arm = values_by_seed(finetuned), f"{DEFAULT.name} {DEFAULT_KEEP}"
    dense = values[DENSE, DENSE, DENSE]["top1"]
    arms = (arm, f"resize {DEFAULT_KEEP}")
    most = [
        half - mean
        for mean, half in (
            interval_over_seeds(values[each, REDUCED, REDUCED]["top1"], dense) for each in arms
        )
    ]
    of_clip, clip_arm = values_by_seed(clip), f"{DEFAULT.name} {CLIP_KEEP}"
    trained = of_clip[clip_arm, REDUCED, DENSE], of_clip[DENSE, DENSE, DENSE]
    lost = [
        -interval_over_seeds(*(each[recall] for each in trained))[0]
        for recall in (RECALL, OTHER_RECALL)
    ]
    return (
        f"**Training**: fine-tuning on small images takes "
        f"{percent(1 - finetuned['time']['ratios'][arm])} less time a step, and may lose up to "
        f"{most[0]:.1f} points of top-1 (end of the interval), a smaller image up to "
        f"{most[1]:.1f}; as many fewer steps do not differ significantly "
        "([study](docs/results.md#fine-tuning-with-fewer-tokens)). A CLIP "
        f"trained on half of the image tokens takes "
        f"{percent(1 - clip['time']['ratios'][clip_arm])} less time a step, and loses "
        f"{lost[0]:.1f} points of R@5 from text to image, and {lost[1]:.1f} from image to text, "
        "when it is run on all of them "
        "([study](docs/results.md#training-a-clip))."
    )


def percent(share: float) -> str:
    """Return '31%'."""
    return f"{100 * share:.0f}%"


def settings_table(panel: dict[str, Any], camvid: dict[str, Any], retrieval: dict[str, Any]) -> str:
    """Return the table of the README, and what was measured.

    A row for each of `TABLE`: own probes on the mean and the worst set, CamVid, recall, and times.
    """
    found = {row.setting: row for row in panel_tables.rows(panel)}
    mious = {
        entry["setting"]: panel_tables.points(panel_tables.interval_of(entry["difference"]["own"]))
        for entry in camvid["settings"]
    }
    recalls = {
        entry["setting"]: panel_tables.points(
            panel_tables.interval_of(entry["difference"]["own"][RECALL])
        )
        for entry in retrieval["settings"]
    }
    cells = []
    for name, on_camvid in TABLE.items():
        row = found[name]
        cells.append(
            [
                panel_tables.title(name),
                *(panel_tables.time_text(panel, name, batch) for batch in BATCHES),
                panel_tables.points(row.mean),
                f"{row.worst}: {panel_tables.points(row.sets[row.worst])}",
                f"{row.non_inferior} of {len(row.sets)}",
                mious.get(on_camvid, ""),
                recalls.get(name, ""),
            ]
        )
    sets, margin = panel["sets"], 100 * panel["margin"]
    photographs = sum(each["photographs"] for each in sets.values())
    header = ["strategy and `keep`", *(f"time, batch {batch}" for batch in BATCHES)]
    header += ["top-1, mean of the sets", "top-1, worst set", "non-inferior on", "mIoU", "R@5"]
    note = (
        f"*{panel['model'].split(',')[0]}, pretrained. Distilled: 500 steps of `elip distill` on "
        "unlabelled photographs that were not measured, of five of the sets; the others are not "
        "trained further. Points of change from the dense model with 95% intervals. Top-1: linear "
        f"probes, fitted on the features of the reduced model, on {photographs:,} photographs of "
        f"{len(sets)} sets, of which the "
        "clothes alone had chosen settings before. Non-inferior: the interval ends above "
        f"−{margin:.0f} point. mIoU: a linear head on CamVid, of the setting that is "
        "nearest in time there; patches that `evit` drops are zeros. R@5: "
        f"text-to-image recall of {retrieval['photographs']:,} photographs of Flickr8k, in two "
        "halves. Empty: not measured. Time relative to "
        f"dense, one thread of {panel['time']['device']}; no GPU was measured. "
        "[All sets](docs/results.md#a-panel-of-labelled-photographs).*"
    )
    return f"{table(header, cells, left=1)}\n\n{note}"


def blocks() -> list[Block]:
    """Return the settings and the results."""
    panel, camvid, retrieval = (read_object(RESULTS / "real" / f"{name}.json") for name in NAMES)
    page = ROOT / "README.md"
    return [
        Block(page, "results", f"{settings_table(panel, camvid, retrieval)}\n\n{bullets(RESULTS)}")
    ]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a page has no markers, or is stale under --check."""
    return run(blocks, "python docs/readme_table.py", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
