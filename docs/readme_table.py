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
from benchmarks.real.measures import KNN, TOP1
from benchmarks.tables import table
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
"""A setting of CamVid, chosen on the validation frames, and a smaller image of its time."""
RANDOM = "random 0.735"
TASK_SMALLER = "resize 0.7"
DISTILLED = "distilled_resize_merge", "distilled_resize"
TABLE = {
    "merge 0.7": "merge 0.7",
    "resize:size=196": "dense@294",
    "tome 0.715": "tome 0.715",
    "evit 0.725": "evit 0.725",
    "resize_merge 0.5": "merge 0.7@294",
    "resize:size=168": "dense@252",
    "distilled_resize_merge": "",
    "distilled_resize": "",
}
"""Settings of the panel, and those of the same strategy and about the same time on CamVid."""
RECALL, OTHER_RECALL = "text_to_image_r5", "image_to_text_r5"
LANGUAGE_STRATEGY, LANGUAGE_KEEP = "diverse", 0.25
Case = tuple[str, str, str]
"""What a reader has, what to use, and what was measured."""


def headline(panel: dict[str, Any], camvid: dict[str, Any]) -> str:
    """Return what the default costs, beside a smaller image of about the same time."""
    frames = panel_tables.times(camvid, BATCHES[0])[TABLE[DEFAULT_SETTING]].mean
    batches = panel_tables.times(panel, BATCHES[0])[DEFAULT_SETTING].mean
    rows = [
        [
            "segmentation: mIoU on CamVid",
            f"{frames:.2f}",
            *(on_camvid(camvid)[TABLE[name]] for name in (DEFAULT_SETTING, SMALLER)),
            minus_smaller_frame(camvid, TABLE[DEFAULT_SETTING], TABLE[SMALLER]),
        ]
    ]
    means = {row.setting: row.mean for row in panel_tables.rows(panel, TOP1)}
    rows.append(
        [
            f"classification: top-1 on the mean of {len(panel['sets'])} data sets",
            f"{batches:.2f}",
            *(panel_tables.points(means[name]) for name in (DEFAULT_SETTING, SMALLER)),
            contrast(panel, TOP1, DEFAULT_SETTING, SMALLER),
        ]
    )
    header = ["", "time", "the default", "a smaller image of about this time", "difference"]
    return (
        f"**{1 / frames:.1f} to {1 / batches:.1f} times as fast in batches, without training, with "
        "your classifier or head as it is.** A DINOv2 ViT-S/14 in float32 with batches of 8 on one "
        "CPU thread (no GPU yet): time relative to dense, and changes in points with 95% "
        "intervals. Merging is better than a smaller image for features of every patch; for one "
        "feature of each image they do not differ significantly.\n\n" + table(header, rows, left=1)
    )


def contrast(panel: dict[str, Any], measure: str, ours: str, other: str) -> str:
    """Return the paired difference of two settings on the mean of the sets."""
    found = {(left, right): mean for left, right, _, mean in panel_tables.contrasts(panel, measure)}
    return panel_tables.points(found[ours, other])


def cases(results: Path) -> str:
    """Return a table of what to use, and why."""
    tasks, panel, camvid, finetuned = (
        read_object(results / "real" / f"{name}.json")
        for name in ("tasks_test", "panel", "camvid", "finetune")
    )
    rows = [
        *classifiers(panel),
        masks(camvid),
        single_images(tasks, read_object(results / "intel-xeon-2-cores" / "bench.json")),
        vision_language_models(results),
        training(finetuned),
        beside_tome(read_object(results / "official_tome.json"), panel),
    ]
    return table(["your case", "use", "because"], [list(row) for row in rows], left=3)


def classifiers(panel: dict[str, Any]) -> list[Case]:
    """Return what to use for one feature of each image, at two thirds and at half of the time."""
    rows = {row.setting: row.mean for row in panel_tables.rows(panel, TOP1)}
    smaller, merged = (panel_tables.points(rows[name]) for name in reversed(DISTILLED))
    return [
        (
            "one feature or class for each image",
            f"the default (`{DEFAULT.name}`, `keep={DEFAULT_KEEP}`) or a smaller image, which is "
            "simpler; reduced and dense vectors differ, so embed a whole index anew",
            "they do not differ significantly, nor by nearest neighbours: "
            f"{contrast(panel, KNN, DEFAULT_SETTING, SMALLER)} points",
        ),
        (
            "the same in half of the time, with unlabelled photographs",
            "a smaller image or `resize_merge`, [distilled](docs/calibrate.md#recover-quality-"
            "without-labels)",
            f"top-1 then changes by {smaller} or {merged} points",
        ),
    ]


