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
CLIP_KEEP, CLIP_ARMS = 0.5, (DEFAULT.name, "resize")
LANGUAGE_STRATEGY, LANGUAGE_KEEP = "diverse", 0.25


def headline(panel: dict[str, Any]) -> str:
    """Return what the default and half of the time cost, beside a smaller image."""
    rows = {row.setting: row.mean for row in panel_tables.rows(panel, TOP1)}
    time, other = (panel_tables.times(panel, 8)[name].mean for name in (DEFAULT_SETTING, SMALLER))
    change, smaller, *half = (
        panel_tables.points(rows[name]) for name in (DEFAULT_SETTING, SMALLER, *DISTILLED)
    )
    lost = -100 * rows[DEFAULT_SETTING].mean
    return (
        f"**About {1 / time:.1f} times as fast in batches, for {lost:.1f} points of top-1, without "
        "training.** That is the default in a DINOv2 ViT-S/14 with batches of 8 on one CPU thread "
        f"(no GPU yet): it runs in {percent(time)} of the time, and linear classifiers change by "
        f"{change} points, averaged over {len(panel['sets'])} data sets, with the 95% interval in "
        f"brackets. With a smaller image it is {percent(other)} and {smaller}. At half the time, "
        "after [distillation](docs/calibrate.md#recover-quality-without-labels) on unlabelled "
        "photographs like those measured, they change by "
        f"{half[0]} with a smaller image and merging, and by {half[1]} with a smaller image alone."
    )


def against(panel: dict[str, Any], camvid: dict[str, Any]) -> str:
    """Return the default minus a smaller image of its time, and minus `tome`, paired."""
    kept, fitted = (
        {(left, right): mean for left, right, _, mean in panel_tables.contrasts(panel, measure)}
        for measure in (TOP1, OWN)
    )
    smaller, refitted, tome = (
        panel_tables.points(found[DEFAULT_SETTING, other])
        for found, other in ((kept, SMALLER), (fitted, SMALLER), (kept, "tome 0.715"))
    )
    totals = {entry["setting"]: entry["totals"]["dense"] for entry in camvid["settings"]}
    pair = totals[TABLE[DEFAULT_SETTING]], totals[TABLE[SMALLER]]
    masks = panel_tables.points(difference_of_groups(*pair))
    return (
        "**Merging or a smaller image?** At about the same time, the default minus a smaller image "
        f"is {smaller} points of top-1 if the head stays and {refitted} if it is fitted again, "
        f"which are ties, and {masks} points of mIoU for masks. Merge if the head stays, if every "
        "patch counts, or if features must stay close to the dense ones. Otherwise try a smaller "
        f"image first: it is simpler. The default minus `tome` is {tome} points of top-1."
    )


def index(tasks: dict[str, Any]) -> str:
    """Return how many nearest neighbours stay the same, with merging and with a smaller image."""
    found = {entry["setting"]: entry["neighbours"]["mean"] for entry in tasks["settings"]}
    merged, smaller = (percent(found[name]) for name in (DEFAULT_SETTING, TASK_SMALLER))
    ratios = times(tasks, BATCHES[0])
    return (
        f"**For an index of features**, {merged} of the ten nearest neighbours of a photograph "
        f"stay the same with the default, and {smaller} with a smaller image of {TASK_PIXELS} px "
        f"(Flickr8k, {tasks['photographs']['flickr8k']['measured']:,} photographs; the two take "
        f"{ratios[DEFAULT_SETTING]:.2f} and {ratios[TASK_SMALLER]:.2f} of the time). Embed the "
        "index again, or check yours with `elip calibrate .. --task neighbours`."
    )


