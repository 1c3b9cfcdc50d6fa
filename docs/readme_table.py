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
from benchmarks.real.camvid import difference_of_groups
from benchmarks.real.measures import TOP1
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
DEFAULT_SETTING, SMALLER = f"{DEFAULT.name} {DEFAULT_KEEP}", "resize:size=196"
MASKS, SMALLER_FRAME = "merge:reach=6,decrease=0.5 0.55", "dense@266"
"""A setting of CamVid, chosen on the validation frames, and a smaller image of the same time."""
TABLE = {
    "merge 0.7": "merge 0.7",
    "resize:size=196": "dense@294",
    "tome 0.715": "tome 0.715",
    "evit 0.725": "evit 0.725",
    "random 0.735": "",
    "merge 0.455": "",
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


def headline(panel: dict[str, Any]) -> str:
    """Return what the default and half of the time cost, beside a smaller image."""
    rows = {row.setting: panel_tables.points(row.mean) for row in panel_tables.rows(panel)}
    time, other = (panel_tables.times(panel, 8)[name].mean for name in (DEFAULT_SETTING, SMALLER))
    return (
        f"**Measured** (DINOv2 ViT-S/14, batches of 8, one CPU thread; no GPU yet): the default "
        f"takes {time:.2f} of the time and changes top-1 by {rows[DEFAULT_SETTING]} points on "
        f"average over {len(panel['sets'])} sets of photographs, with 95% intervals. A smaller "
        f"image takes {other:.2f} and changes it by {rows[SMALLER]}. At half the time, after "
        "[distilling](docs/calibrate.md#recover-quality-without-labels) without labels, the two "
        f"change it by {rows['distilled_resize_merge']} and {rows['distilled_resize']}."
    )


def against(panel: dict[str, Any], camvid: dict[str, Any]) -> str:
    """Return the default minus a smaller image of its time, and minus `tome`, paired."""
    means = {(left, right): mean for left, right, _, mean in panel_tables.contrasts(panel)}
    tie, tome = (
        panel_tables.points(means[DEFAULT_SETTING, other]) for other in (SMALLER, "tome 0.715")
    )
    totals = {entry["setting"]: entry["totals"]["dense"] for entry in camvid["settings"]}
    pair = totals[TABLE[DEFAULT_SETTING]], totals[TABLE[SMALLER]]
    masks = panel_tables.points(difference_of_groups(*pair))
    return (
        f"**The default against a smaller image** of about the same time: {tie} points of top-1, "
        f"which is a tie, and {masks} of mIoU. Against `tome`: {tome} of top-1. These differences "
        "are paired."
    )


def bullets(results: Path) -> str:
    """Return a line for each kind of use."""
    tasks = read_object(results / "real" / "tasks_test.json")
    panel, camvid = (read_object(results / "real" / f"{name}.json") for name in NAMES[:2])
    finetuned, clip = (read_object(results / "real" / f"{name}.json") for name in STUDIES)
    lines = [
        against(panel, camvid),
        masks(camvid),
        single_images(panel, tasks),
        beside_tome(read_object(results / "official_tome.json")),
        vision_language_models(results),
        training(finetuned, clip),
    ]
    return "\n".join(f"- {line}" for line in lines)


def on_camvid(camvid: dict[str, Any], head: str = "dense") -> dict[str, str]:
    """Return the change of mIoU of each setting by a head."""
    return {
        entry["setting"]: panel_tables.points(panel_tables.interval_of(entry["difference"][head]))
        for entry in camvid["settings"]
    }


def masks(camvid: dict[str, Any]) -> str:
    """Return what masks cost at half of the time, beside a smaller image."""
    ratios, changes = panel_tables.times(camvid, 8), on_camvid(camvid)
    totals = {entry["setting"]: entry["totals"]["dense"] for entry in camvid["settings"]}
    gap = panel_tables.points(difference_of_groups(totals[MASKS], totals[SMALLER_FRAME]))
    return (
        f"**Masks at about half the time**: `{MASKS.replace(' ', '` with `keep=')}` takes "
        f"{ratios[MASKS].mean:.2f} of the time and changes mIoU by {changes[MASKS]}; that is "
        f"{gap} against a smaller image of {ratios[SMALLER_FRAME].mean:.2f}. [Depth, boxes and "
        "poses](docs/dense.md) use the same features."
    )


def times(tasks: dict[str, Any], batch: int) -> dict[str, float]:
    """Return the time of each setting relative to dense, at a batch size."""
    wanted = (batch, THREADS)
    runs = tasks["time"]["runs"]
    return next(run["ratios"] for run in runs if (run["batch"], run["threads"]) == wanted)


def beside_tome(document: dict[str, Any]) -> str:
    """Return how `tome` compares with the official code of ToMe."""
    (name, found), *_ = document["models"].items()
    ours = f"tome:r={document['merged_per_block']}"
    both = [panel_tables.times(found, batch) for batch in BATCHES]
    batched, single = ((each[ours].mean, each[OFFICIAL].mean) for each in both)
    return (
        f"**Beside ToMe's [own code](https://github.com/facebookresearch/ToMe)** on a `{name}` "
        f"with r={document['merged_per_block']}, `tome` gives the same outputs (to "
        f"{found['largest_relative_difference']:.0e}). At batch {BATCHES[0]} it takes "
        f"{batched[0]:.2f} of the dense time and that code {batched[1]:.2f}; for single images it "
        f"is slower, {single[0]:.2f} and {single[1]:.2f}. "
        "That code has models of timm, SWAG and MAE, and published accuracy on ImageNet, under CC "
        "BY-NC. [EViT](https://github.com/youweiliang/evit) was made for fine-tuning; here it was "
        "not fine-tuned."
    )


def single_images(panel: dict[str, Any], tasks: dict[str, Any]) -> str:
    """Return what the default saves for one image at a time."""
    one, two = (
        percent(1 - ratio)
        for ratio in (
            panel_tables.times(panel, 1)[DEFAULT_SETTING].mean,
            times(tasks, 1)[DEFAULT_SETTING],
        )
    )
    return f"**One image at a time** saves less: {one} of the time with one thread, {two} with two."


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
    mean, half = (points / 100 for points in interval_over_seeds(reduced, dense))
    change = panel_tables.points(Interval(mean, mean - half, mean + half))
    saved = percent(1 - prefill["ratios"][str(LANGUAGE_KEEP)])
    return (
        f"**Vision-language models**: with a quarter of the image tokens (`{LANGUAGE_STRATEGY}`), "
        f"the prefill of a LLaVA takes {saved} less time ([random weights]"
        "(docs/vlm.md#how-much-time-it-saves)). The accuracy of three tiny LLaVAs, trained on "
        f"drawn scenes with all tokens, changed by {change} points ([study]"
        "(docs/results.md#image-tokens-of-a-language-model))."
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
        "**Training**: fine-tuning takes "
        f"{percent(1 - finetuned['time']['ratios'][arm])} less time per step. The 95% interval "
        f"allows a loss of {most[0]:.1f} points of top-1, against {most[1]:.1f} with a smaller "
        "image; training for fewer steps was not significantly different ([study]"
        "(docs/results.md#fine-tuning-with-fewer-tokens)). A CLIP trained on half of the image "
        f"tokens takes {percent(1 - clip['time']['ratios'][clip_arm])} less time per step, and "
        f"loses {lost[0]:.1f} points of R@5 from text to image and {lost[1]:.1f} from image to "
        "text when evaluated with all tokens ([study](docs/results.md#training-a-clip))."
    )


def percent(share: float) -> str:
    """Return '31%'."""
    return f"{100 * share:.0f}%"


def settings_table(panel: dict[str, Any], camvid: dict[str, Any], retrieval: dict[str, Any]) -> str:
    """Return the table of the README, and what was measured.

    A row for each of `TABLE`: own probes on the mean and the worst set, CamVid, recall, and times.
    """
    found = {row.setting: row for row in panel_tables.rows(panel)}
    kept = {row.setting: row.mean for row in panel_tables.rows(panel, TOP1)}
    mious = on_camvid(camvid)
    recalls = {
        entry["setting"]: " / ".join(
            panel_tables.points(
                panel_tables.interval_of(entry["difference"]["own"][recall])
            ).partition(" ")[0]
            for recall in (RECALL, OTHER_RECALL)
        )
        for entry in retrieval["settings"]
    }
    cells = []
    for name, place in TABLE.items():
        row = found[name]
        worst = panel_tables.points(row.sets[row.worst]).partition(" ")[0]
        cells.append(
            [
                panel_tables.title(name),
                *(panel_tables.time_text(panel, name, batch) for batch in BATCHES),
                panel_tables.points(kept[name]),
                panel_tables.points(row.mean),
                f"{worst} ({row.worst})",
                mious.get(place, ""),
                recalls.get(name, ""),
            ]
        )
    sets = panel["sets"]
    photographs = sum(each["photographs"] for each in sets.values())
    probes = [100 * each["dense"][TOP1] for each in sets.values()]
    header = ["strategy and `keep`", *(f"time, batch {batch}" for batch in BATCHES)]
    header += ["top-1, head kept", "top-1, head fitted again", "worst set, fitted again", "mIoU"]
    header.append("R@5, text / image")
    recall = retrieval["dense"]
    note = (
        f"*Change in points from the dense model, with 95% intervals. Top-1: a linear head, on "
        f"average over {len(sets)} sets of {photographs:,} photographs, from clothes to "
        "medical images (dense: "
        f"{min(probes):.0f} to {max(probes):.0f}). mIoU: CamVid, a linear head of dense features "
        f"(dense: {100 * camvid['dense']['dense']:.1f}), the setting closest in time. R@5: "
        f"retrieval in Flickr8k by linear maps to a text model (dense: {100 * recall[RECALL]:.1f} "
        f"and {100 * recall[OTHER_RECALL]:.1f}). Distilled: 500 steps, one seed, on unlabelled "
        "photographs of five of the sets, none of them measured. Settings have the time of the "
        f"default or about half. {panel['time']['device']}; intervals of times are at most "
        f"{panel_tables.widest_time(panel):.2f} wide. Empty: not measured. [All sets and intervals]"
        "(docs/results.md#a-panel-of-labelled-photographs).*"
    )
    return f"{table(header, cells, left=1)}\n\n{note}"


def blocks() -> list[Block]:
    """Return the settings and the results."""
    panel, camvid, retrieval = (read_object(RESULTS / "real" / f"{name}.json") for name in NAMES)
    page = ROOT / "README.md"
    results = f"{settings_table(panel, camvid, retrieval)}\n\n{bullets(RESULTS)}"
    return [Block(page, "headline", headline(panel)), Block(page, "results", results)]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a page has no markers, or is stale under --check."""
    return run(blocks, "python docs/readme_table.py", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