def on_camvid(camvid: dict[str, Any]) -> dict[str, str]:
    """Return the change of mIoU of each setting by the head of dense features."""
    return {
        entry["setting"]: panel_tables.points(
            panel_tables.interval_of(entry["difference"]["dense"])
        )
        for entry in camvid["settings"]
    }


def minus_smaller_frame(camvid: dict[str, Any], ours: str, other: str) -> str:
    """Return the paired difference of mIoU of two settings by the head of dense features."""
    totals = {entry["setting"]: entry["totals"]["dense"] for entry in camvid["settings"]}
    return panel_tables.points(difference_of_groups(totals[ours], totals[other]))


def masks(camvid: dict[str, Any]) -> Case:
    """Return what to use for features of every patch, with an existing head and with a new one."""
    ratio = panel_tables.times(camvid, BATCHES[0])[MASKS].mean
    return (
        "[masks, depth, boxes or poses](docs/dense.md)",
        f"the default; in half of the time `{MASKS.replace(' ', '` with `keep=')}` for an existing "
        "head, and a smaller image for a new head",
        f"at {ratio:.2f} of the time, an existing head gains "
        f"{minus_smaller_frame(camvid, MASKS, SMALLER_FRAME)} points of mIoU against a smaller "
        "image",
    )


def times(tasks: dict[str, Any], batch: int, threads: int = THREADS) -> dict[str, float]:
    """Return the time of each setting relative to dense, at a batch size."""
    wanted = (batch, threads)
    runs = tasks["time"]["runs"]
    return next(run["ratios"] for run in runs if (run["batch"], run["threads"]) == wanted)


def beside_tome(document: dict[str, Any], panel: dict[str, Any]) -> Case:
    """Return how `tome` compares with the official code, and with the default."""
    (name, found), *_ = document["models"].items()
    ours = f"tome:r={document['merged_per_block']}"
    both = [panel_tables.times(found, batch) for batch in BATCHES]
    batched, single = ((each[ours].mean, each[OFFICIAL].mean) for each in both)
    return (
        "[ToMe's own code](https://github.com/facebookresearch/ToMe), CC BY-NC",
        "`tome`, which gives the same outputs, or the default",
        f"in batches, `tome` takes {batched[0]:.2f} of the dense time and ToMe's code "
        f"{batched[1]:.2f}; for single images {single[0]:.2f} and {single[1]:.2f}, so that code is "
        f"faster there (`{name}`, r={document['merged_per_block']}). It has published accuracy on "
        "ImageNet. The default gains "
        f"{contrast(panel, TOP1, DEFAULT_SETTING, 'tome 0.715')} points of top-1 against `tome`",
    )


def single_images(tasks: dict[str, Any], bench: dict[str, Any]) -> Case:
    """Return what the default saves for one image at a time, in PyTorch and exported."""
    merged, smaller = (times(tasks, 1)[name] for name in (DEFAULT_SETTING, TASK_SMALLER))
    exported = next(
        entry["extra_info"]["ratios"]
        for entry in bench["benchmarks"]
        if entry["extra_info"].get("runtime_threads") == THREADS
    )
    return (
        "one image at a time",
        "[ONNX](docs/serve.md), or a smaller image",
        f"the default takes {merged:.2f} of the time in PyTorch and "
        f"{exported[DEFAULT_SETTING]:.2f} in ONNX Runtime, a smaller image {smaller:.2f} and "
        f"{exported[TASK_SMALLER]:.2f} (two threads)",
    )


