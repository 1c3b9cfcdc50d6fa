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
from benchmarks.real.measures import OWN, TOP1
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
SMALLEST_FRAME = "dense@238"
"""A setting of CamVid, chosen on the validation frames, and smaller images."""
TASK_SMALLER, TASK_PIXELS = "resize 0.7", 182
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
CLIP_KEEP, CLIP_ARMS = 0.5, (DEFAULT.name, "resize")
LANGUAGE_STRATEGY, LANGUAGE_KEEP = "diverse", 0.25
Case = tuple[str, str, str]
"""What a reader has, what to use, and what was measured."""


def headline(panel: dict[str, Any]) -> str:
    """Return what the default costs, beside a smaller image."""
    rows = {row.setting: row.mean for row in panel_tables.rows(panel, TOP1)}
    time, other = (panel_tables.times(panel, 8)[name].mean for name in (DEFAULT_SETTING, SMALLER))
    change, smaller = (panel_tables.points(rows[name]) for name in (DEFAULT_SETTING, SMALLER))
    lost = -100 * rows[DEFAULT_SETTING].mean
    return (
        f"**About {1 / time:.1f} times as fast in batches, for {lost:.1f} points of top-1, without "
        "training.** Measured with a DINOv2 ViT-S/14 and batches of 8 on one CPU thread (no GPU "
        f"yet): the default takes {percent(time)} of the time. Linear classifiers, fitted before, "
        f"change by {change} points on the mean of {len(panel['sets'])} data sets; brackets are "
        "95% intervals. With a smaller image instead, "
        f"it is {percent(other)} of the time and {smaller} points."
    )


def cases(results: Path) -> str:
    """Return a table of what to use, and how it compares with the official code."""
    tasks, panel, camvid, finetuned, clip = (
        read_object(results / "real" / f"{name}.json")
        for name in ("tasks_test", "panel", "camvid", "finetune", "clip")
    )
    rows = [
        *classifiers(panel),
        *masks(camvid),
        index(tasks),
        single_images(tasks, read_object(results / "intel-xeon-2-cores" / "bench.json")),
        vision_language_models(results),
        training(finetuned, clip),
    ]
    compared = beside_tome(read_object(results / "official_tome.json"))
    header = ["your case", "use", "measured"]
    return f"{table(header, [list(row) for row in rows], left=3)}\n\n{compared}"


def classifiers(panel: dict[str, Any]) -> list[Case]:
    """Return the default minus a smaller image of its time, and minus `tome`, paired."""
    kept, fitted = (
        {(left, right): mean for left, right, _, mean in panel_tables.contrasts(panel, measure)}
        for measure in (TOP1, OWN)
    )
    smaller, refitted, tome = (
        panel_tables.points(found[DEFAULT_SETTING, other])
        for found, other in ((kept, SMALLER), (fitted, SMALLER), (kept, "tome 0.715"))
    )
    half = dict(zip(DISTILLED, distilled(panel), strict=True))
    return [
        (
            "a classifier",
            f"`{DEFAULT.name}` with `keep={DEFAULT_KEEP}`, the default; a smaller image, which is "
            "simpler, if you fit the classifier again",
            "top-1 of the default against a smaller image of about the same time: "
            f"{smaller} points, and {refitted} fitted again, both ties; against `tome`: {tome}",
        ),
        (
            "the same at half of the time, with unlabelled photographs",
            "a smaller image or `resize_merge`, [distilled](docs/calibrate.md#recover-quality-"
            "without-labels)",
            f"top-1 changes by {half[DISTILLED[1]]} and {half[DISTILLED[0]]}",
        ),
    ]


def distilled(panel: dict[str, Any]) -> list[str]:
    """Return the changes of top-1 of the models of `DISTILLED`."""
    rows = {row.setting: row.mean for row in panel_tables.rows(panel, TOP1)}
    return [panel_tables.points(rows[name]) for name in DISTILLED]


def index(tasks: dict[str, Any]) -> Case:
    """Return how many nearest neighbours stay the same, with merging and with a smaller image."""
    found = {entry["setting"]: entry["neighbours"]["mean"] for entry in tasks["settings"]}
    merged, smaller = (percent(found[name]) for name in (DEFAULT_SETTING, TASK_SMALLER))
    ratios = times(tasks, BATCHES[0])
    return (
        "search by features",
        "the default; embed the index again",
        f"{merged} of the ten nearest neighbours stay the same, and {smaller} with a smaller image "
        f"({ratios[DEFAULT_SETTING]:.2f} and {ratios[TASK_SMALLER]:.2f} of the time, "
        f"{tasks['photographs']['flickr8k']['measured']:,} photographs)",
    )


