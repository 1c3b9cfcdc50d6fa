"""Write the results in appendix.md from the committed results of `benchmarks.real.tasks`.

python docs/real_model.py             # rewrite the block between the markers
python docs/real_model.py --check     # exit status 1 if the block is stale
"""

from math import hypot
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.marked_block import Block, run
from benchmarks.real import training_tables
from benchmarks.tables import ratio, table
from elip_models.saving.files import read_object

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "real"
TASKS = {
    "top1": "top-1",
    "top1_own": "top-1, own probe",
    "knn": "k-NN",
    "text_to_image_r1": "text to image, R@1",
    "text_to_image_r5": "R@5",
    "image_to_text_r1": "image to text, R@1",
    "image_to_text_r5": "R@5",
}
DEFAULT, DEFAULT_IDEA, RECALL = "merge 0.7", "merge, 0.69", "text_to_image_r5"
DESCRIPTIONS = {"cosine": "cosine", "neighbours": "neighbours kept"}


def block(results: Path) -> str:
    """Return the tables of the test splits, and how cosine and neighbours order the settings."""
    document = read_object(results / "tasks_test.json")
    parts = [note(document), tasks_table(document)]
    if "time" in document:
        parts += [time_table(document)]
    parts += [correlations(document), ideas_table(read_object(results / "ideas.json"), document)]
    parts += [adaptive_batches(read_object(results / "adaptive_batches.json"))]
    parts += [recovery(results), training_tables.tables(results)]
    return "\n\n".join(filter(None, parts))


def note(document: dict[str, Any]) -> str:
    """Return what was measured, on what."""
    photographs, dense = document["photographs"], document["dense"]
    versions = ", ".join(f"{name} {text}" for name, text in document["versions"].items())
    return (
        f"{document['model']}. Clothes: {photographs['clothes']['measured']} photographs, probes "
        f"fitted on {photographs['clothes']['train']}; dense top-1 {percent(dense['top1'])}. "
        f"Flickr8k: {photographs['flickr8k']['measured']} photographs; dense R@5 "
        f"{percent(dense['text_to_image_r5'])} from text to image and "
        f"{percent(dense['image_to_text_r5'])} from image to text. Differences from dense in "
        "points, with 95% intervals over photographs (percentile bootstrap), not adjusted for the "
        "number of settings and measures; bold: the interval excludes zero. If few photographs "
        "change, the interval is too short. Measured "
        f"on {document['device']} on {document['date']} at commit "
        f"{document['commit']['id'][:7]}; {versions}."
    )


def percent(interval: dict[str, float]) -> str:
    """Return '80.5 (76.6 to 84.4)'."""
    return "{:.1f} ({:.1f} to {:.1f})".format(
        *(100 * interval[end] for end in ("mean", "low", "high"))
    )


def points(interval: dict[str, float]) -> str:
    """Return '−1.4 (−3.5 to 0.8)' in points, in bold if the interval excludes zero."""
    mean, low, high = (100 * interval[end] for end in ("mean", "low", "high"))
    text = f"{mean:+.1f} ({low:.1f} to {high:.1f})".replace("-", "−")
    return f"**{text}**" if low > 0 or high < 0 else text


def tasks_table(document: dict[str, Any]) -> str:
    """Return a row for each setting: differences of the tasks, cosine and neighbours."""
    tasks = {name: title for name, title in TASKS.items() if name in document["dense"]}
    header = ["setting", "FLOPs", *tasks.values(), *DESCRIPTIONS.values()]
    rows = [
        [
            f"`{row['setting']}`",
            f"{row['flops']:.2f}",
            *(points(row["difference"][name]) for name in tasks),
            *(f"{row[name]['mean']:.3f}" for name in DESCRIPTIONS),
        ]
        for row in document["settings"]
    ]
    return table(header, rows, left=1)


def time_table(document: dict[str, Any]) -> str:
    """Return the time of each setting relative to dense, by batch size and threads."""
    times = document["time"]
    runs = times["runs"]
    titles = [f"batch {run['batch']}, {threads(run['threads'])}" for run in runs]
    rows = [
        [f"`{row['setting']}`", f"{row['flops']:.2f}"]
        + [ratio(run["ratios"][row["setting"]]) for run in runs]
        for row in document["settings"]
    ]
    return "\n\n".join(
        [
            f"Time relative to dense, medians of {times['rounds']} interleaved rounds on "
            f"{times['device']}, on {times['date']} at commit {times['commit']['id'][:7]}:",
            table(["setting", "FLOPs", *titles], rows, left=1),
        ]
    )


def threads(count: int) -> str:
    """Return '1 thread' or '2 threads'."""
    return f"{count} thread{'s' if count > 1 else ''}"