def vision_language_models(results: Path) -> Case:
    """Return what a served language model gains."""
    served, pages = (
        [
            f"{row['throughput'][0]:.1f}"
            for row in read_object(results / "serving" / f"{name}-intel-xeon-2-cores.json")["rows"]
        ]
        for name in ("llava", "pages")
    )
    return (
        "LLaVA, Qwen-VL and others that answer questions",
        f"[`{LANGUAGE_STRATEGY}`](docs/vlm.md) with `keep={LANGUAGE_KEEP}`, or "
        "[`dedup`](docs/documents.md) for pages and screens; check the answers",
        f"[vLLM](docs/vllm.md) answers {served[0]} to {served[1]} times as many requests, with "
        f"`dedup` {' to '.join(dict.fromkeys(pages))} times. This is speed only: no accuracy was "
        "measured on a pretrained model, and in a [study of tiny "
        "ones](docs/results.md#image-tokens-of-a-language-model) every strategy loses",
    )


def training(finetuned: dict[str, Any]) -> Case:
    """Return what training saves."""
    saved = [
        percent(1 - finetuned["time"]["ratios"][arm])
        for arm in (DEFAULT_SETTING, f"resize {DEFAULT_KEEP}")
    ]
    return (
        "[training](docs/training.md)",
        "a smaller image; for a CLIP, either",
        f"a step of fine-tuning takes {saved[0]} less time with the default and {saved[1]} with a "
        "smaller image; in [small runs](docs/results.md#fine-tuning-with-fewer-tokens) the smaller "
        "image lost the least",
    )


def percent(share: float) -> str:
    """Return '31%'."""
    return f"{100 * share:.0f}%"


def settings_table(panel: dict[str, Any], camvid: dict[str, Any], retrieval: dict[str, Any]) -> str:
    """Return the table of the README, and what was measured.

    A row for each of `TABLE`: times, and changes by what was fitted on dense features.
    """
    found = {row.setting: row for row in panel_tables.rows(panel, TOP1)}
    mious, frames = on_camvid(camvid), panel_tables.times(camvid, BATCHES[0])
    recalls = {
        entry["setting"]: " / ".join(
            panel_tables.points(
                panel_tables.interval_of(entry["difference"]["dense"][recall])
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
                panel_tables.time_text(panel, name, BATCHES[0]),
                panel_tables.points(row.mean),
                f"{worst} ({row.worst})",
                f"{mious[place]}, time {frames[place].mean:.2f}" if place else "",
                recalls.get(name, ""),
            ]
        )
    sets = panel["sets"]
    photographs = sum(each["photographs"] for each in sets.values())
    probes = [100 * each["dense"][TOP1] for each in sets.values()]
    header = ["strategy and `keep`", "time", "top-1", "worst data set"]
    header += ["mIoU, time on its larger images", "R@5, text / image"]
    recall = retrieval["dense"]
    note = (
        "*Times at batch 8, relative to dense; the values of `keep` make those of each half of the "
        "table about equal. Other columns are changes in points, with 95% intervals. Classifiers, "
        "heads and maps were fitted on dense features and are not refitted. Top-1: linear "
        f"classifiers on {len(sets)} data sets, {photographs:,} photographs from clothes to "
        f"medical images (dense: {min(probes):.0f} to {max(probes):.0f}). mIoU: CamVid (dense: "
        f"{100 * camvid['dense']['dense']:.1f}). R@5: Flickr8k, text to image / image to text "
        f"(dense: {100 * recall[RECALL]:.1f} / {100 * recall[OTHER_RECALL]:.1f}). Distilled: 500 "
        f"steps without labels, one seed. `evit` was made for fine-tuning, and was not fine-tuned; "
        f"random patches change top-1 by {panel_tables.points(found[RANDOM].mean)}. "
        f"{panel['time']['device']}; intervals of times are at "
        f"most {panel_tables.widest_time(panel):.2f} wide. Empty: not measured. [Every set, and "
        "refitted classifiers](docs/results.md#a-panel-of-labelled-photographs).*"
    )
    return f"{table(header, cells, left=1)}\n\n{note}"


def blocks() -> list[Block]:
    """Return the headline and the results."""
    panel, camvid, retrieval = (read_object(RESULTS / "real" / f"{name}.json") for name in NAMES)
    page = ROOT / "README.md"
    results = f"{settings_table(panel, camvid, retrieval)}\n\n{cases(RESULTS)}"
    return [
        Block(page, "headline", headline(panel, camvid)),
        Block(page, "results", results),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a page has no markers, or is stale under --check."""
    return run(blocks, "python docs/readme_table.py", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