def on_camvid(camvid: dict[str, Any], head: str = "dense") -> dict[str, str]:
    """Return the change of mIoU of each setting by a head."""
    return {
        entry["setting"]: panel_tables.points(panel_tables.interval_of(entry["difference"][head]))
        for entry in camvid["settings"]
    }


def masks(camvid: dict[str, Any]) -> list[Case]:
    """Return what masks cost, and at half of the time, beside a smaller image."""
    ratios, changes = panel_tables.times(camvid, 8), on_camvid(camvid)
    fitted = on_camvid(camvid, "own")
    totals = {entry["setting"]: entry["totals"]["dense"] for entry in camvid["settings"]}
    default, half = (
        panel_tables.points(difference_of_groups(totals[ours], totals[other]))
        for ours, other in (
            (TABLE[DEFAULT_SETTING], TABLE[SMALLER]),
            (MASKS, SMALLER_FRAME),
        )
    )
    return [
        (
            "masks, or [depth, boxes and poses](docs/dense.md) from the same features",
            "the default",
            f"{default} points of mIoU against a smaller image of about the same time",
        ),
        (
            "masks at about half of the time",
            f"`{MASKS.replace(' ', '` with `keep=')}`",
            f"{ratios[MASKS].mean:.2f} of the time, and mIoU changes by {changes[MASKS]}: {half} "
            f"against a smaller image. If the head is fitted again, {fitted[MASKS]}; a smaller "
            f"image loses as much at {ratios[SMALLEST_FRAME].mean:.2f} of the time: "
            f"{fitted[SMALLEST_FRAME]}",
        ),
    ]


def times(tasks: dict[str, Any], batch: int, threads: int = THREADS) -> dict[str, float]:
    """Return the time of each setting relative to dense, at a batch size."""
    wanted = (batch, threads)
    runs = tasks["time"]["runs"]
    return next(run["ratios"] for run in runs if (run["batch"], run["threads"]) == wanted)


def beside_tome(document: dict[str, Any]) -> str:
    """Return how `tome` compares with the official code of ToMe."""
    (name, found), *_ = document["models"].items()
    ours = f"tome:r={document['merged_per_block']}"
    both = [panel_tables.times(found, batch) for batch in BATCHES]
    batched, single = ((each[ours].mean, each[OFFICIAL].mean) for each in both)
    return (
        f"**ToMe's [own code](https://github.com/facebookresearch/ToMe)** gives the same outputs "
        f"as `tome` (`{name}`, r={document['merged_per_block']}, to "
        f"{found['largest_relative_difference']:.0e}). `tome` runs in {batched[0]:.2f} of the "
        f"dense time at batch {BATCHES[0]}, and that code in {batched[1]:.2f}; single images in "
        f"{single[0]:.2f} and {single[1]:.2f}. That code has published accuracy on ImageNet, and "
        "its licence is CC BY-NC. [EViT](https://github.com/youweiliang/evit) was made for "
        "fine-tuning; here it was not fine-tuned."
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
        f"with two threads, the default takes {merged:.2f} of the time in PyTorch and "
        f"{exported[DEFAULT_SETTING]:.2f} in ONNX Runtime, a smaller image {smaller:.2f} and "
        f"{exported[TASK_SMALLER]:.2f}",
    )


def vision_language_models(results: Path) -> Case:
    """Return what a served language model gains, and what small trained ones lose."""
    study = read_object(results / "vlm" / "study.json")
    seeds = {row["setting"]: row["by_seed"] for row in study["settings"]}
    arms = (f"{LANGUAGE_STRATEGY} {LANGUAGE_KEEP}", DENSE)
    reduced, dense = (dict(enumerate(seeds[arm])) for arm in arms)
    change = over_seeds(interval_over_seeds(reduced, dense))
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
        f"[vLLM](docs/vllm.md) answers {served[0]} times as many requests of one client and "
        f"{served[1]} of four, with `dedup` {pages[0]} and {pages[1]} (random weights). Accuracy "
        f"of three tiny LLaVAs with `{LANGUAGE_STRATEGY}`: {change} points ([study]"
        "(docs/results.md#image-tokens-of-a-language-model))",
    )