def bullets(results: Path) -> str:
    """Return a line for each kind of use."""
    tasks = read_object(results / "real" / "tasks_test.json")
    panel, camvid = (read_object(results / "real" / f"{name}.json") for name in NAMES[:2])
    finetuned, clip = (read_object(results / "real" / f"{name}.json") for name in STUDIES)
    lines = [
        against(panel, camvid),
        index(tasks),
        masks(camvid),
        single_images(tasks, read_object(results / "intel-xeon-2-cores" / "bench.json")),
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
    fitted = on_camvid(camvid, "own")
    totals = {entry["setting"]: entry["totals"]["dense"] for entry in camvid["settings"]}
    gap = panel_tables.points(difference_of_groups(totals[MASKS], totals[SMALLER_FRAME]))
    return (
        f"**Masks at about half the time**: `{MASKS.replace(' ', '` with `keep=')}` takes "
        f"{ratios[MASKS].mean:.2f} of the time and changes mIoU by {changes[MASKS]}, a difference "
        f"of {gap} from a smaller image that takes {ratios[SMALLER_FRAME].mean:.2f}. With a head "
        f"that is fitted again it changes by {fitted[MASKS]}; a smaller image then needs only "
        f"{ratios[SMALLEST_FRAME].mean:.2f} of the time for {fitted[SMALLEST_FRAME]}. [Depth, "
        "boxes and poses](docs/dense.md) use the same features."
    )


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
        f"**ToMe's [own code](https://github.com/facebookresearch/ToMe)** on a `{name}` with "
        f"r={document['merged_per_block']} gives the same outputs as `tome` (to "
        f"{found['largest_relative_difference']:.0e}). At batch {BATCHES[0]}, `tome` runs in "
        f"{batched[0]:.2f} of the dense time and that code in {batched[1]:.2f}; for single images "
        f"in {single[0]:.2f} and {single[1]:.2f}. That code supports models of timm, SWAG and MAE, "
        "has published accuracy on ImageNet, and is licensed under CC BY-NC. "
        "[EViT](https://github.com/youweiliang/evit) was made for fine-tuning; here it was not "
        "fine-tuned."
    )


def single_images(tasks: dict[str, Any], bench: dict[str, Any]) -> str:
    """Return what the default saves for one image at a time, in PyTorch and exported."""
    merged, smaller = (
        [
            percent(1 - times(tasks, 1, threads)[name])
            for threads in (1, THREADS)
            for name in (DEFAULT_SETTING, TASK_SMALLER)
        ][start::2]
        for start in (0, 1)
    )
    exported = next(
        entry["extra_info"]["ratios"]
        for entry in bench["benchmarks"]
        if entry["extra_info"].get("runtime_threads") == THREADS
    )
    return (
        f"**One image at a time** saves less in PyTorch: {merged[0]} of the time with one thread "
        f"and {merged[1]} with two, where a smaller image of {TASK_PIXELS} px saves {smaller[0]} "
        f"and {smaller[1]}. [Exported to ONNX](docs/serve.md), a ViT-S runs in "
        f"{exported[DEFAULT_SETTING]:.2f} of the time with two threads, and with a smaller image "
        f"in {exported[TASK_SMALLER]:.2f}."
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
    change = over_seeds(interval_over_seeds(reduced, dense))
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
    values, arms = values_by_seed(finetuned), (DEFAULT_SETTING, f"resize {DEFAULT_KEEP}")
    dense = values[DENSE, DENSE, DENSE]["top1"]
    changes = [
        over_seeds(interval_over_seeds(values[arm, REDUCED, REDUCED]["top1"], dense))
        for arm in arms
    ]
    saved = [percent(1 - finetuned["time"]["ratios"][arm]) for arm in arms]
    of_clip, clip_arms = values_by_seed(clip), [f"{name} {CLIP_KEEP}" for name in CLIP_ARMS]
    faster = [percent(1 - clip["time"]["ratios"][arm]) for arm in clip_arms]
    (merged, smaller), (reduced, _) = (
        [recalls_of(of_clip[arm, REDUCED, use], of_clip[DENSE, DENSE, DENSE]) for arm in clip_arms]
        for use in (DENSE, REDUCED)
    )
    pixels = finetuned["settings"]["pixels"]
    return (
        f"**Training** (small runs at {pixels} px, three seeds): [fine-tuning]"
        f"(docs/results.md#fine-tuning-with-fewer-tokens) with the default takes {saved[0]} less "
        f"time per step and changes top-1 by {changes[0]} points; a smaller image {saved[1]} and "
        f"{changes[1]}. Fewer steps were not significantly different. A [CLIP]"
        f"(docs/results.md#training-a-clip) trained on half of the image tokens takes {faster[0]} "
        f"less time per step. Evaluated with all tokens, its R@5 changes by {merged} (text to "
        f"image / image to text), with half of them by {reduced}; a smaller image takes "
        f"{faster[1]} less, and changes it by {smaller} with all."
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
    results = f"{settings_table(panel, camvid, retrieval)}\n\n{bullets(RESULTS)}"
    return [Block(page, "headline", headline(panel)), Block(page, "results", results)]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a page has no markers, or is stale under --check."""
    return run(blocks, "python docs/readme_table.py", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