def correlations(document: dict[str, Any]) -> str:
    """Return the rank correlation of each description with each task, over the settings."""
    found = document["rank_correlation"]
    tasks = {name: TASKS[name] for name in found["cosine"]}
    rows = [
        [DESCRIPTIONS[name], *(f"{found[name][task]:.2f}".replace("-", "−") for task in tasks)]
        for name in DESCRIPTIONS
    ]
    return "\n\n".join(
        [
            f"Spearman's rank correlation over these {len(document['settings'])} settings:",
            table(["", *tasks.values()], rows, left=1),
        ]
    )


def pooled_points(*intervals: dict[str, float]) -> dict[str, float]:
    """Return the mean of intervals of independent sets of equal size."""
    mean = fmean(each["mean"] for each in intervals)
    half = hypot(*((each["high"] - each["low"]) / 2 for each in intervals)) / len(intervals)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def ideas_table(document: dict[str, Any], test: dict[str, Any]) -> str:
    """Return what each idea loses on photographs that chose the settings.

    Args:
        document: the ideas.
        test: the results on the test splits.
    """
    tasks = {name: TASKS[name] for name in ("top1", "text_to_image_r5", "image_to_text_r5")}
    titles = ["top-1", "text to image, R@5", "image to text, R@5"]
    counts = document["photographs"]
    rows = [
        [
            row["idea"],
            f"{row['flops']:.2f}",
            *(points(row["difference"][name]) for name in tasks),
            f"{row['cosine']['mean']:.3f}",
        ]
        for row in document["ideas"]
    ]
    tested = next(row for row in test["settings"] if row["setting"] == DEFAULT)
    pooled = pooled_points(
        tested["difference"][RECALL],
        next(row for row in document["ideas"] if row["idea"] == DEFAULT_IDEA)["difference"][RECALL],
    )
    return "\n\n".join(
        [
            "### Ideas",
            f"Differences from dense in points on photographs that are not those of the tests: "
            f"{counts['clothes']:,} of clothes, held out from a probe of {counts['fitted']:,}, and "
            f"{counts['flickr8k']:,} of Flickr8k's dev split. The number at the end of a name is "
            "the share of the FLOPs. In the rows of 0.42 and 0.25, and of 0.35 with 182 px, the "
            "last block computes the class token alone.",
            table(["idea", "FLOPs", *titles, "cosine"], rows, left=1),
            f"`{DEFAULT}` on the dev and the test split of Flickr8k together changes text-to-image "
            f"R@5 by {points(pooled)}.",
        ]
    )


def adaptive_batches(document: dict[str, Any]) -> str:
    """Return what numbers of merges by image cost in padded batches, as a table."""
    header = ["idea", "photographs", "one image"]
    header += [f"batch {B}{by}" for B in document["batch_sizes"][1:] for by in ("", ", by length")]
    rows = []
    for row in document["rows"]:
        pairs = zip(row["flops"]["data"], row["flops"]["length"], strict=True)
        (single, _), *batched = pairs
        cells = [single, *(each for pair in batched for each in pair)]
        rows.append([row["idea"], row["photographs"], *(f"{each:.2f}" for each in cells)])
    return "\n\n".join(
        [
            "Numbers of merges by image help single images. A batch is padded to its longest "
            "image, which costs more than it gains. FLOPs relative to dense, of batches in the "
            "order of the data and of batches of similar lengths:",
            table(header, rows, left=2),
            "Both studies are finished. Their code was removed after commit 52e4fc0e, where "
            "`python -m benchmarks.real.ideas FOLDER --output X.json` and "
            "`python -m benchmarks.real.adaptive_batches FOLDER --output X.json` run them.",
        ]
    )


def recovery(results: Path) -> str:
    """Return what training without labels recovers, by cosine and neighbours."""
    texts = []
    for path in sorted(results.glob("distilled_*.json"), reverse=True):
        before, after = read_object(path)["settings"]
        texts.append(
            f"from {before['neighbours']['mean']:.2f} to {after['neighbours']['mean']:.2f} of the "
            f"neighbours at {before['flops']:.2f} of the FLOPs"
        )
    return (
        "[`elip distill`](calibrate.md#recover-quality-without-labels) recovers features without "
        f"labels: {' and '.join(texts)} ({len(texts)} runs, one seed each). It has not been judged "
        "by the tasks."
    )


def blocks() -> list[Block]:
    """Return the block of the appendix."""
    return [Block(DOCS / "appendix.md", "real", block(RESULTS))]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a page has no markers, or is stale under --check."""
    return run(blocks, "python docs/real_model.py", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