def training(finetuned: dict[str, Any], clip: dict[str, Any]) -> Case:
    """Return what training saves and may cost: fine-tuning, and a CLIP with half of the tokens."""
    values, arms = values_by_seed(finetuned), (DEFAULT_SETTING, f"resize {DEFAULT_KEEP}")
    dense = values[DENSE, DENSE, DENSE]["top1"]
    changes = [
        over_seeds(interval_over_seeds(values[arm, REDUCED, REDUCED]["top1"], dense))
        for arm in arms
    ]
    saved = [percent(1 - finetuned["time"]["ratios"][arm]) for arm in arms]
    of_clip, clip_arms = values_by_seed(clip), [f"{name} {CLIP_KEEP}" for name in CLIP_ARMS]
    faster = [percent(1 - clip["time"]["ratios"][arm]) for arm in clip_arms]
    merged, smaller = (
        recalls_of(of_clip[arm, REDUCED, DENSE], of_clip[DENSE, DENSE, DENSE]) for arm in clip_arms
    )
    return (
        "training (small runs, three seeds)",
        "fine-tuning: a smaller image; a CLIP: either",
        f"[fine-tuning](docs/results.md#fine-tuning-with-fewer-tokens): a step takes {saved[1]} "
        f"less time with a smaller image, {saved[0]} with the default; top-1 changes by "
        f"{changes[1]} and {changes[0]}. [CLIP](docs/results.md#training-a-clip) with "
        f"`keep={CLIP_KEEP}`: {faster[1]} and {faster[0]} less; R@5, later with all tokens, "
        f"{smaller} and {merged}",
    )


def recalls_of(arm: dict[str, Any], dense: dict[str, Any]) -> str:
    """Return the mean changes of R@5 over seeds, as '−1.6 / −3.4'."""
    means = (interval_over_seeds(arm[key], dense[key])[0] for key in (RECALL, OTHER_RECALL))
    return " / ".join(f"{mean:+.1f}" for mean in means).replace("-", "−")


def over_seeds(found: tuple[float, float]) -> str:
    """Return a mean over seeds, in points, with its interval."""
    mean, half = (points / 100 for points in found)
    return panel_tables.points(Interval(mean, mean - half, mean + half))


def percent(share: float) -> str:
    """Return '31%'."""
    return f"{100 * share:.0f}%"


def settings_table(panel: dict[str, Any], camvid: dict[str, Any], retrieval: dict[str, Any]) -> str:
    """Return the table of the README, and what was measured.

    A row for each of `TABLE`: times, and changes by what was fitted on dense features.
    """
    found = {row.setting: row for row in panel_tables.rows(panel, TOP1)}
    mious, frames = on_camvid(camvid), panel_tables.times(camvid, 8)
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
                f"{mious[place]} at {frames[place].mean:.2f}" if place else "",
                recalls.get(name, ""),
            ]
        )
    sets = panel["sets"]
    photographs = sum(each["photographs"] for each in sets.values())
    probes = [100 * each["dense"][TOP1] for each in sets.values()]
    header = ["strategy and `keep`", f"time, batch {BATCHES[0]}", "top-1", "worst data set"]
    header += ["mIoU, at its time", "R@5, text / image"]
    recall = retrieval["dense"]
    note = (
        "*Times are relative to dense. The other columns are changes in points, with 95% "
        "intervals; heads and maps were fitted on dense features and stay. Top-1: linear "
        f"classifiers, averaged over {len(sets)} data sets, {photographs:,} photographs in all, "
        f"from clothes to medical images (dense: {min(probes):.0f} to {max(probes):.0f}). mIoU: "
        f"CamVid (dense: {100 * camvid['dense']['dense']:.1f}), whose larger images take other "
        "times. R@5: Flickr8k, text to image / image to text (dense: "
        f"{100 * recall[RECALL]:.1f} and {100 * recall[OTHER_RECALL]:.1f}). Distilled: 500 steps, "
        "one seed, on photographs of five of the sets that were not measured. "
        f"{panel['time']['device']}; intervals of times are at most "
        f"{panel_tables.widest_time(panel):.2f} wide. Empty: not measured. [Every set, and heads "
        "that are fitted again](docs/results.md#a-panel-of-labelled-photographs).*"
    )
    return f"{table(header, cells, left=1)}\n\n{note}"


def blocks() -> list[Block]:
    """Return the settings and the results."""
    panel, camvid, retrieval = (read_object(RESULTS / "real" / f"{name}.json") for name in NAMES)
    page = ROOT / "README.md"
    results = f"{settings_table(panel, camvid, retrieval)}\n\n{cases(RESULTS)}"
    return [Block(page, "headline", headline(panel)), Block(page, "results", results)]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a page has no markers, or is stale under --check."""
    return run(blocks, "python docs/readme_table.py", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
